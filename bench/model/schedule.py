"""Which block runs when: the one place where sharing is decided; everything else reads the schedule."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.errors import UserError

MOST_STEPS = 4096  # what a model costs, and whether it can be stacked, is found out step by step


class TooDeepError(UserError):
    """A schedule of too many steps."""


@dataclass(frozen=True)
class Step:
    """One application of one block.

    Attributes:
        block: index of the block's parameters.
        cycle: which use of that block this is, 0-based.
        depth: position in the schedule, which is also the step's slot in the KV cache.
    """

    block: int
    cycle: int
    depth: int


@dataclass(frozen=True)
class Schedule:
    """The steps of a model in order, with the bounds of its recurrent part.

    Attributes:
        blocks: the block each step runs.
        n_prelude, n_coda: steps before and after the recurrent part.
        exits: for every cycle of the recurrent part the number of steps done at its end, where computation may jump to
            the coda.
        depths: for every cycle the steps that a sequence runs which leaves after it, those of the coda among them.
        first_use: for every block the depth of the first step that runs it.
        repeated: the blocks that run more than once.

    Raises:
        UserError: if there are too many steps, the parts do not fit together or a block is never used.
    """

    steps: tuple[Step, ...]
    n_prelude: int
    n_coda: int
    exits: tuple[int, ...]
    depths: tuple[int, ...] = field(init=False, repr=False, compare=False)
    first_use: dict[int, int] = field(init=False, repr=False, compare=False)
    repeated: frozenset[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Known from the start: torch.compile cannot look into a property that is made when it is asked for.
        object.__setattr__(self, "depths", tuple(exit + self.n_coda for exit in self.exits))
        object.__setattr__(self, "first_use", {step.block: step.depth for step in reversed(self.steps)})
        object.__setattr__(self, "repeated", frozenset(step.block for step in self.steps if step.cycle))
        if self.depth > MOST_STEPS:
            raise TooDeepError(
                f"schedule: {self.depth:,} steps are too many (allowed: {MOST_STEPS:,}, by fewer blocks or cycles)"
            )
        used = {step.block for step in self.steps}
        if not self.steps or used != set(range(len(used))):
            raise UserError(f"schedule: blocks {sorted(used)} must be 0..n-1 without a gap")
        if self.n_prelude < 0 or self.n_coda < 0 or self.n_prelude + self.n_coda > self.depth:
            raise UserError(f"schedule: prelude {self.n_prelude} and coda {self.n_coda} exceed depth {self.depth}")
        end = self.depth - self.n_coda
        if not self.exits or self.exits[-1] != end or list(self.exits) != sorted(set(self.exits)):
            raise UserError(f"schedule: exits {self.exits} must increase and end where the coda starts ({end})")

    @property
    def depth(self) -> int:
        """Effective depth: the number of steps."""
        return len(self.steps)

    @property
    def n_blocks(self) -> int:
        """Parameter depth: the number of different blocks."""
        return 1 + max(step.block for step in self.steps)

    @property
    def n_cycles(self) -> int:
        """Passes through the recurrent part."""
        return len(self.exits)

    @property
    def prelude(self) -> tuple[Step, ...]:
        return self.steps[: self.n_prelude]

    @property
    def recurrent(self) -> tuple[Step, ...]:
        return self.steps[self.n_prelude : self.depth - self.n_coda]

    @property
    def coda(self) -> tuple[Step, ...]:
        return self.steps[self.depth - self.n_coda :]

    @property
    def cycles(self) -> tuple[tuple[Step, ...], ...]:
        """The recurrent part, cut at the exit points: one tuple of steps for each cycle."""
        starts = (self.n_prelude, *self.exits[:-1])
        return tuple(self.steps[start:end] for start, end in zip(starts, self.exits, strict=True))

    def goes_on(self, other: Schedule) -> bool:
        """Whether it is the other with further cycles or none: up to there the same steps, and the same coda."""
        at, ours, theirs = other.exits[-1], self.coda, other.coda
        same = self.steps[:at] == other.steps[:at] and self.exits[: other.n_cycles] == other.exits
        return same and [(s.block, s.cycle) for s in ours] == [(s.block, s.cycle) for s in theirs]

    def __str__(self) -> str:
        return " ".join(str(step.block) for step in self.steps)


def residual_scales(schedule: Schedule, strength: float) -> tuple[float, ...]:
    """For every block what its updates of the residual stream are multiplied by: ``strength / (N sqrt(L))``.

    The abstract of On the Residual Scaling of Looped Transformers (arXiv 2606.18524) states it for a stack of L blocks
    that is looped N times: ``h <- h + lambda / (N sqrt(L)) f(h)``. The updates of one block hang together from use to
    use and add up N times, those of different blocks do not and add up sqrt(L) times. Then the best learning rate
    depends on L alone, and runs of different numbers of cycles can be compared at one. (The abstract and summaries of
    the paper by others are what this rests on; its sections were not at hand.)

    Choices of ours, where the loop is not the whole stack: N is counted for each block, so that it is 1 in prelude and
    coda; L counts all blocks of the model. Both updates of a block, of attention and of the MLP, are scaled alike, each
    before a gate merges it (the factor between one and two updates a block is lambda's). N is of the schedule that the
    model was built with: with fewer or more cycles at test time, or with a number drawn for every step of training, a
    block does what it has learned to do, and leaving early stays the model with fewer cycles. The weights that write
    into the stream are not made smaller by depth as well when they are drawn (``Network._init_weights``).

    strength: lambda.
    """
    uses = Counter(step.block for step in schedule.steps)
    return tuple(strength / (uses[block] * math.sqrt(schedule.n_blocks)) for block in range(schedule.n_blocks))


def build(blocks: Sequence[int], n_prelude: int = 0, n_coda: int = 0, exits: Sequence[int] = ()) -> Schedule:
    """A schedule from the block of each step; a step's cycle counts the earlier uses of its block.

    exits defaults to one, at the end of the recurrent part.
    """
    uses: dict[int, int] = {}
    steps = []
    for depth, block in enumerate(blocks):
        steps.append(Step(block, uses.get(block, 0), depth))
        uses[block] = uses.get(block, 0) + 1
    return Schedule(tuple(steps), n_prelude, n_coda, tuple(exits) or (len(steps) - n_coda,))


def stack(n_blocks: int) -> Schedule:
    """Every block once, in order: an ordinary transformer."""
    return build(range(n_blocks))


def cycle(n_blocks: int, n_cycles: int) -> Schedule:
    """All blocks in order, again and again: step i runs block ``i mod n_blocks``."""
    return middle_cycle(n_blocks, n_cycles, n_prelude=0, n_coda=0)


def sequence(n_blocks: int, n_cycles: int) -> Schedule:
    """Each block n_cycles times before the next: step i runs block ``i // n_cycles``."""
    return middle_sequence(n_blocks, n_cycles, n_prelude=0, n_coda=0)


def middle_cycle(n_blocks: int, n_cycles: int, n_prelude: int = 1, n_coda: int = 1) -> Schedule:
    """Prelude and coda blocks once, the blocks between them cycled.

    n_blocks counts all blocks with parameters, prelude and coda included.
    """
    middle = _middle(n_blocks, n_prelude, n_coda)
    exits = [n_prelude + len(middle) * (done + 1) for done in range(n_cycles)]
    return _with_ends([*middle] * n_cycles, n_blocks, n_prelude, n_coda, exits)


def middle_sequence(n_blocks: int, n_cycles: int, n_prelude: int = 1, n_coda: int = 1) -> Schedule:
    """Prelude and coda blocks once, each block between them n_cycles times in a row.

    The shared blocks are never passed as a whole before the end, so there is a single exit point.
    """
    middle = _middle(n_blocks, n_prelude, n_coda)
    return _with_ends([block for block in middle for _ in range(n_cycles)], n_blocks, n_prelude, n_coda, [])


def _middle(n_blocks: int, n_prelude: int, n_coda: int) -> range:
    if n_blocks <= n_prelude + n_coda:
        raise UserError(
            f"model.n_blocks: {n_blocks} leaves no block to cycle beside {n_prelude} prelude and {n_coda} coda blocks "
            f"(allowed: at least {n_prelude + n_coda + 1})"
        )
    return range(n_prelude, n_blocks - n_coda)


def _with_ends(middle: list[int], n_blocks: int, n_prelude: int, n_coda: int, exits: list[int]) -> Schedule:
    return build([*range(n_prelude), *middle, *range(n_blocks - n_coda, n_blocks)], n_prelude, n_coda, exits)
