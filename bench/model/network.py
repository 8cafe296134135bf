"""The network: shared blocks and a variant's parts, walked over in the order of its schedule. Nothing here needs
transformers, which takes as long to import as torch: ``bench.model.language_model`` makes a model of that kind of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

from bench.config import ModelConfig
from bench.errors import InputError, UserError
from bench.model import inputs
from bench.model.attention import attend
from bench.model.blocks import Block, make_norm, rotation
from bench.model.context import Context
from bench.model.forms import first_layer, judged, real_of
from bench.model.halting import HaltingGate
from bench.model.kernels import Linear
from bench.model.keys import windows
from bench.model.outcome import Outcome
from bench.model.parts import Part, gate_at
from bench.model.schedule import Schedule, Step, residual_scales
from bench.model.variant import Variant
from bench.model.walk import RunSteps, Walk, recomputed

if TYPE_CHECKING:
    from transformers.cache_utils import Cache


class Network(nn.Module):
    """Embedding, blocks, parts, norm and head of a variant at a shape."""

    variant: Variant
    model_shape: ModelConfig
    schedule: Schedule

    def __init__(
        self, variant: Variant, model: ModelConfig, vocab_size: int, positions: int, built_cycles: int | None = None
    ) -> None:
        """The arguments of ``build``."""
        super().__init__()
        self.build(variant, model, vocab_size, positions, built_cycles)
        if model.tied:
            self.lm_head.weight = self.tokens.weight

    def build(
        self, variant: Variant, model: ModelConfig, vocab_size: int, positions: int, built_cycles: int | None = None
    ) -> None:
        """Make the modules. Their order and names are those of every stored model.

        positions: the longest sequence it is made for, in tokens; built_cycles: the number of cycles that the variant's
        parts are made for, if it is not the one that runs.
        """
        self.model_shape, self.variant, self.built_cycles = model, variant, built_cycles
        self.vocab_size, self.n_positions = vocab_size, positions
        self.schedule, self._schedules = variant.schedule(model), dict[int, Schedule]()
        if built_cycles is not None:
            model = model.model_copy(update={"n_cycles": built_cycles})
        schedule = variant.schedule(model)
        strength = model.residual_scale
        self.residual_scales = None if strength is None else residual_scales(schedule, strength)
        self.tokens = first_layer(model, vocab_size)
        learned = model.family == "gpt2"
        self.positions = nn.Embedding(positions, model.d_model) if learned else None
        self.dropout = nn.Dropout(model.dropout)
        self.blocks = nn.ModuleList(Block(model) for _ in range(schedule.n_blocks))
        self.prefix = variant.attention_prefix(model, schedule)
        self.adapter = variant.adapter(model, schedule)
        self.recurrence = variant.recurrence(model, schedule)
        self.gate = variant.gate(model, schedule)
        self.routes = self.recurrence is not None and self.recurrence.routes
        if model.kv != "own" and (self.routes or windows(self.adapter, schedule)):
            why = (
                "whose cycles run on different tokens" if self.routes else "whose cycles read their own and the first's"
            )
            raise UserError(f"model.kv: {model.kv!r} with {variant.name!r}, {why} (allowed: 'own')")
        self.halting = HaltingGate(model.d_model) if model.halting == "gate" else None
        self.norm = make_norm(model)
        self.lm_head = Linear(model.d_model, vocab_size, bias=False)
        self.gradient_checkpointing = False  # set, with its function, by transformers or by the training loop
        self._gradient_checkpointing_func: Callable[..., Any] = partial(checkpoint, use_reentrant=False)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Small init (Nguyen & Salazar 2019: std sqrt(2 / 5D)); what writes into the residual stream is scaled by
        1 / sqrt(2 depth) as in GPT-2, with the effective depth, since every step adds to the stream, unless the updates
        themselves are scaled (``residual_scales``).
        """
        std = (2 / (5 * self.model_shape.d_model)) ** 0.5
        if isinstance(module, Part):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            writes = any(module in (block.attention.out, block.mlp.out) for block in cast(list[Block], self.blocks))
            smaller = writes and self.residual_scales is None
            nn.init.normal_(module.weight, std=std / (2 * self.schedule.depth) ** 0.5 if smaller else std)
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
        # torch.manual_seed keeps a traceback for every other kind of device: milliseconds, and memory for good.
        reseed = torch.default_generator.manual_seed if self.device.type in ("cpu", "meta") else torch.manual_seed
        with torch.random.fork_rng(devices=[]):
            for name, module in reversed(list(self.named_modules())):
                if under is not None and not any(f"{name}.".startswith(f"{path}.") for path in under):
                    continue
                digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
                reseed(int.from_bytes(digest[:8], "big"))
                if not (name == "lm_head" and self.model_shape.tied):
                    self._init_weights(module)

    def check_cycles(self, name: str, n_cycles: int | None) -> None:
        """Raises InputError for cycles, asked for under a name, of a variant that has none and would not run them."""
        if not self.variant.cycled and n_cycles not in (None, 1) and not inputs.traced():
            raise InputError(f"{name}: {n_cycles!r} with {self.variant.name!r}, which has no cycles (allowed: 1)")

    def schedule_at(self, n_cycles: int | None) -> Schedule:
        """The schedule with another number of cycles over the same blocks; None: the one the model was built with."""
        if n_cycles is None:
            return self.schedule
        inputs.check_whole("n_cycles", n_cycles, 1)
        self._make_schedule(n_cycles)
        return self._schedules[n_cycles]

    def _make_schedule(self, n_cycles: int) -> None:
        if n_cycles not in self._schedules:
            model = self.model_shape.model_copy(update={"n_cycles": n_cycles})
            self._schedules[n_cycles] = self.variant.schedule(model)

    # torch.compile cannot look into the making, but at what is made. This is what torch.compiler.assume_constant_result
    # does, which imports the whole compiler for it.
    vars(_make_schedule)["_dynamo_marked_constant"] = True

    def embed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        with_mass: bool = False,
        n_cycles: int | None = None,
    ) -> Walk:
        """The start of a pass: tokens [B, T], or vectors [B, T, F], embedded, masks and rotary tables made once for all
        steps.

        Args:
            attention_mask: [B, past + T], 1 for real tokens; or [B or 1, H or 1, T, past + T], which token sees which,
                true or false, or what is added to the scores.
            position_ids: [B, T], from the mask or the cache by default. Where they do not go on, another document
                begins, and a token sees its own alone (``documents_of``).
            n_cycles: another number than the model was built with.

        Raises:
            UserError: if the variant cannot take it.
            InputError: for a position that is not learned, a mask of another form, or a cache filled with other cycles.
        """
        past = int(cache.get_seq_length()) if cache is not None else 0  # a tensor in a static cache
        schedule = self.schedule_at(n_cycles)
        if cache is not None:
            inputs.fit_cache(cache, self.variant, self.model_shape, schedule, past, windows(self.adapter, schedule))
        batch, length = input_ids.shape[:2]
        real, pairs = inputs.masks_of(attention_mask, batch, self.model_shape.n_heads, length, past + length)
        input_ids, real = real_of(input_ids, real, self.model_shape.form)
        if self.positions is not None:
            inputs.check_positions(position_ids, real, past + input_ids.shape[1], self.n_positions)
        documents = None
        if position_ids is None:
            position_ids = inputs.default_positions(real, past, input_ids)
        elif pairs is None:
            documents = inputs.packed(position_ids, real, past, cache)
        hidden = self.tokens(input_ids).to(self.tokens.weight.dtype)  # under autocast a projection has another
        if self.positions is not None:
            hidden = hidden + self.positions(position_ids)
        hidden = self.dropout(hidden)
        context = self.context(hidden, past, real, position_ids, cache, with_mass, documents, pairs)
        return Walk(hidden, hidden, position_ids, context, schedule, real=None if real is None else real[:, past:] != 0)

    def context(
        self,
        hidden: Tensor,
        past: int,
        real: Tensor | None,
        position_ids: Tensor,
        cache: Cache | None,
        with_mass: bool,
        documents: Tensor | None = None,
        pairs: Tensor | None = None,
    ) -> Context:
        """What the steps share on tokens [B, T, D] that stand behind ``past`` others.

        real: [B, past + T], 1 for real tokens; position_ids: [B or 1, T]; documents, pairs: as in ``Context``.
        """
        device, length = hidden.device.type, hidden.shape[1]
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        like = hidden.new_empty(0, dtype=dtype)
        turn = rotation(position_ids, self.model_shape, dtype) if self.model_shape.family == "llama" else None
        n_prefix = self.prefix.n_tokens if self.prefix is not None else 0
        visible = None if real is None else real != 0
        pairs = None if pairs is None else inputs.added_scores(pairs, dtype)
        causal = self.model_shape.form.attention == "causal"
        how, total = attend if causal else partial(attend, causal=False), past + length
        given = (length, total, visible, n_prefix, turn, cache, with_mass, like, how, how, documents, pairs, causal)
        return Context(*given)

    def cycles(
        self, state: Walk, backward_cycles: int | None = None, sequence_cycles: Tensor | None = None
    ) -> Iterator[int]:
        """Run the prelude, then cycle after cycle on the state; yields the number of cycles done, 1, 2, ...

        backward_cycles: gradients flow through so many last cycles only (truncated backpropagation), None: all.
        sequence_cycles: [B], how many each sequence runs: the first ones, with ``backward_cycles`` the last ones.
        """
        n_cycles = state.schedule.n_cycles
        self.start(state)
        for number in range(n_cycles):
            outside = backward_cycles is not None and number < n_cycles - backward_cycles
            before = state.branch()
            with torch.set_grad_enabled(torch.is_grad_enabled() and not outside):
                if self.gradient_checkpointing and self.training and not outside and state.context.cache is None:
                    recomputed(state, partial(self.cycle, number), self._gradient_checkpointing_func)
                else:
                    self.cycle(number, state)
                if sequence_cycles is not None:
                    at = number if backward_cycles is None else n_cycles - 1 - number
                    state.hold(before, sequence_cycles > at)
            if self.recurrence is not None and number + 1 == n_cycles:
                self.recurrence.end(state)
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
            state.common = self.recurrence.common(number, state)
        (walk or self.walk)(state.schedule.cycles[number], state)
        if self.recurrence is not None:
            self.recurrence.leave(number, state)
        if self.halting is not None:
            self.halting(number, state)
        state.embedded, state.context, state.common = *whole, None

    def read_out(self, state: Walk) -> Tensor:
        """What coda and final norm make of the state if the cycles end here, [B, T, D] or, of what is judged once,
        [B, 1, D]; the state goes on unchanged, but for the zero attention of the coda's steps.
        """
        branch = state.branch()
        if self.recurrence is not None:
            branch.hidden = self.recurrence.output(branch)
        hidden = self.norm(self.walk(state.schedule.coda, branch).hidden)
        state.zero_attention |= branch.zero_attention
        return judged(hidden, state.real, self.model_shape.form)

    def walk(self, steps: Iterable[Step], state: Walk) -> Walk:
        """Run steps of the schedule on the state, in place."""
        for step in steps:
            self._step(step, state)
        return state

    def _step(self, step: Step, state: Walk) -> None:
        scale = None if self.residual_scales is None else self.residual_scales[step.block]
        gate = gate_at(self.gate, step)
        state.advance(self.blocks[step.block](step, state, self.prefix, self.adapter, gate, scale))

    def keys_and_values(self, step: Step, state: Walk) -> tuple[Tensor, Tensor]:
        """What a step that is skipped would have made of the state: its keys and values [B, H_kv, T, d]."""
        block, hidden = cast(Block, self.blocks[step.block]), state.hidden
        if state.common is None and self.recurrence is not None:
            state = state.branch()
            state.common = self.recurrence.common(step.cycle, state)
        if self.adapter is not None:
            hidden = self.adapter(step, hidden, state.embedded)
        x = block.normed(step, "attention", hidden, state, self.adapter)
        return block.attention.keys_and_values(x, step, state, self.adapter)

    def forward(self, *args: Any, **inputs: Any) -> Any:
        """``run``, with its arguments."""
        return self.run(*args, **inputs)

    def run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        logits_to_keep: int = 0,
        output_zero_attention: bool = False,
        output_exits: bool = False,
        n_cycles: int | None = None,
        backward_cycles: int | None = None,
        sequence_cycles: Tensor | None = None,
        shortcut: tuple[int, ...] | None = None,
    ) -> Outcome:
        """Run the whole schedule.

        Args:
            input_ids: tokens [B, T], or vectors [B, T, F].
            attention_mask: [B, past + T], 1 for real tokens.
            position_ids: [B, T], from the mask or the cache by default.
            cache: keys and values of earlier tokens, a slot a step.
            logits_to_keep: number of last positions whose logits are wanted, 0 for all.
            output_zero_attention: whether the zero attention is read.
            output_exits: whether coda and head run at every exit point.
            n_cycles: another number of cycles than the model was built with.
            backward_cycles: gradients flow through so many last cycles only.
            sequence_cycles: [B], how many of the cycles each sequence runs (see ``cycles``); without a cache.
            shortcut: a second pass of so many cycles, with the lengths of their steps (``Walk.way``), is run as well.
        """
        inputs.check_whole("logits_to_keep", logits_to_keep, 0)
        inputs.check_whole("backward_cycles", backward_cycles, 0)
        if sequence_cycles is not None:
            inputs.check_own_cycles("sequence_cycles", self.variant, self.model_shape, self.schedule, self.routes)
            inputs.check_counts(sequence_cycles, len(input_ids), self.schedule_at(n_cycles), cache)
        state = self.embed(input_ids, attention_mask, position_ids, cache, output_zero_attention, n_cycles)
        exits, halting = [], []
        for number in self.cycles(state, backward_cycles, sequence_cycles):
            if output_exits and number < state.schedule.n_cycles:
                exits.append(self.lm_head(self.read_out(state)))
                if "halting" in state.memory:
                    halting.append(judged(state.memory["halting"], state.real, self.model_shape.form))
        hidden, second = self.read_out(state), None
        logits = self.lm_head(hidden[:, -logits_to_keep:])
        if shortcut is not None:
            short = self.embed(input_ids, attention_mask, position_ids, n_cycles=len(shortcut))
            short.way = shortcut
            for _ in self.cycles(short):
                pass
            near = self.read_out(short)
            second = self.lm_head(near), mse_loss(near.float(), hidden.detach().float())
        signals = [state.signal(steps) for steps in state.schedule.cycles] if output_zero_attention else []
        seen = [signal for signal in signals if signal is not None]
        return Outcome(
            logits=logits,
            exit_depth=inputs.depths(state.schedule, sequence_cycles, input_ids),
            exit_signals=torch.stack(seen, 1) if seen else None,
            zero_attention=tuple(state.zero_attention.values()) if output_zero_attention else None,
            exit_logits=(*exits, logits) if output_exits else None,
            halting=tuple(halting) or None,
            auxiliary_loss=torch.stack(state.losses).sum() if state.losses else None,
            shortcut=second,
        )
