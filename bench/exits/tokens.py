"""Leaving early for real, at token granularity: a token that leaves is frozen, and goes on serving keys and values.

A frozen token is carried on unchanged; at deeper steps its keys and values are those of the state it left with (CALM,
Schuster et al. 2022, arXiv 2207.07061, section 3.1), as with the policy ``propagate`` in generation. Queries and MLP
run for the tokens that have not left alone. The coda reads all tokens as they left; a rule that reads logits before the
cycles are over sees them as they are by then. What a recurrence does between the cycles is done for all tokens of a
sequence and undone for the frozen ones. A sequence all of whose tokens have left is dropped from the batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.model.attention import Prefix, attend, causal_mask, within
from bench.model.context import Context
from bench.model.keys import name_of, unpacked
from bench.model.network import Network
from bench.model.schedule import Step
from bench.model.walk import Walk


def upload(values: NDArray[Any], device: torch.device) -> Tensor:
    """An array on the device, without waiting for it."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)


def tokens_of(state: Walk, at: Tensor) -> Walk:
    """Tokens at [N], counted over all B T of a state, as N sequences of one token."""
    batch, length = state.hidden.shape[:2]
    found = state.branch()
    found.zero_attention = {}
    found = found.each(lambda tensor: tensor.flatten(0, 1)[at].unsqueeze(1))
    found.zero_attention = {
        depth: mass.transpose(1, 2).flatten(0, 1)[at].unsqueeze(2) for depth, mass in state.zero_attention.items()
    }
    found.positions = state.positions.expand(batch, length).flatten()[at].unsqueeze(1)
    context, turn = state.context, None
    if context.rotation is not None:
        turn = tuple(table[:, 0].expand(batch, -1, -1).flatten(0, 1)[at][:, None, None] for table in context.rotation)
    found.context = Context(1, 1, None, context.n_prefix, turn, None, context.with_mass, context.like)  # type: ignore[arg-type]
    return found


class TokenCycle:
    """A cycle run for the tokens that have not left.

    state: before the cycle, [B, T, ...]; inside: [B, T], the tokens that have not left, some of every sequence. at:
    [N], where these are among all B T.
    """

    def __init__(self, lm: Network, state: Walk, inside: NDArray[np.bool_]) -> None:
        self.lm, self.before = lm, state.branch()
        wanted = np.logical_or.accumulate(inside[:, ::-1], 1)[:, ::-1]  # up to the last that has not left
        frozen = (wanted & ~inside).ravel().nonzero()[0]
        self.all, self.any_frozen, self.counts = bool(inside.all()), len(frozen) > 0, inside.sum(1).tolist()
        # What the host knows is uploaded once a cycle, so that no step waits for the device.
        self.inside, self.at, self.frozen = (
            upload(values, state.hidden.device) for values in (inside, inside.ravel().nonzero()[0], frozen)
        )

    def run(self, number: int, state: Walk) -> None:
        """Run cycle 0, 1, ... on the state, in place."""
        if self.all:
            self.lm.cycle(number, state)
            return
        self.lm.cycle(number, state, self._walk)
        state.hidden = self._keep(state.hidden, self.before.hidden)
        state.memory |= {name: self._keep(state.memory[name], old) for name, old in self.before.memory.items()}

    def _keep(self, new: Tensor, old: Tensor) -> Tensor:
        return torch.where(self.inside.view(*self.inside.shape, *[1] * (new.dim() - 2)), new, old)

    def _walk(self, steps: Iterable[Step], state: Walk) -> None:
        frozen, own = tokens_of(self.before, self.frozen), tokens_of(state, self.at)
        if state.common is not None:
            frozen.common, own.common = (state.common[at // self.inside.shape[1]] for at in (self.frozen, self.at))
        for step in steps:
            served = self.lm.keys_and_values(step, frozen) if self.any_frozen else None
            earlier = frozen.memory.get(name_of(step)) if self.any_frozen else None
            own.context.attend = partial(self._attend, served)
            own.context.far = partial(self._attend, None if earlier is None else unpacked(earlier))
            self.lm.walk([step], own)
            if step.depth in own.zero_attention:
                mass = own.zero_attention[step.depth][..., 0]
                state.zero_attention[step.depth] = self._spread(mass, self.at).transpose(1, 2)
        state.hidden = state.hidden.flatten(0, 1).index_copy(0, self.at, own.hidden[:, 0]).view_as(state.hidden)

    def _spread(self, values: Tensor, at: Tensor, others: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """[B, T, ...] with the values [N, ...] of the tokens at [N], and others, zero elsewhere."""
        found = values.new_zeros(self.inside.numel(), *values.shape[1:])
        found[at] = values
        if others is not None:
            found[others[0]] = others[1]
        return found.view(*self.inside.shape, *values.shape[1:])

    def _attend(
        self,
        served: tuple[Tensor, Tensor] | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefix: Prefix | None,
        mask: Tensor | None,
        with_mass: bool,
        dropout: float,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """``attend`` for tokens as sequences of one, sequence by sequence: queries, keys and values [N, H, 1, d].

        served: keys and values [F, H_kv, 1, d] of the frozen tokens.
        """
        length, n_prefix = self.inside.shape[1], 0 if prefix is None else prefix[0].shape[-2]
        others = [None if of is None else (self.frozen, of[:, :, 0]) for of in served or (None, None)]
        keys, values = (
            self._spread(new[:, :, 0], self.at, old).transpose(1, 2)
            for new, old in zip((key, value), others, strict=True)
        )
        seen = causal_mask(length, length, n_prefix, query)
        if window is not None:
            seen = within(window, seen, length)
        outs, masses = [], []
        own = zip(query[:, :, 0].split(self.counts), (self.at % length).split(self.counts), strict=True)
        for row, (queries, places) in enumerate(own):
            at = None if len(queries) == length and window is None else seen[places]
            whole = queries.transpose(0, 1)[None], keys[row, None], values[row, None]
            out, mass = attend(*whole, prefix, at, with_mass, dropout)
            outs.append(out[0].transpose(0, 1))
            masses.append(None if mass is None else mass[0].transpose(0, 1))
        found = torch.cat(outs).unsqueeze(2)
        return found, torch.cat([m for m in masses if m is not None]).unsqueeze(2) if with_mass and prefix else None
