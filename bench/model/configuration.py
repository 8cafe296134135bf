"""What a model is and gives, as transformers keeps them: its configuration as it is saved, the output of a pass."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from bench.config import ModelConfig, Objective, parse
from bench.errors import InputError
from bench.form import TEXT
from bench.model.inputs import check_whole
from bench.model.variant import Variant, get_variant

CODE = "modeling_cyclebench"  # the module in a checkpoint's folder that ``trust_remote_code`` loads
CODE_TEXT = '''"""The code of this checkpoint is the package cyclebench, found through this file."""

from cyclebench import CycleConfig, CycleForCausalLM, CycleForClassification  # noqa: F401
'''
CLASSIFIER = ("AutoModelForImageClassification", "CycleForClassification")  # what loads a model of any other form


FOLLOWING = {  # what transformers' own tools read, with the field of the shape that it follows from
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "d_model",
    "num_hidden_layers": "n_blocks",
}


class Installed:
    """A class whose code is never copied beside a checkpoint: ``CODE_TEXT`` leads to it."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "") -> None:
        """Called by transformers when a checkpoint's own code was loaded; there is nothing to copy."""


@dataclass
class CycleOutput(ModelOutput):
    """What a pass gives.

    Attributes:
        loss: scalar, nats per scored token at full depth, or of what sequences left with where the model leaves early;
            in training mode what is trained (``Objective``).
        logits: [B, T, V].
        exit_depth: [B], steps run for each sequence.
        exit_signals: [B, cycles], mean zero attention of each cycle, if ``output_zero_attention`` asked for it.
        zero_attention: one [B, H, T] for each step that has zero tokens, in order, if asked for likewise.
        exit_logits: one [B, T, V] for every exit point, the last being ``logits``, if ``output_exits`` asked for them.
        halting: the chance [B, T] of having halted by every exit point but the last, if anything halts and
            ``output_exits`` asked for it.
        auxiliary_loss: scalar, what the variant's own parts add to the training loss; None if they add nothing.
        shortcut: of a second pass, as of ``Outcome``.
        cache: one slot a step.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    exit_depth: Tensor | None = None
    exit_signals: Tensor | None = None
    zero_attention: tuple[Tensor, ...] | None = None
    exit_logits: tuple[Tensor, ...] | None = None
    halting: tuple[Tensor, ...] | None = None
    auxiliary_loss: Tensor | None = None
    shortcut: tuple[Tensor, Tensor] | None = None
    cache: Cache | None = None


class CycleConfig(Installed, PreTrainedConfig):
    """A model's configuration as it is saved.

    Attributes:
        variant, options: the variant and its options.
        shape: fields of ``ModelConfig``.
        built_cycles: the number of cycles that the variant's parts were made for, where ``shape`` tells another one to
            run; None: that of the shape.
        objective: fields of ``Objective``, what is trained with ``labels``; None: as suits the shape.
    """

    model_type = "cyclebench"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        field.name for field in fields(CycleOutput) if field.name not in ("loss", "logits")
    ]

    variant: str = "vanilla"
    options: dict[str, Any] | None = None
    shape: dict[str, Any] | None = None
    built_cycles: int | None = None
    objective: dict[str, Any] | None = None
    vocab_size: int = 256
    max_position_embeddings: int = 256
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool | None = None  # follows from the shape

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill the names that transformers' own tools read (caches, generation) from the shape and the schedule."""
        for size in ("vocab_size", "max_position_embeddings"):
            check_whole(size, getattr(self, size), 1)
        model = self.model
        variant = self.build_variant()
        self.shape = model.model_dump(mode="json")
        self.options = variant.options.model_dump(mode="json")
        follows = {
            "hidden_size": model.d_model,
            "num_attention_heads": model.n_heads,
            "num_key_value_heads": model.kv_heads,
            "head_dim": model.head_dim,
            "num_hidden_layers": variant.cache_slots(variant.schedule(model)),  # of the KV cache
        }
        vars(self).update(follows)
        if self.tie_word_embeddings not in (None, model.tied):
            given = f"tie_word_embeddings = {self.tie_word_embeddings!r}"
            raise InputError(f"{given} (allowed: in shape, as shape={{'tie_embeddings': ...}})")
        self.tie_word_embeddings = model.tied
        self._refuse({key: value for key, value in kwargs.items() if key not in follows or value != follows[key]})
        super().__post_init__(**{key: value for key, value in kwargs.items() if key not in follows})
        auto, kind = ("AutoModelForCausalLM", "CycleForCausalLM") if model.form == TEXT else CLASSIFIER
        self.auto_map = {"AutoConfig": f"{CODE}.CycleConfig", auto: f"{CODE}.{kind}"}

    @staticmethod
    def _refuse(others: dict[str, Any]) -> None:
        """Raises InputError for sizes of a model that are not in ``shape``, where nothing would read them."""
        for name, value in others.items():
            if name in FOLLOWING or name in ModelConfig.model_fields:
                field = FOLLOWING.get(name, name)
                raise InputError(f"{name} = {value!r} (allowed: in shape, as shape={{{field!r}: ...}})")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """What a checkpoint says, with changes. Other cycles in ``shape``, which may be given in part, are a choice of
        how the model runs: what it has learned stays as it is.
        """
        saved, changed = config_dict.get("shape") or {}, kwargs.pop("shape", None)
        if changed is not None and not isinstance(changed, Mapping):
            raise InputError(f"shape: {changed!r} (allowed: fields of a shape by name, as {{'n_cycles': 4}})")
        if changed:
            built = config_dict.get("built_cycles") or parse(ModelConfig, saved, "model").n_cycles
            runs = parse(ModelConfig, {**saved, **changed}, "model")
            changed = {"shape": runs.model_dump(mode="json"), "built_cycles": built if runs.n_cycles != built else None}
            config_dict = {**config_dict, **changed}
        cls._refuse(kwargs)
        config_dict = {name: value for name, value in config_dict.items() if name not in FOLLOWING}
        own: dict[str, Any] = {name: kwargs.pop(name) for name in ("variant", "options") if name in kwargs}
        return super().from_dict({**config_dict, **own}, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save as everywhere in transformers, with the module that lets the folder be loaded by itself."""
        super().save_pretrained(save_directory, push_to_hub, **kwargs)
        (Path(save_directory) / f"{CODE}.py").write_text(CODE_TEXT, encoding="utf-8")

    @property
    def model(self) -> ModelConfig:
        """The shape, validated."""
        return parse(ModelConfig, self.shape or {}, "model")

    def build_variant(self) -> Variant:
        """The variant with its options, validated."""
        return get_variant(self.variant, self.options)

    def build_objective(self) -> Objective:
        """What is trained, validated. A halting gate has no other gradient: it is trained where nothing is said."""
        if self.objective is None and self.model.halting == "gate":
            return Objective(halting_loss="gate_cdf")
        return parse(Objective, self.objective or {}, "objective")
