"""What the seeds say about a claim: supported, refuted, equivalent or inconclusive."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from bench.stats.contrasts import Paired, equivalence_p, paired, sign_flip_tails
from bench.stats.intervals import Array, interval
from bench.stats.power import (
    MOST_SEEDS,
    attainable_level,
    detectable,
    seeds_for_equivalence,
    seeds_needed,
)

SIGNIFICANT = 0.05
DIGITS = 12  # behind the point, of a difference: below them is the rounding of the scores, which must decide nothing
Outcome = Literal["supported", "refuted", "equivalent", "inconclusive", "open"]
"""Open: a later look of a deciding study may still decide it."""


@dataclass(frozen=True)
class Contrast:
    """Paired differences [n] of a claim, to ``DIGITS``, in the order of the seeds; NaN: a pair that is not there (yet).

    kind: "better": the mean difference is above ``margin`` (positive is as claimed); "same": it is within -within and
    within. within: bounds of what counts as no difference, above the margin; a claim of kind "better" that has them may
    end as equivalent. planned: pairs that should be there; failed: those without a difference because a cell failed.
    least, most: between which the true difference of a pair lies, where costs are cut off at the smaller training of
    the pair (``restricted``); infinite where a run did not reach the score that its cost is of. By default as is seen.
    Raises ValueError for an infinite difference, and for bounds that are missing or not above the margin.
    """

    differences: Array
    margin: float = 0.0
    within: float | None = None
    kind: Literal["better", "same"] = "better"
    planned: int = 0
    failed: int = 0
    least: Array | None = None
    most: Array | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "differences", np.round(self.differences, DIGITS))
        if np.isinf(self.differences).any():
            raise ValueError("an infinite difference cannot be tested")
        if self.kind == "same" and (self.within is None or self.margin):
            raise ValueError("a claim of kind 'same' has bounds (within) and no margin")
        if self.within is not None and not self.within > self.margin:
            # else a difference of exactly the margin could be in error twice: see Looks
            raise ValueError(f"within = {self.within:g} must be above the margin of {self.margin:g}")

    def first(self, pairs: int) -> Contrast:
        """The contrast of the first pairs alone."""
        least, most = (None if one is None else one[:pairs] for one in (self.least, self.most))
        return replace(self, differences=self.differences[:pairs], least=least, most=most)

    @property
    def stopped(self) -> bool:
        """Whether a pair may lie beyond the bounds though what is seen of it does not."""
        assert self.within is not None
        (upper, lower), seen = self.extremes(), present(self)
        beyond = (upper >= self.within) & (seen < self.within) | (lower <= -self.within) & (seen > -self.within)
        return bool(beyond.any())

    def extremes(self) -> tuple[Array, Array]:
        """The differences that are there as they speak least for equivalence: to be held against the upper bound, and
        against the lower. A pair that may differ by any amount counts as one at the bound, if it is not seen beyond.
        """
        assert self.within is not None
        there, seen = ~np.isnan(self.differences), present(self)
        least, most = (seen if one is None else one[there] for one in (self.least, self.most))
        upper = np.maximum(seen, np.where(np.isinf(most), self.within, most))
        lower = np.minimum(seen, np.where(np.isinf(least), -self.within, least))
        return upper, lower


class PValues(NamedTuple):
    """p-values of a contrast: that the difference lies above, below (each one-sided), and within its bounds.

    Above and below the margin for the kind "better"; above ``within`` and below -within for "same". equal: NaN without
    bounds.
    """

    above: float
    below: float
    equal: float

    @property
    def differs(self) -> float:
        """Two-sided p of the difference."""
        return min(1.0, 2 * min(self.above, self.below))


@dataclass(frozen=True)
class Verdict:
    """A verdict with the numbers that say so.

    p_corrected, p_equivalent: of the difference (beyond the margin, or beyond the bounds of a claim "same") and of
    equivalence (NaN without bounds), corrected for the family; detectable: the smallest effect beyond the margin that
    so many pairs show with power 0.8 at the first step of the correction (alpha / family); seeds: of an inconclusive
    verdict, the fewest pairs that decide it at that level with power 0.8 if mean and sd stay as they are, None if more
    than MOST_SEEDS, unknown, or no more than there are; note: plain words.
    """

    verdict: Outcome
    found: Paired
    p_corrected: float
    p_equivalent: float
    detectable: float
    seeds: int | None
    note: str


def judge(family: Sequence[Contrast]) -> list[Verdict]:
    """A verdict for every contrast of a family, corrected for all of them, those without data included.

    For studies whose number of seeds was fixed before; those that add seeds by what they see use ``replay``. The
    correction is Holm's (1979), for the two tests of a claim in Shaffer's (1986, S2) form: see ``step_down``.
    """
    tests = [p_values(contrast) for contrast in family]
    corrected = step_down([(each.differs, each.equal) for each in tests])
    return [
        verdict_of(contrast, each, (float(differs), float(equal)), len(family))
        for contrast, each, (differs, equal) in zip(family, tests, corrected, strict=True)
    ]


def present(contrast: Contrast) -> Array:
    """The differences that are there."""
    return contrast.differences[~np.isnan(contrast.differences)]


def p_values(contrast: Contrast) -> PValues:
    """The sign-flip tests of a contrast, on the pairs that are there."""
    differences, upper, lower = present(contrast), contrast.margin, contrast.margin
    if contrast.kind == "same":
        assert contrast.within is not None
        upper, lower = contrast.within, -contrast.within
    above, below = sign_flip_tails(differences - upper)[0], sign_flip_tails(differences - lower)[1]
    equal = math.nan
    if contrast.within is not None:
        upper_ends, lower_ends = contrast.extremes()
        equal = equivalence_p(upper_ends, contrast.within, lower_ends)
    return PValues(above, below, equal)


def inside(contrast: Contrast) -> bool:
    """Whether the 95 % interval lies within the bounds, taken as it speaks least for that."""
    if contrast.within is None:
        return False
    upper, lower = (interval(data) for data in contrast.extremes())
    return upper.kind == "interval" and -contrast.within < lower.low and upper.high < contrast.within


def step_down(p: Sequence[tuple[float, float]]) -> Array:
    """p-values [m, 2] of m claims, of their difference and of their equivalence (NaN: not tested), corrected.

    A claim's two null hypotheses (the difference is the margin; it lies outside of the bounds) are never both true. So
    at each step p is multiplied by the number of claims that still have a hypothesis which is not rejected (Shaffer
    1986, S2): the family-wise error is at most alpha where the result is below alpha, whatever the dependence. With one
    test a claim it is Holm's correction.
    """
    raw = np.asarray(p, dtype=float).reshape(-1, 2)
    corrected, least = np.full(raw.shape, math.nan), 0.0
    left = ~np.isnan(raw)
    for index in np.argsort(raw, axis=None, kind="stable")[: int(left.sum())]:  # NaN are last
        claim, which = np.unravel_index(index, raw.shape)
        least = max(least, min(1.0, float(raw[claim, which]) * int(left.any(axis=1).sum())))
        corrected[claim, which] = least
        left[claim, which] = False
    return corrected


def verdict_of(contrast: Contrast, tests: PValues, p: tuple[float, float], family: int) -> Verdict:
    """The verdict on a contrast of a fixed design.

    Args:
        contrast: with its differences; NaN are left out.
        tests: of these differences.
        p: corrected, of the difference and of equivalence.
        family: number of contrasts corrected for.
    """
    found = paired(present(contrast), margin=contrast.margin)
    outcome = outcome_of(contrast, tests, found, (p[0] < SIGNIFICANT, p[1] < SIGNIFICANT))
    level = SIGNIFICANT / family
    smallest = detectable(found.sd, found.difference.n, level) if found.difference.n else math.nan
    seeds = _seeds(contrast, found, level) if outcome == "inconclusive" else None
    note = _note(contrast, found, p, outcome, seeds, family)
    # What so many pairs have not decided is not planned by their number.
    seeds = None if seeds is not None and seeds <= found.difference.n else seeds
    return Verdict(outcome, found, *p, smallest, seeds, note)


def outcome_of(contrast: Contrast, tests: PValues, found: Paired, significant: tuple[bool, bool]) -> Outcome:
    """The outcome, given whether the difference and the equivalence are significant after correction.

    Either also needs the 95 % interval: a difference one that lies, as a whole, beyond the margin (or beyond the
    bounds), as a mean that is one seed's doing is none; equivalence one that lies within the bounds, as one seed far
    outside of them may be what counts. A difference is looked for first: a claim of kind "better" whose difference is
    shown ends as supported or refuted even where it is within the bounds too.
    """
    gap, (differs, equal) = found.difference, significant
    if gap.kind != "interval":
        return "inconclusive"
    if differs and contrast.kind == "same" and contrast.within is not None:
        if gap.low > contrast.within or gap.high < -contrast.within:
            return "refuted"
    elif differs and tests.above < tests.below and gap.low > contrast.margin:
        return "supported"
    elif differs and tests.below < tests.above and gap.high < contrast.margin:
        return "refuted"
    if equal and inside(contrast):
        return "supported" if contrast.kind == "same" else "equivalent"
    return "inconclusive"


def equivalence_level(level: float) -> float:
    """The level to plan equivalence at: that of its tests, or that of the 95 % interval where this asks for more."""
    return min(level, SIGNIFICANT / 2)


def _note(
    contrast: Contrast, found: Paired, p: tuple[float, float], outcome: Outcome, seeds: int | None, family: int
) -> str:
    gap, notes = found.difference, []
    if gap.n < contrast.planned:
        failed = f", {contrast.failed} by a failed cell" if contrast.failed else ""
        notes.append(f"{contrast.planned - gap.n} of {contrast.planned} pairs missing{failed}")
    if contrast.kind == "better" and outcome == "refuted" and gap.low > 0:
        notes.append("better, but by less than the margin")
    if contrast.kind == "better" and outcome in ("supported", "refuted") and p[1] < SIGNIFICANT and inside(contrast):
        notes.append(f"yet the difference is within {contrast.within:g}")
    if outcome != "inconclusive" or not gap.n:
        return "; ".join(notes)
    sides = 2 if contrast.within is None else 1  # that of equivalence is one-sided
    if found.smallest_p * sides / 2 * family >= SIGNIFICANT:
        notes.append(_too_few(gap.n, found.smallest_p * sides / 2, family, sides))
    elif p[0] < SIGNIFICANT:
        edge = "margin" if contrast.kind == "better" else "bounds"
        notes.append(f"significant, but the interval reaches across the {edge}")
    elif p[1] < SIGNIFICANT:
        notes.append("equivalence is significant, but the interval reaches across the bounds")
    if contrast.within is not None and contrast.stopped:
        notes.append("runs that did not reach the score within the smaller training may differ by more than is seen")
    if gap.n > 1 and found.sd == 0:
        notes.append("all differences are equal")
    elif gap.n > 1:
        many = f"more than {MOST_SEEDS:,}" if seeds is None else f"about {seeds:,}"
        many = many if seeds is None or seeds > gap.n else f"more than these {gap.n:,}"
        notes.append(f"a study of its own with {many} pairs would decide, if mean and sd stay as they are (power 0.8)")
    return "; ".join(notes)


def _seeds(contrast: Contrast, found: Paired, level: float) -> int | None:
    """The fewest pairs that decide the contrast, one way or the other, if the truth is what is seen."""
    mean, sd, n = found.difference.mean, found.sd, found.difference.n
    if n < 2:
        return _least(2, level)
    edge = contrast.margin if contrast.kind == "better" else contrast.within or 0.0
    beyond = abs(mean - edge) if contrast.kind == "better" else abs(mean) - edge
    ways = [seeds_needed(beyond, sd, level)]
    if contrast.within is not None and not contrast.stopped:
        ways.append(seeds_for_equivalence(mean, sd, contrast.within, equivalence_level(level)))
    return min((way for way in ways if way is not None), default=None)


def _too_few(n: int, least: float, family: int, sides: int) -> str:
    """Why nothing can be significant here, however large a difference is or however small; sides: of the test."""
    if n < 2:
        return "too few seeds: one pair cannot be tested"
    times = f" x {family} comparisons" if family > 1 else ""
    return (
        f"too few seeds: p cannot go below {least:.3g}{times}"
        f"{f' = {min(1.0, least * family):.3g}' if family > 1 else ''} with {n} pairs; "
        f"{_least(n, SIGNIFICANT / family * 2 / sides)} are the least that can"
    )


def _least(n: int, level: float) -> int:
    """The fewest pairs, from n on, that can be significant at a two-sided level."""
    return next(m for m in range(n, 200) if attainable_level(m, level) > 0)
