"""The state of one pass over a schedule."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from bench.model.context import Context, rows_of
from bench.model.schedule import Schedule, Step

FLOW = ("hidden", "embedded", "before", "zero_attention", "memory", "losses", "active")  # of a walk, in a cycle


@dataclass
class Walk:
    """The state of one pass.

    Attributes:
        hidden, embedded: [B, T, D], the residual stream and the embedded tokens.
        positions: [B or 1, T].
        before: [B, T, D], the stream at the start of the last cycle.
        zero_attention: [B, H, T] by step depth, as far as seen.
        memory: what the variant's recurrence keeps from cycle to cycle, and under ``halting`` the chance [B, T] of
            having halted by the end of the last cycle, if anything halts.
        losses: scalars that parts add to the training loss.
        active: [B, T], the tokens whose state may still change, None for all: the others are frozen and go on serving
            keys and values.
        real: [B, T], the tokens that are no padding, None for all.
        common: [B, ...], what the recurrence tells all tokens of a sequence in the cycle that runs (``common``).
        way: how long a step each cycle takes, relative to the others; None: all the same.
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
    real: Tensor | None = None
    common: Tensor | None = None
    way: tuple[int, ...] | None = None

    def branch(self) -> Walk:
        """A copy that may go its own way from here; tensors are shared, since none is written in place."""
        own = {"zero_attention": dict(self.zero_attention), "memory": dict(self.memory), "losses": list(self.losses)}
        found = copy.copy(self)
        vars(found).update(own)
        return found

    def flow(self) -> dict[str, Any]:
        """What a cycle may change: tensors, and dictionaries and lists of tensors."""
        return {name: getattr(self, name) for name in FLOW}

    def take(self, flow: dict[str, Any]) -> None:
        """Have what ``flow`` gave, of another state."""
        vars(self).update(flow)

    def advance(self, hidden: Tensor) -> None:
        """Take the new states [B, T, D] of the active tokens."""
        self.hidden = hidden if self.active is None else torch.where(self.active.unsqueeze(-1), hidden, self.hidden)

    def hold(self, before: Walk, going: Tensor) -> None:
        """Put back what sequences were ``before``, all but those that are going on [B]."""

        def held(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(going.view(-1, *[1] * (new.dim() - 1)), new, old)

        self.hidden = held(self.hidden, before.hidden)
        self.memory |= {name: held(self.memory[name], old) for name, old in before.memory.items()}
        if self.active is not None:
            self.active = held(self.active, torch.ones_like(self.active) if before.active is None else before.active)

    def select(self, rows: Tensor) -> Walk:
        """The sequences ``rows`` [N] alone, without a cache and without the losses, which are of the whole batch."""
        found = self.each(lambda tensor: tensor[rows])
        found.context = self.context.of(rows)
        found.positions = rows_of(self.positions, rows)
        found.real = None if self.real is None else rows_of(self.real, rows)
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
        """A copy with the tensors [B, T, ...] changed, without the losses and without knowing of padding; the context
        and the positions stay.
        """
        found = copy.copy(self)
        found.real = None
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
        return torch.stack([self.mean_mass(p0) for p0 in seen]).mean(0) if seen else None

    def mean_mass(self, p0: Tensor) -> Tensor:
        """Zero attention of each sequence [B] from that of its heads and tokens [B, H, T]: mean over the real ones."""
        if self.real is None:
            return p0.mean((1, 2))
        return (p0.mean(1) * self.real).sum(1) / self.real.sum(1)


def mean_of(values: Tensor, real: Tensor | None) -> Tensor:
    """Mean of values [B, T, ...] over the tokens, [...]; real: [B, T], those that are no padding, None for all."""
    if real is None:
        return values.mean() if values.dim() == 2 else values.mean((0, 1))
    return (values * real.view(*real.shape, *[1] * (values.dim() - 2))).sum((0, 1)) / real.sum()


def recomputed(state: Walk, change: Callable[[Walk], Any], checkpoint: Callable[..., Any]) -> None:
    """Change the state in place, of which the backward pass keeps what it was and computes the rest again.

    checkpoint: as torch's own, called with a function and its tensors.
    """
    before = state.branch()
    leaves, form = tree_flatten(before.flow())
    forms = []

    def run(*leaves: Any) -> tuple[Any, ...]:
        walk = before.branch()  # as it was, the second time too
        walk.take(tree_unflatten(leaves, form))
        change(walk)
        found, after = tree_flatten(walk.flow())
        forms.append(after)
        return tuple(found)

    # Tensors alone go in and out: reentrant checkpointing has no gradient for others.
    found = checkpoint(run, *leaves)
    state.take(tree_unflatten(found, forms[0]))


RunSteps = Callable[[Iterable[Step], Walk], Any]  # runs steps of the schedule on a state, in place
