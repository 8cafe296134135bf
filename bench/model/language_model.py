"""The Hugging Face models: they walk a variant's schedule over shared blocks, whatever the variant."""

from __future__ import annotations

import inspect
import os
from typing import Any, Protocol

from torch import Tensor, nn, randint
from torch.nn.functional import pad
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils.generic import can_return_tuple

from bench.config import IGNORED, ModelConfig, Objective
from bench.errors import InputError
from bench.form import TEXT
from bench.model.configuration import CycleConfig, CycleOutput, Installed
from bench.model.forms import cut
from bench.model.inputs import check_labels
from bench.model.losses import added_loss, exit_losses, short_way
from bench.model.network import Network
from bench.model.variant import Variant


class Exits(Protocol):
    """How a model leaves early when it is not training (see ``bench.exits.generation``)."""

    def forward(
        self,
        lm: CycleModel,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        use_cache: bool,
        logits_to_keep: int,
        n_cycles: int | None,
    ) -> CycleOutput:
        """One pass in which every sequence leaves where the rule says."""
        ...


class CycleModel(Installed, Network, PreTrainedModel):
    """What the models have in common whose blocks run in the order that their variant's schedule says."""

    config_class = CycleConfig
    base_model_prefix = ""
    _tied_weights_keys = {"lm_head.weight": "tokens.weight"}  # noqa: RUF012 (declared by transformers)
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True
    supports_gradient_checkpointing = True  # of the cycles
    _input_embed_layer = "tokens"
    accepts_loss_kwargs = True  # num_items_in_batch, which Trainer then passes

    def __init__(self, config: CycleConfig) -> None:
        PreTrainedModel.__init__(self, config)
        fits = CycleForCausalLM if config.model.form == TEXT else CycleForClassification
        if not isinstance(self, fits):
            raise InputError(f"{type(self).__name__}: the model is of {config.model.form!r} (allowed: {fits.__name__})")
        shape, positions = config.model, config.max_position_embeddings
        self.build(config.build_variant(), shape, config.vocab_size, positions, config.built_cycles)
        self.objective = config.build_objective()
        self.exits: Exits | None = None  # how sequences leave early, if they do (not part of what is saved)
        self.post_init()

    def train_for(self, objective: Objective) -> None:
        """Train for this from now on where ``labels`` are given, also after saving and loading."""
        fields = Objective.model_fields
        self.objective = Objective(**{name: getattr(objective, name) for name in fields})
        self.config.objective = self.objective.model_dump(mode="json", exclude_defaults=True) or None

    def get_output_embeddings(self) -> nn.Module:
        """The LM head (its weight is the embedding's when they are tied)."""
        return self.lm_head

    def refuse(self, others: dict[str, Any]) -> None:
        """Raises InputError for an argument that is not known, unless it asks for nothing (None or False)."""
        for name, value in others.items():
            if value is not None and value is not False:
                known = (name for name in inspect.signature(self.forward).parameters if name != "others")
                raise InputError(f"{name}: not known to this model (allowed: {', '.join(known)})")

    def forward_of(self, input_ids: Tensor, *arguments: Any, use_cache: bool, labelled: bool) -> CycleOutput:
        """A pass, with exits if the model has any and is not training. The arguments are those of ``Network.run``.

        labelled: there are labels, whose loss is to be found.
        """
        attention_mask, position_ids, cache, keep, mass, exits, n_cycles, *gradients, shortcut = arguments
        if not self.training:  # a study's training may draw numbers of cycles for all of its variants alike
            self.check_cycles("n_cycles", n_cycles)
        if self.exits is not None and not self.training:
            asked = {"output_zero_attention": mass, "output_exits": exits, "shortcut": shortcut}
            asked |= dict(zip(("backward_cycles", "sequence_cycles"), gradients, strict=True))
            for name, value in asked.items():
                if value is not None and value is not False:
                    raise InputError(f"{name}: {value!r} with exits, which leave as their rule says (allowed: none)")
            return self.exits.forward(self, input_ids, attention_mask, position_ids, cache, use_cache, keep, n_cycles)
        every = labelled and self.training and self.objective.trains_exits
        cycles = (n_cycles or self.model_shape.n_cycles) if self.variant.cycled else 1
        if labelled and self.training and self.objective.shortcut_loss and cycles > 1:
            shortcut = short_way(cycles, lambda low, high: int(randint(low, high, ())))
        more = *gradients, shortcut
        found = self.run(input_ids, attention_mask, position_ids, cache, keep, mass, exits or every, n_cycles, *more)
        return CycleOutput(cache=cache, **vars(found))

    def loss_of(self, out: CycleOutput, targets: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """In training what the suite's own loop trains, else the loss at full depth alone: of a batch's part, so that
        the parts of a batch add up to the loss of the whole.
        """
        scored = (targets != IGNORED).sum()
        last, trained = exit_losses(out, targets, self.objective)
        whole = scored if num_items_in_batch is None else num_items_in_batch
        if not self.training:
            return last / whole
        loss = trained / whole
        if (added := added_loss(out, self.objective)) is not None:
            loss = loss + added * (scored / whole)
        return loss


class CycleForCausalLM(CycleModel, GenerationMixin):
    """A causal language model."""

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """Called by ``generate`` before passes with a static cache: the model wants the mask [B, S] as it is."""
        return attention_mask

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_zero_attention: bool = False,
        output_exits: bool = False,
        n_cycles: int | None = None,
        backward_cycles: int | None = None,
        sequence_cycles: Tensor | None = None,
        shortcut: tuple[int, ...] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        past_key_values: Cache | None = None,
        **others: Any,
    ) -> CycleOutput:
        """``Network.run`` as transformers calls it.

        Args:
            input_ids: [B, T]; all but the following arguments are those of ``Network.run``.
            labels: [B, T], shifted inside as everywhere in transformers, -100 is not scored.
            use_cache: whether a cache is made where none is given.
            num_items_in_batch: how many targets the whole batch scores, of which this is a part; None: it is all.
            past_key_values: the former name of ``cache``.
            others: what other models know; refused unless it asks for nothing (None or False).

        Raises:
            InputError: for what the model cannot do.
        """
        self.refuse(others)
        check_labels(labels, input_ids, logits_to_keep)
        if past_key_values is not None:
            if cache is not None:
                raise InputError("past_key_values: given beside cache, of which it is the former name (allowed: one)")
            cache = past_key_values
        if cache is None and use_cache and (self.exits is None or self.training):
            cache = DynamicCache()
        out = self.forward_of(
            input_ids,
            attention_mask,
            position_ids,
            cache,
            logits_to_keep,
            output_zero_attention,
            output_exits,
            n_cycles,
            backward_cycles,
            sequence_cycles,
            shortcut,
            use_cache=bool(use_cache),
            labelled=labels is not None,
        )
        if labels is not None:
            out.loss = self.loss_of(out, pad(labels[:, 1:], (0, 1), value=IGNORED), num_items_in_batch)
        return out


class CycleForClassification(CycleModel):
    """A model of sequences of any form but that of text (``bench.form``): it tells the class of each, or of each place.

    ``AutoModelForImageClassification`` loads it. Of a form with patches it takes whole pictures, too.
    """

    main_input_name = "pixel_values"

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_zero_attention: bool = False,
        output_exits: bool = False,
        n_cycles: int | None = None,
        backward_cycles: int | None = None,
        sequence_cycles: Tensor | None = None,
        shortcut: tuple[int, ...] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> CycleOutput:
        """``Network.run`` as transformers calls it; logits are [B, V] of what is judged once, else [B, T, V].

        Args:
            pixel_values: pictures [B, C, H, W], which are cut into patches; or the sequences: vectors [B, T, F], or
                tokens [B, T] of a form that has them.
            labels: the classes [B] of what is judged once, else of every place [B, T], -100 is not scored.
            num_items_in_batch, others: as of ``CycleForCausalLM.forward``.

        Raises:
            InputError: for what the model cannot do.
        """
        self.refuse(others)
        form = self.model_shape.form
        inputs = cut(pixel_values, form) if pixel_values.dim() == 4 else pixel_values
        if inputs.dim() != (2 if form.features is None else 3):
            raise InputError(f"pixel_values: {pixel_values.dim()} dimensions do not fit the model's form, {form!r}")
        whole = inputs, attention_mask, None, None, 0, output_zero_attention, output_exits, n_cycles, backward_cycles
        out = self.forward_of(*whole, sequence_cycles, shortcut, use_cache=False, labelled=labels is not None)
        if labels is not None:
            out.loss = self.loss_of(out, labels, num_items_in_batch)
        if form.judged != "tokens" and out.logits is not None:
            out.logits = out.logits.squeeze(1)
            exits = out.exit_logits
            out.exit_logits = None if exits is None else tuple(logits.squeeze(1) for logits in exits)
        return out


def build_model(variant: Variant, model: ModelConfig, vocab_size: int, length: int) -> CycleModel:
    """A model with its parameters on whatever device is the default one, uninitialised weights allowed.

    length: the longest sequence it is made for, in tokens.
    """
    return model_of(
        CycleConfig(
            variant=variant.name,
            options=variant.options.model_dump(mode="json"),
            shape=model.model_dump(mode="json"),
            vocab_size=vocab_size,
            max_position_embeddings=length,
        )
    )


def model_of(config: CycleConfig) -> CycleModel:
    """A model of the class that fits its form."""
    return CycleForCausalLM(config) if config.model.form == TEXT else CycleForClassification(config)


def load_model(folder: str | os.PathLike[str]) -> CycleModel:
    """The model saved in a folder, of the class that fits its form."""
    is_text = CycleConfig.from_pretrained(folder).model.form == TEXT
    return (CycleForCausalLM if is_text else CycleForClassification).from_pretrained(folder)


AutoConfig.register(CycleConfig.model_type, CycleConfig, exist_ok=True)
AutoModelForCausalLM.register(CycleConfig, CycleForCausalLM, exist_ok=True)
AutoModelForImageClassification.register(CycleConfig, CycleForClassification, exist_ok=True)
