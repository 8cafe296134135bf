"""The language model: it walks a variant's schedule over shared blocks. A Hugging Face model, whatever the variant."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils import ModelOutput

from bench.config import ModelConfig, parse
from bench.model.blocks import Block, Context, make_norm, rotation
from bench.model.halting import HaltingGate
from bench.model.parts import Part
from bench.schedule import Schedule, Step
from bench.variant import Variant, get_variant

IGNORED = -100  # target of a position that is not scored


CODE = "modeling_cyclebench"  # the module in a checkpoint's folder that ``trust_remote_code`` loads
CODE_TEXT = '''"""The code of this checkpoint is the package cyclebench, found through this file."""

import variants  # noqa: F401
from bench.model import CycleConfig, CycleForCausalLM  # noqa: F401
'''


class _Installed:
    """A class whose code is never copied beside a checkpoint: ``CODE_TEXT`` leads to it."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "") -> None:
        """Called by transformers when a checkpoint's own code was loaded; there is nothing to copy."""


class CycleConfig(_Installed, PreTrainedConfig):
    """A model's configuration as it is saved: variant, its options and the shape (fields of ``ModelConfig``)."""

    model_type = "cyclebench"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "cache",
        "zero_attention",
        "exit_signals",
        "exit_logits",
        "halting",
    ]

    variant: str = "vanilla"
    options: dict[str, Any] | None = None
    shape: dict[str, Any] | None = None
    vocab_size: int = 256
    max_position_embeddings: int = 256
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill the names that transformers' own tools read (caches, generation) from the shape and the schedule."""
        model = self.model
        variant = self.build_variant()
        self.shape = model.model_dump(mode="json")
        self.options = variant.options.model_dump(mode="json")
        self.hidden_size = model.d_model
        self.num_attention_heads = model.n_heads
        self.num_key_value_heads = model.kv_heads
        self.head_dim = model.head_dim
        self.num_hidden_layers = variant.cache_slots(variant.schedule(model))  # of the KV cache
        self.tie_word_embeddings = model.tie_embeddings
        super().__post_init__(**kwargs)
        self.auto_map = {"AutoConfig": f"{CODE}.CycleConfig", "AutoModelForCausalLM": f"{CODE}.CycleForCausalLM"}

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


@dataclass
class CycleOutput(ModelOutput):
    """loss: scalar, nats per scored token; logits: [B, T, V]; exit_depth: [B], steps run for each sequence;
    exit_signals: [B, cycles], mean zero attention of each cycle; zero_attention: one [B, H, T] for each step that has
    zero tokens, in order (both only when asked for by ``output_zero_attention``); exit_logits: one [B, T, V] for every
    exit point, the last being ``logits``, and halting: the chance [B, T] of having halted by every exit point but the
    last, if anything halts (both only when asked for by ``output_exits``); auxiliary_loss: scalar, what the variant's
    own parts add to the training loss, None if they add nothing; cache: one slot a step.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    exit_depth: Tensor | None = None
    exit_signals: Tensor | None = None
    zero_attention: tuple[Tensor, ...] | None = None
    exit_logits: tuple[Tensor, ...] | None = None
    halting: tuple[Tensor, ...] | None = None
    auxiliary_loss: Tensor | None = None
    cache: Cache | None = None


@dataclass
class Walk:
    """The state of one pass.

    hidden, embedded: [B, T, D], the residual stream and the embedded tokens; positions: [B or 1, T]; before: [B, T, D],
    the stream at the start of the last cycle; zero_attention: [B, H, T] by step depth, as far as seen; memory: what the
    variant's recurrence keeps from cycle to cycle, and under ``halting`` the chance [B, T] of having halted by the end
    of the last cycle, if anything halts; losses: scalars that parts add to the training loss; active: [B, T], the
    tokens whose state may still change, None for all: the others are frozen and go on serving keys and values.
    """

    hidden: Tensor
    embedded: Tensor
    positions: Tensor
    context: Context
    schedule: Schedule
    before: Tensor | None = None
    zero_attention: dict[int, Tensor] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)
    active: Tensor | None = None

    def branch(self) -> Walk:
        """A copy that may go its own way from here; tensors are shared, since none is written in place."""
        own = {"zero_attention": dict(self.zero_attention), "memory": dict(self.memory), "losses": list(self.losses)}
        found = copy.copy(self)
        vars(found).update(own)
        return found

    def advance(self, hidden: Tensor) -> None:
        """Take the new states [B, T, D] of the active tokens."""
        self.hidden = hidden if self.active is None else torch.where(self.active.unsqueeze(-1), hidden, self.hidden)

    def select(self, rows: Tensor) -> Walk:
        """The sequences ``rows`` [N] alone, without a cache and without the losses, which are of the whole batch."""
        found = self.each(lambda tensor: tensor[rows])
        context = self.context
        visible = None if context.visible is None else context.visible[rows]
        turn = (
            None
            if context.rotation is None
            else (_rows_of(context.rotation[0], rows), _rows_of(context.rotation[1], rows))
        )
        found.context = replace(context, visible=visible, rotation=turn, cache=None)
        found.positions = _rows_of(self.positions, rows)
        return found

    @staticmethod
    def join(parts: Sequence[Walk], rows: Tensor) -> Walk:
        """The sequences ``rows`` [N] of several states behind one another, to look at. It cannot be walked on."""
        found = copy.copy(parts[0])
        for name in ("hidden", "embedded", "before"):
            setattr(found, name, torch.cat([getattr(part, name) for part in parts]))
        for name in ("memory", "zero_attention"):
            of = {key: torch.cat([getattr(part, name)[key] for part in parts]) for key in getattr(found, name)}
            setattr(found, name, of)
        found.active = None
        return found.each(lambda tensor: tensor[rows])

    def last(self) -> Walk:
        """The last token of every sequence alone, to look at: [B, 1, D]. It cannot be walked on."""
        found = self.each(lambda tensor: tensor[:, -1:])
        found.zero_attention = {depth: p0[..., -1:] for depth, p0 in self.zero_attention.items()}
        return found

    def each(self, change: Callable[[Tensor], Tensor]) -> Walk:
        """A copy with the tensors [B, T, ...] changed, without the losses; the context and the positions stay."""
        found = copy.copy(self)
        found.hidden, found.embedded = change(self.hidden), change(self.embedded)
        found.memory = {name: change(tensor) for name, tensor in self.memory.items()}
        found.zero_attention = {depth: change(p0) for depth, p0 in self.zero_attention.items()}
        found.active = None if self.active is None else change(self.active)
        found.before = None if self.before is None else change(self.before)
        found.losses = []
        return found

    def signal(self, steps: Iterable[Step]) -> Tensor | None:
        """Zero attention of each sequence [B], averaged over the steps, heads and queries; None if no step has any."""
        seen = [self.zero_attention[step.depth] for step in steps if step.depth in self.zero_attention]
        return torch.stack([p0.mean((1, 2)) for p0 in seen]).mean(0) if seen else None


RunSteps = Callable[[Iterable[Step], Walk], Any]  # runs steps of the schedule on a state, in place


class Exits(Protocol):
    """How a model leaves early when it is not training (see ``bench.exits.generation``)."""

    def forward(
        self,
        lm: CycleForCausalLM,
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


class CycleForCausalLM(_Installed, PreTrainedModel, GenerationMixin):
    """A causal language model whose blocks run in the order its variant's schedule says."""

    config_class = CycleConfig
    base_model_prefix = ""
    _tied_weights_keys = {"lm_head.weight": "tokens.weight"}  # noqa: RUF012 (declared by transformers)
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True
    supports_gradient_checkpointing = True  # of the cycles
    _input_embed_layer = "tokens"

    def __init__(self, config: CycleConfig) -> None:
        super().__init__(config)
        self.model_shape = model = config.model
        self.variant = variant = config.build_variant()
        self.schedule = schedule = variant.schedule(model)
        self.tokens = nn.Embedding(config.vocab_size, model.d_model)
        learned = model.family == "gpt2"
        self.positions = nn.Embedding(config.max_position_embeddings, model.d_model) if learned else None
        self.dropout = nn.Dropout(model.dropout)
        self.blocks = nn.ModuleList(Block(model) for _ in range(schedule.n_blocks))
        self.prefix = variant.attention_prefix(model, schedule)
        self.adapter = variant.adapter(model, schedule)
        self.recurrence = variant.recurrence(model, schedule)
        self.gate = variant.gate(model, schedule)
        self.halting = HaltingGate(model.d_model) if model.halting == "gate" else None
        self.norm = make_norm(model)
        self.lm_head = nn.Linear(model.d_model, config.vocab_size, bias=False)
        self.gradient_checkpointing = False  # set, with its function, by transformers or by the training loop
        self._gradient_checkpointing_func: Callable[..., Any] = partial(checkpoint, use_reentrant=False)
        self.exits: Exits | None = None  # how sequences leave early, if they do (not part of what is saved)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The LM head (its weight is the embedding's when they are tied)."""
        return self.lm_head

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """Called by ``generate`` before passes with a static cache: the model wants the mask [B, S] as it is."""
        return attention_mask

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Small init (Nguyen & Salazar 2019: std sqrt(2 / 5D)); what writes into the residual stream is scaled by
        1 / sqrt(2 depth) as in GPT-2, with the effective depth, since every step adds to the stream.
        """
        std = (2 / (5 * self.model_shape.d_model)) ** 0.5
        if isinstance(module, Part):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            writes = any(module in (block.attention.out, block.mlp.out) for block in cast(list[Block], self.blocks))
            nn.init.normal_(module.weight, std=std / (2 * self.schedule.depth) ** 0.5 if writes else std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            nn.init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm):
                nn.init.zeros_(module.bias)

    @torch.no_grad()
    def reset_parameters(self, seed: int, under: tuple[str, ...] | None = None) -> None:
        """Draw all weights from the seed, each module from a stream of its own named by its path: variants that share
        a module's name and shape start from the same weights, whatever else they add. Children come before their
        parents, as in transformers, so that a part may refill its own layers. under: only in modules of these paths.
        """
        with torch.random.fork_rng(devices=[]):
            for name, module in reversed(list(self.named_modules())):
                if under is not None and not any(f"{name}.".startswith(f"{path}.") for path in under):
                    continue
                digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
                torch.manual_seed(int.from_bytes(digest[:8], "big"))
                if not (name == "lm_head" and self.model_shape.tie_embeddings):
                    self._init_weights(module)

    def schedule_at(self, n_cycles: int | None) -> Schedule:
        """The schedule with another number of cycles over the same blocks; None: the one the model was built with."""
        if n_cycles is None:
            return self.schedule
        return self.variant.schedule(self.model_shape.model_copy(update={"n_cycles": n_cycles}))

    def embed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        with_mass: bool = False,
        n_cycles: int | None = None,
    ) -> Walk:
        """The start of a pass: tokens [B, T] embedded, masks and rotary tables made once for all steps.

        attention_mask: [B, past + T], 1 for real tokens; position_ids: [B, T], from the mask or the cache by default;
        n_cycles: another number than the model was built with. Raises UserError if the variant cannot take it.
        """
        past = int(cache.get_seq_length()) if cache is not None else 0  # a tensor in a static cache
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        if position_ids is None:
            position_ids = default_positions(attention_mask, past, input_ids)
        hidden = self.tokens(input_ids)
        if self.positions is not None:
            hidden = hidden + self.positions(position_ids)
        hidden = self.dropout(hidden)
        context = self.context(hidden, past, attention_mask, position_ids, cache, with_mass)
        return Walk(hidden, hidden, position_ids, context, self.schedule_at(n_cycles))

    def context(
        self,
        hidden: Tensor,
        past: int,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        cache: Cache | None,
        with_mass: bool,
    ) -> Context:
        """What the steps share on tokens [B, T, D] that stand behind ``past`` others.

        attention_mask: [B, past + T]; position_ids: [B or 1, T].
        """
        device, length = hidden.device.type, hidden.shape[1]
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        like = hidden.new_empty(0, dtype=dtype)
        turn = rotation(position_ids, self.model_shape, dtype) if self.model_shape.family == "llama" else None
        n_prefix = self.prefix.n_tokens if self.prefix is not None else 0
        visible = None if attention_mask is None else attention_mask != 0
        return Context(length, past + length, visible, n_prefix, turn, cache, with_mass, like)

    def cycles(self, state: Walk, backward_cycles: int | None = None) -> Iterator[int]:
        """Run the prelude, then cycle after cycle on the state; yields the number of cycles done, 1, 2, ...

        backward_cycles: gradients flow through so many last cycles only (truncated backpropagation), None: all.
        """
        n_cycles = state.schedule.n_cycles
        self.start(state)
        for number in range(n_cycles):
            outside = backward_cycles is not None and number < n_cycles - backward_cycles
            with torch.set_grad_enabled(torch.is_grad_enabled() and not outside):
                if self.gradient_checkpointing and self.training and not outside:
                    self._cycle_twice(number, state)
                else:
                    self.cycle(number, state)
            yield number + 1

    def start(self, state: Walk) -> None:
        """Run what comes before the cycles on the state, in place."""
        self.walk(state.schedule.prelude, state)
        if self.recurrence is not None:
            self.recurrence.begin(state)

    def cycle(self, number: int, state: Walk, walk: RunSteps | None = None) -> None:
        """Run cycle 0, 1, ... on the state, in place. walk: how its steps are run, by default ``self.walk``."""
        whole = state.embedded, state.context
        state.before = state.hidden
        if self.recurrence is not None:
            self.recurrence.enter(number, state)
        (walk or self.walk)(state.schedule.cycles[number], state)
        if self.recurrence is not None:
            self.recurrence.leave(number, state)
        if self.halting is not None:
            self.halting(number, state)
        state.embedded, state.context = whole

    def _cycle_twice(self, number: int, state: Walk) -> None:
        """``cycle``, of which the backward pass keeps the state it starts from and computes the rest again."""
        before = state.branch()

        def run(hidden: Tensor) -> Walk:
            walk = before.branch()  # as it was, the second time too
            walk.hidden = hidden
            self.cycle(number, walk)
            return walk

        vars(state).update(vars(self._gradient_checkpointing_func(run, state.hidden)))

    def read_out(self, state: Walk) -> Tensor:
        """What coda and final norm make of the state [B, T, D] if the cycles end here; the state goes on unchanged,
        but for the zero attention of the coda's steps.
        """
        branch = state.branch()
        if self.recurrence is not None:
            branch.hidden = self.recurrence.output(branch)
        hidden = self.norm(self.walk(state.schedule.coda, branch).hidden)
        state.zero_attention |= branch.zero_attention
        return hidden

    def walk(self, steps: Iterable[Step], state: Walk) -> Walk:
        """Run steps of the schedule on the state, in place."""
        for step in steps:
            self._step(step, state)
        return state

    def _step(self, step: Step, state: Walk) -> None:
        block, gate, adapter, hidden = cast(Block, self.blocks[step.block]), self.gate, self.adapter, state.hidden
        if adapter is not None:
            hidden = adapter(step, hidden, state.embedded)
        x = block.norm1(hidden)
        prefix = self.prefix(step, x) if self.prefix is not None else None
        with_mass = prefix is not None and (state.context.with_mass or (gate is not None and gate.reads_zero_attention))
        update, mass = block.attention(x, step, state.context, prefix, gate, adapter, with_mass)
        if mass is not None:
            state.zero_attention[step.depth] = mass
        if gate is None:
            hidden = hidden + self.dropout(update)
            hidden = hidden + self.dropout(block.mlp(block.norm2(hidden), step, adapter))
        else:
            hidden = gate.merge(step, "attention", hidden, self.dropout(update), mass)
            update = self.dropout(block.mlp(block.norm2(hidden), step, adapter))
            hidden = gate.merge(step, "mlp", hidden, update, mass)
        state.advance(hidden)

    def keys_and_values(self, step: Step, state: Walk) -> tuple[Tensor, Tensor]:
        """What a step that is skipped would have made of the state: its keys and values [B, H_kv, T, d]."""
        block, hidden = cast(Block, self.blocks[step.block]), state.hidden
        if self.adapter is not None:
            hidden = self.adapter(step, hidden, state.embedded)
        return block.attention.keys_and_values(block.norm1(hidden), step, state.context, self.adapter)

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
        **kwargs: Any,
    ) -> CycleOutput:
        """Run the whole schedule.

        input_ids: [B, T]; labels: [B, T], shifted inside as everywhere in transformers, -100 is not scored;
        logits_to_keep: number of last positions whose logits are wanted, 0 for all; n_cycles: another number of cycles
        than the model was built with; backward_cycles: gradients flow through so many last cycles only.
        """
        if self.exits is not None and not self.training:
            return self.exits.forward(
                self, input_ids, attention_mask, position_ids, cache, bool(use_cache), logits_to_keep, n_cycles
            )
        if cache is None and use_cache:
            cache = DynamicCache()
        state = self.embed(input_ids, attention_mask, position_ids, cache, output_zero_attention, n_cycles)
        exits, halting = [], []
        for number in self.cycles(state, backward_cycles):
            if output_exits and number < state.schedule.n_cycles:
                exits.append(self.lm_head(self.read_out(state)))
                if "halting" in state.memory:
                    halting.append(state.memory["halting"])
        logits = self.lm_head(self.read_out(state)[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)
        signals = [state.signal(steps) for steps in state.schedule.cycles] if output_zero_attention else []
        return CycleOutput(
            loss=loss,
            logits=logits,
            exit_depth=torch.full((len(input_ids),), state.schedule.depth, device=input_ids.device),
            exit_signals=torch.stack([s for s in signals if s is not None], 1)
            if any(s is not None for s in signals)
            else None,
            zero_attention=tuple(state.zero_attention.values()) if output_zero_attention else None,
            exit_logits=(*exits, logits) if output_exits else None,
            halting=tuple(halting) or None,
            auxiliary_loss=torch.stack(state.losses).sum() if state.losses else None,
            cache=cache,
        )


def default_positions(attention_mask: Tensor | None, past: int, input_ids: Tensor) -> Tensor:
    """Positions [B or 1, T] of tokens [B, T] behind ``past`` others, counted over a mask's [B, past + T] real ones."""
    length = input_ids.shape[1]
    if attention_mask is not None:
        return (attention_mask.cumsum(-1) - 1).clamp_min(0)[:, -length:]
    return torch.arange(past, past + length, device=input_ids.device)[None]


def _rows_of(tensor: Tensor, rows: Tensor) -> Tensor:
    """The rows of a tensor [B or 1, ...]: one that the batch shares as it is."""
    return tensor if len(tensor) == 1 else tensor[rows]
