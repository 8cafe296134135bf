"""Sharing the L blocks of a pretrained stack among fewer: which source block each new block starts from."""

from __future__ import annotations

from typing import get_args

import numpy as np

from bench.config import Sharing
from bench.errors import UserError, unknown
from bench.model.schedule import Schedule


def sources_of(sharing: Sharing | None, n_source: int, schedule: Schedule) -> list[tuple[int, ...]]:
    """For every block of the schedule the source blocks it starts from: their mean, and a fresh start if there is none.

    Blocks of the prelude and the coda start from the first and last source blocks. With b blocks between them and the
    source blocks ``first..last`` to share: ``stepwise`` round(linspace(first, last, b)), ``lower`` the first b,
    ``upper`` the last b, ``average`` the mean of those that stood where the block now runs (so that the schedule has to
    be as deep as the source), ``random`` none. Raises UserError if the numbers do not fit.
    """
    n_blocks, prelude, coda = schedule.n_blocks, schedule.n_prelude, schedule.n_coda
    if sharing is None:
        if n_blocks != n_source:
            raise UserError(
                f"model.n_blocks: {n_blocks} blocks from a source of {n_source} need sharing to be one of "
                "stepwise, lower, upper, average, random"
            )
        return [(block,) for block in range(n_blocks)]
    if n_blocks >= n_source:
        raise UserError(
            f"sharing: {sharing!r} needs fewer blocks than the source's {n_source}, not {n_blocks} (set model.n_blocks)"
        )
    first, last, count = prelude, n_source - 1 - coda, n_blocks - prelude - coda
    middle: list[tuple[int, ...]]
    if sharing == "stepwise":
        middle = [(int(block),) for block in np.round(np.linspace(first, last, count))]
    elif sharing == "lower":
        middle = [(first + block,) for block in range(count)]
    elif sharing == "upper":
        middle = [(last + 1 - count + block,) for block in range(count)]
    elif sharing == "average":
        if schedule.depth != n_source:
            raise UserError(
                f"sharing: 'average' needs a schedule as deep as the source ({n_source} steps), not {schedule.depth} "
                "(change model.n_blocks or model.n_cycles)"
            )
        middle = [
            tuple(step.depth for step in schedule.steps if step.block == block)
            for block in range(prelude, n_blocks - coda)
        ]
    elif sharing == "random":
        middle = [()] * count
    else:
        raise unknown("sharing", sharing, get_args(Sharing))
    return [
        *((block,) for block in range(prelude)),
        *middle,
        *((n_source - coda + block,) for block in range(coda)),
    ]
