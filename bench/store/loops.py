"""Whether a loop holds beyond the cycles it was trained with, told by what is stored of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bench.store.records import LoopPoint, Record

GROWN = 2.0  # times the norm after the trained cycles: beyond it a state is none that the coda has learned to read


def divergence(points: Sequence[LoopPoint], trained: int) -> str | None:
    """What is to be said of a loop that does not hold beyond its trained cycles, in a line; None if it does.

    It does not where the state's norm, after the last cycle, is not finite or ``GROWN`` times that after the trained
    cycles, or where the last cycle changes the state more, relative to it, than the last trained one and the map's
    spectral radius there is above 1.
    """
    last, known = points[-1], points[min(trained, len(points)) - 1]
    grown = not _number(last.state_norm) <= GROWN * _number(known.state_norm)
    moves = _number(last.relative_change) > _number(known.relative_change)
    if not grown and not (moves and _number(last.spectral_radius) > 1):
        return None
    return (
        f"the loop diverges after {last.cycle} cycles, {known.cycle} of them trained: "
        f"norm {_number(known.state_norm):.3g} -> {_number(last.state_norm):.3g}, "
        f"relative change {_number(known.relative_change):.3g} -> {_number(last.relative_change):.3g}, "
        f"spectral radius {_number(last.spectral_radius):.3g}"
    )


def record_divergence(record: Record) -> str | None:
    """``divergence`` of a finished cell's loop; None, too, where nothing is known of one."""
    return divergence(record.loops, int(record.cell.model["n_cycles"])) if record.loops else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value
