"""Leaving early in generation: every sequence decides by the signal of its last token, pass by pass.

``lm.exits = EarlyExit("zero_attention", 0.3)`` makes the model's forward, hence transformers' ``generate``, leave
early; ``lm.exits = None`` undoes it. What a sequence that leaves after cycle c owes the cache is its policy's affair:

* ``recompute``: nothing, until a later token goes deeper and the missing steps of the earlier ones are computed. The
  coda then reads all tokens as they are after the same cycle, so that generation equals generation without a cache.
* ``propagate``: the state it left with is projected to keys and values by every skipped step (CALM, Schuster et al.
  2022, arXiv 2207.07061, section 3.1).
* ``share_last``, ``share_first``: a skipped step takes the keys and values of the last (first) step computed with the
  same block (Mixture-of-Recursions, Bae et al. 2025, arXiv 2507.10524, section 2.2.2, shares the first).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast, get_args

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from bench.errors import InputError, unknown
from bench.evaluate.rules import SignalWatch, get_rule
from bench.evaluate.usable import check_usable, unusable
from bench.exits.cache import Buffers, ExitCache, Rows, Window, groups
from bench.exits.execute import Threshold, numbers_of, threshold_at
from bench.exits.policy import Policy
from bench.exits.tokens import upload
from bench.model.configuration import CycleOutput
from bench.model.context import Context, rows_of
from bench.model.inputs import other_cycles, packed
from bench.model.keys import filled
from bench.model.language_model import CycleModel
from bench.model.schedule import Step
from bench.model.walk import Walk


@dataclass(frozen=True)
class EarlyExit:
    """How a model leaves early when it is not training.

    Attributes:
        rule: key of an exit rule.
        threshold: one for all exit points, or one for each.
        kv: the policy of the cache.

    Raises:
        UserError: for a rule or a policy that is not known, or a threshold that is no number.
    """

    rule: str
    threshold: Threshold
    kv: Policy = "recompute"

    def __post_init__(self) -> None:
        get_rule(self.rule)
        object.__setattr__(self, "threshold", numbers_of(self.threshold))
        if self.kv not in get_args(Policy):
            raise unknown("kv policy", self.kv, get_args(Policy))

    def check_policy(self, lm: CycleModel) -> None:
        """Raises InputError where the model's cache does not hold what the policy needs."""
        if lm.model_shape.kv == "last" and self.kv == "recompute":
            raise InputError(
                "kv: 'recompute' with model.kv = 'last', whose cache holds one cycle (allowed: share_last, propagate)"
            )

    def check(self, lm: CycleModel, n_cycles: int | None) -> None:
        """Raises UserError, before anything is generated, if the model cannot leave early like this."""
        self.check_policy(lm)
        check_usable(lm, get_rule(self.rule), n_cycles)
        threshold_at(self.threshold, 1, lm.schedule_at(n_cycles).n_cycles - 1)

    @torch.no_grad()
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
        """One pass over tokens [B, T] in which every sequence leaves where the rule says; no gradient flows.

        The arguments are those of the model. An empty cache is replaced by one that knows about exits. Raises UserError
        if the rule cannot be used with the model, InputError for a cache filled without exits or at other cycles.
        """
        if not isinstance(cache, ExitCache) and (use_cache or cache is not None):
            if cache is not None and cache.get_seq_length():
                raise InputError("cache: filled without exits, it cannot be used with them (allowed: an empty one)")
            cache = ExitCache(len(input_ids))
        run = _Pass(self, lm, input_ids, attention_mask, position_ids, cache, n_cycles)
        return run.output(logits_to_keep)


class _Pass:
    """One pass over T new tokens of B sequences. Exit point 0 is where the cycles begin, exit point c follows cycle c;
    tokens count from the cache's first; rows are sequences.
    """

    def __init__(
        self,
        exits: EarlyExit,
        lm: CycleModel,
        ids: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: ExitCache | None,
        n_cycles: int | None,
    ) -> None:
        self.exits, self.lm, self.cache, self.rule = exits, lm, cache, get_rule(exits.rule)
        exits.check_policy(lm)
        self.batch, self.length = ids.shape
        self.device = ids.device
        self.past = cache.length if cache is not None else 0
        self.total = self.past + self.length
        self.lazy = cache is not None and exits.kv == "recompute"
        # Without laziness no earlier token is ever looked at again: states are kept for this pass alone.
        self.states = cache.states if cache is not None and self.lazy else Buffers(self.batch, 1)
        self.first = 0 if self.lazy else self.past
        self.contexts: dict[tuple[tuple[int, ...], int], Context] = {}

        window = None if cache is None else Window(cache, None, self.past)
        state = lm.embed(ids, mask, positions, window, n_cycles=n_cycles)
        self.schedule, self.whole, self.mask = state.schedule, state.context, state.context.visible
        if self.mask is not None and not bool(self.mask[:, -1].all()):
            raise InputError(
                "attention_mask: padding at the end with exits, which the last token decides (allowed: on the left)"
            )
        if self.lazy and self.whole.pairs is not None:
            raise InputError(
                "attention_mask: 4 dimensions tell nothing of tokens that are computed again (allowed: 2 dimensions, "
                f"or a kv policy other than {exits.kv!r})"
            )
        if cache is not None:
            if cache.schedule not in (None, self.schedule):
                raise other_cycles(self.schedule)
            cache.schedule = self.schedule
        everyone = list(range(self.batch))
        self.contexts[tuple(everyone), self.past] = state.context
        positions = state.positions.expand(self.batch, -1)
        self.states.write(("token", "positions"), None, self.past - self.first, positions)
        self.states.write(("token", "embedded"), None, self.past - self.first, state.embedded)
        lm.start(state)
        self._save(0, everyone, self.past, state)

    def output(self, logits_to_keep: int) -> CycleOutput:
        """Run the cycles, let sequences go, read out what they leave with and settle with the cache."""
        keep = logits_to_keep or self.length
        n_cycles, inside = self.schedule.n_cycles, list(range(self.batch))
        # A row of its own for every token of every sequence: a random rule must not draw the same for all tokens.
        watch = SignalWatch([self.rule], torch.arange(self.batch, device=self.device) + self.batch * (self.total - 1))
        left = [n_cycles] * self.batch  # the cycle each sequence leaves after
        logits: list[Tensor | None] = [None] * self.batch
        for number in range(1, n_cycles + 1):
            tail = self._cycle(number, inside)
            if number == n_cycles:
                break
            read = self._read_out(number, inside, keep) if self.rule.reads_logits else None
            leaves = self._leaves(watch, tail, number, None if read is None else read[:, -1:])
            for place, row in enumerate(inside):
                if leaves[place]:
                    left[row], logits[row] = number, None if read is None else read[place]
            stay = [place for place, leaving in enumerate(leaves) if not leaving]
            if not stay:
                break
            if len(stay) < len(inside):
                watch.keep(self._index(stay))
                inside = [inside[place] for place in stay]
        waiting = [row for row in range(self.batch) if logits[row] is None]
        for number, rows in groups(waiting, left.__getitem__):
            for row, found in zip(rows, self._read_out(number, rows, keep), strict=True):
                logits[row] = found
        depth = self._index([self.schedule.depths[c - 1] for c in left])
        if self.cache is not None:
            if not self.lazy:
                for number, rows in groups(list(range(self.batch)), left.__getitem__):
                    self._fill(number, rows)
            self.cache.record(depth, self.total)
        return CycleOutput(logits=torch.stack(cast(list[Tensor], logits)), exit_depth=depth, cache=self.cache)

    def _leaves(self, watch: SignalWatch, tail: Walk, number: int, logits: Tensor | None) -> list[bool]:
        _, signals = watch.look(self.lm, tail, number, logits)
        if self.rule.key not in signals:
            raise unusable(self.lm, self.rule)
        points = self.schedule.n_cycles - 1
        signal = signals[self.rule.key][:, -1]  # of one token alone, whatever the aggregate
        return cast(list[bool], self.rule.leaves(signal, threshold_at(self.exits.threshold, number, points)).tolist())

    def _cycle(self, number: int, rows: list[int]) -> Walk:
        """Run a cycle on the rows, and on their earlier tokens that have not been through it; their last tokens."""
        tails: list[Walk] = []
        order: list[int] = []
        reads = self.rule.reads_zero_attention and number < self.schedule.n_cycles
        for start, members in self._pending(("cycle", number), rows):
            state = self._load(number - 1, members, start)
            state.context.with_mass = reads
            self.lm.cycle(number - 1, state)
            self._save(number, members, start, state)
            tails.append(state if len(state.hidden[0]) == 1 else state.last())
            order += members
        return tails[0] if len(tails) == 1 else Walk.join(tails, self._index([*map(order.index, rows)]))

    def _read_out(self, number: int, rows: list[int], keep: int) -> Tensor:
        """Logits [N, keep, V] of the rows if they leave after a cycle."""
        found: dict[int, Tensor] = {}
        for start, members in self._pending(("coda", number), rows):
            state = self._load(number, members, start).branch()
            if self.cache is not None and self.lazy:
                state.context = replace(state.context, cache=Window(self.cache, self._rows(members), start, number))
            state.context.with_mass = False
            found.update(zip(members, self.lm.lm_head(self.lm.read_out(state)[:, -keep:]), strict=True))
        return torch.stack([found[row] for row in rows])

    def _pending(self, stage: tuple[str, int], rows: list[int]) -> Iterator[tuple[int, list[int]]]:
        """The rows by the first token that has not been through a stage yet; all will have been."""
        if self.cache is None or not self.lazy:
            yield self.past, rows
            return
        done = self.cache.done.setdefault(stage, [0] * self.batch)
        for start, members in groups(rows, done.__getitem__):
            yield start, members
            for row in members:
                done[row] = self.total

    def _load(self, point: int, rows: list[int], start: int) -> Walk:
        """The state of the rows at an exit point, from token ``start`` on."""
        at, state = self.live
        if at == (point, rows, start):
            return state
        index, begin, end = self._rows(rows), start - self.first, self.total - self.first
        held = {str(n[1]): self.states.read(n, index, begin, end) for n in self.states.names() if n[0] == point}
        hidden, active = held.pop("hidden"), held.pop("active", None)
        embedded, positions = (self.states.read(("token", n), index, begin, end) for n in ("embedded", "positions"))
        context = self._context(hidden, positions, rows, start)
        return Walk(hidden, embedded, positions, context, self.schedule, memory=held, active=active)

    def _save(self, point: int, rows: list[int], start: int, state: Walk) -> None:
        """Keep the state of the rows at an exit point: at hand, and where it may be wanted in another company."""
        self.live = ((point, rows, start), state)
        if self.lazy or self.batch > 1:
            index = self._rows(rows)
            active = {} if state.active is None else {"active": state.active}
            for name, tensor in {"hidden": state.hidden, **active, **state.memory}.items():
                self.states.write((point, name), index, start - self.first, tensor)

    def _context(self, hidden: Tensor, positions: Tensor, rows: list[int], start: int) -> Context:
        index, key = self._rows(rows), (tuple(rows), start)
        if key not in self.contexts:
            mask, documents, pairs = (
                whole if index is None or whole is None else rows_of(whole, index)
                for whole in (self.mask, self.whole.documents, self.whole.pairs)
            )
            if start < self.past and self.cache is not None:
                documents = packed(positions, mask, start, self.cache) if self.cache.packed else None
            window = None if self.cache is None else Window(self.cache, index, start)
            self.contexts[key] = self.lm.context(hidden, start, mask, positions, window, False, documents, pairs)
        return self.contexts[key]

    def _fill(self, number: int, rows: list[int]) -> None:
        """Give the slots that rows leaving after a cycle have skipped keys and values for the new tokens."""
        begin, end = self.schedule.exits[number - 1], self.schedule.exits[-1]
        own = filled(self.lm.model_shape, self.schedule)
        skipped = [step for step in self.schedule.steps[begin:end] if own[step.depth]]
        if not skipped:  # those of the first cycle, or of the last that was run, are there
            return
        state = self._load(number, rows, self.past)
        window = cast(Window, state.context.cache)
        if self.exits.kv == "propagate":
            made: dict[Step | int, tuple[Tensor, Tensor]] = {}
            for step in skipped:
                # Without an adapter every cycle makes the same of a frozen state.
                kind = step.block if self.lm.adapter is None else step
                if kind not in made:
                    made[kind] = self.lm.keys_and_values(step, state)
                window.update(*made[kind], step.depth)
            return
        run, nearest = self.schedule.steps[:begin], 0 if self.exits.kv == "share_first" else -1
        sources = {block: [step.depth for step in run if step.block == block] for block in {s.block for s in skipped}}
        for block, depths in sources.items():
            window.copy(depths[nearest], (step.depth for step in skipped if step.block == block), self.total)

    def _rows(self, rows: list[int]) -> Rows:
        return None if len(rows) == self.batch else self._index(rows)

    def _index(self, rows: list[int]) -> Tensor:
        return upload(np.array(rows), self.device)
