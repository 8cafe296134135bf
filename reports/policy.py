"""How numbers over seeds are told: from FEWEST_FOR_INTERVAL seeds on with a 95 % interval, below with the seeds' range.

Nothing is ranked below that number of seeds. Where an interval covers less than LEAST_COVERAGE by measurement, its
caption says what it covers (``bench.stats.coverage``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bench.stats import COVERAGE, FEWEST_FOR_INTERVAL, Interval, coverage, interval
from bench.tables import counted
from reports.units import plain

LEAST_COVERAGE = 0.93
ENDS = "95 % interval"
NOTHING = Interval(math.nan, math.nan, math.nan, 0, "none")
Row = dict[str, str]
"""Of a table, as people read it: text by column."""


class Rows(list[Row]):
    """A table's rows, with what its caption says of intervals and ranges."""

    def __init__(self, rows: Iterable[Row] = (), ends: str = "") -> None:
        super().__init__(rows)
        self.ends = ends


def can_rank(*seeds: int) -> bool:
    """Whether so many seeds of each are enough to say which is better."""
    return min(seeds, default=0) >= FEWEST_FOR_INTERVAL


def titled(rows: Iterable[Row], found: Mapping[str, Sequence[Interval]]) -> Rows:
    """The rows with columns named after what their ends are, and what the caption says of them.

    found: the intervals shown, by column; the word ``ENDS`` in a column's name becomes ``heading`` of them.
    """
    names = {key: key.replace(ENDS, heading(shown)) for key, shown in found.items()}
    everything = [one for shown in found.values() for one in shown]
    return Rows(({names.get(key, key): value for key, value in row.items()} for row in rows), caption(everything))


def heading(found: Iterable[Interval]) -> str:
    """What the ends of these are, as the head of a column."""
    shown = [one for one in found if one.n]
    ranges = [one.n for one in shown if one.kind != "interval"]
    if len(ranges) < len(shown):
        return f"{ENDS} or range" if ranges else ENDS
    return f"range of {told_seeds(ranges)}" if ranges else "range"


def is_ends(column: str) -> bool:
    """Whether a column is one that ``heading`` has named."""
    return column in (ENDS, f"{ENDS} or range", "range") or column.startswith("range of ")


def caption(found: Iterable[Interval]) -> str:
    """What is to be said of the ends shown; empty if there are none."""
    shown = list(found)
    sure = sorted({one.n for one in shown if one.kind == "interval"})
    few = [one.n for one in shown if one.kind == "range" and one.n > 1]
    parts = []
    if sure:
        parts.append(
            f"Brackets: 95 % intervals over {told_seeds(sure)}, not corrected for their number{_covers(sure)}."
        )
    if few:
        parts.append(f"a to b: the range of {told_seeds(few)}, too few to tell more.")
    return " ".join(parts)


def bars(seeds: Iterable[int]) -> str:
    """``caption`` of a figure's bars and bands: drawn from FEWEST_FOR_INTERVAL seeds on. seeds: of what it shows."""
    counts = sorted(set(seeds) - {0})
    sure = [n for n in counts if can_rank(n)]
    parts = [f"Bars and bands: 95 % intervals over {told_seeds(sure)}{_covers(sure)}."] if sure else []
    few = [n for n in counts if not can_rank(n)]
    if few:
        verb = "is" if few == [1] else "are"
        parts.append(
            f"{told_seeds(few)} {verb} too few for an interval: no bars, and a band, if there is one, is their range."
        )
    return " ".join(parts)


def band(values: NDArray[np.float64], bounds: tuple[float, float] | None = None) -> tuple[list[float], list[float]]:
    """The lower and the upper ends [P] of ``interval`` at every point of curves [n, P], a row a seed."""
    found = [interval(column, bounds) for column in values.T]
    return [one.low for one in found], [one.high for one in found]


def ends(found: Interval, digits: int = 3, sign: int = 1, plus: bool = False) -> str:
    """``[low, high]`` of an interval, ``low to high`` of a range, a dash where there is neither.

    Args:
        found: with its ends.
        digits: after the point.
        sign: -1 shows the ends of the negative number.
        plus: positive ends have a sign.
    """
    if found.kind == "none" or (found.kind == "range" and found.n < 2):
        return "-"
    lower, upper = sorted((sign * found.low, sign * found.high))
    low, high = (plain(end, digits, plus) for end in (lower, upper))
    return f"[{low}, {high}]" if found.kind == "interval" else f"{low} to {high}"


def digits_of(difference: Interval) -> int:
    """Digits after the point: three, and more where all of a difference and its ends would look like none, or an end of
    an interval without 0 like 0.
    """
    low, high = difference.low, difference.high
    largest = max((abs(x) for x in (difference.mean, low, high) if math.isfinite(x)), default=0.0)
    digits = 3 if largest == 0 or largest >= 1e-3 else 1 - math.floor(math.log10(largest))
    nearest = min(abs(low), abs(high))
    if difference.kind == "interval" and low * high > 0 and nearest < 1e-3:
        digits = max(digits, -math.floor(math.log10(nearest)))
    return min(8, digits)


def told(found: Interval, digits: int = 3, plus: bool = False) -> str:
    """The number with its ends: ``0.695 [0.680, 0.710]`` or ``0.695 (0.690 to 0.700)``."""
    text, mean = ends(found, digits, plus=plus), plain(found.mean, digits, plus)
    return mean if text == "-" else f"{mean} {text}" if found.kind == "interval" else f"{mean} ({text})"


def within(found: Interval, bounds: tuple[float, float] | None) -> Interval:
    """An interval cut at the bounds of what it is of."""
    if bounds is None or found.kind == "none":
        return found
    return replace(found, low=max(found.low, bounds[0]), high=min(found.high, bounds[1]))


def told_seeds(seeds: Iterable[int]) -> str:
    """``5 seeds``, ``5 to 8 seeds``."""
    least, most = min(found := list(seeds)), max(found)
    return f"{least} to {most} seeds" if least < most else counted(most, "seed")


def _covers(seeds: Sequence[int]) -> str:
    """What intervals of so many seeds were measured to cover, where that is less than it should be."""
    share = coverage(min(seeds))
    if share >= LEAST_COVERAGE:
        return ""
    kind = min(COVERAGE, key=lambda name: COVERAGE[name])
    return f" (of {min(seeds)} seeds they cover at least {share:.1%} of the most skewed data tried, {kind})"
