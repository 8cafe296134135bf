"""Studies that add seeds until their hypotheses are decided, at looks and levels declared before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.stats.contrasts import paired
from bench.stats.intervals import Array
from bench.stats.power import attainable_level, detectable, typical_shift
from bench.stats.verdicts import SIGNIFICANT, Contrast, Outcome, Verdict, equivalence_level, outcome_of, p_values

STUDIES = 1000  # simulated to tell what to expect


@dataclass(frozen=True)
class Looks:
    """When a deciding study looks at its data, and which share of alpha each look spends.

    A hypothesis that is still open is tested at look k at level alpha x share_k / m, m the number of all hypotheses of
    the study, decided or not. **Guarantee**: whatever the true differences and however the hypotheses depend on each
    other, the probability that the study ever gives a wrong verdict is at most alpha x the sum of shares. Wrong are:
    "supported" where the true difference is at most the margin; "refuted" where it is at least the margin;
    "equivalent" where it is not within the bounds; for a claim "same", "supported" where it is not within the bounds
    and "refuted" where it is. That holds because, for one hypothesis at one look at level a (each side of the
    difference is tested at a / 2, each side of equivalence at a, and the bounds are wider than the margin),

    - where the truth is the margin, both "supported" and "refuted" are wrong: 2 x a / 2; "equivalent" is right;
    - where it is elsewhere within the bounds, one of them is wrong: a / 2;
    - where it is at or above the upper bound, "refuted" and "equivalent" are wrong, but both need the one-sided test
      against that bound at level a; below the lower bound likewise;
    - "same" within the bounds: "refuted" is wrong, 2 x a / 2; outside of them "supported" is: a;

    and the levels of all looks and hypotheses are simply added up. The tests are exact for differences that lie
    symmetrically about their centre, as those of two equal variants do for every kind of noise.

    The default shares: the first look is worth it only to a study with one hypothesis, which needs 0.157 there to show
    anything with 8 pairs; most is spent at 24 pairs, where equal variants should end (up to 6 hypotheses do so in 90 %
    of the cases where the bounds are one sd of the differences), and at the last, which gives the power. Raises
    ValueError for looks that do not rise or shares that spend more than alpha.
    """

    pairs: tuple[int, ...] = (8, 12, 16, 24, 32, 48)
    shares: tuple[float, ...] = (0.16, 0.08, 0.12, 0.28, 0.12, 0.24)
    alpha: float = SIGNIFICANT

    def __post_init__(self) -> None:
        if not self.pairs or self.pairs[0] < 1 or any(b <= a for a, b in zip(self.pairs, self.pairs[1:], strict=False)):
            raise ValueError(f"looks {self.pairs} must be numbers of pairs that rise")
        if len(self.shares) != len(self.pairs) or min(self.shares) <= 0 or sum(self.shares) > 1 + 1e-9:
            raise ValueError(f"shares {self.shares} must be one above 0 for each look, at most 1 together")
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha = {self.alpha:g} must be between 0 and 1")

    def levels(self, family: int) -> tuple[float, ...]:
        """The level of one hypothesis of a family at each look; 0 at the first looks, if so few pairs can show nothing.

        What these would spend is divided among the others in proportion to their shares. This depends on the design
        alone, never on data.
        """
        whole = sum(self.shares)
        for first, pairs in enumerate(self.pairs):
            rest = sum(self.shares[first:])
            levels = [self.alpha * share * whole / rest / family for share in self.shares[first:]]
            if attainable_level(pairs, levels[0]) > 0:
                return (0.0,) * first + tuple(levels)
        return (0.0,) * len(self.pairs)

    def earliest(self, family: int) -> int | None:
        """The number of pairs of the first look that can decide a hypothesis of a family; None if none can."""
        return next((n for n, level in zip(self.pairs, self.levels(family), strict=True) if level > 0), None)


@dataclass(frozen=True)
class Decision:
    """Where a hypothesis of a deciding study stands.

    verdict: of the first ``pairs`` pairs; its p-values are to be compared with alpha, for all looks and hypotheses.
    pairs: those of the look that decided it, else of the last look reached; 0 before the first. further: pairs
    expected to be needed until it is decided or the last look is reached; 0 if closed. following: pairs of the next
    look, None if closed.
    """

    verdict: Verdict
    pairs: int
    further: float
    following: int | None

    @property
    def open(self) -> bool:
        """Whether a later look may still decide it."""
        return self.verdict.verdict == "open"


@dataclass(frozen=True)
class Outlook:
    """What to expect of a hypothesis: the probability of each verdict, and the mean number of pairs until it is given
    or the last look is reached.
    """

    supported: float
    refuted: float
    equivalent: float
    inconclusive: float
    pairs: float


def replay(family: Sequence[Contrast], looks: Looks) -> list[Decision]:
    """Where each hypothesis of a study stands, by taking its looks one after the other.

    A look needs all of its first n pairs and sees no others: it waits where one of them is NaN, so that it gives the
    same verdict whenever and in whatever order seeds are run. The first look that decides is final.
    """
    levels = looks.levels(max(1, len(family)))
    return [decide(contrast, looks, levels) for contrast in family]


def decide(contrast: Contrast, looks: Looks, levels: Sequence[float]) -> Decision:
    """``replay`` for one hypothesis with its level at each look."""
    missing = np.isnan(contrast.differences)
    have = int(missing.argmax()) if missing.any() else len(missing)
    reached, level = 0, 0.0
    for reached, level in _reached(looks, levels, have):
        seen = contrast.first(reached)
        found, tests = paired(seen.differences, margin=contrast.margin), p_values(seen)
        outcome = outcome_of(seen, tests, found, (tests.differs < level, tests.equal < level))
        if outcome != "inconclusive":
            return Decision(_verdict(contrast, reached, level, looks, outcome, "decided"), reached, 0.0, None)
    last = looks.pairs[-1]
    if have >= last or not any(levels):
        why = "not decided" if any(levels) else f"{last} pairs can decide nothing in so large a family"
        return Decision(_verdict(contrast, reached, level, looks, "inconclusive", why), reached, 0.0, None)
    further = max(1.0, _further(contrast, have, looks, levels))
    following = next(n for n, level in zip(looks.pairs, levels, strict=True) if n > have and level > 0)
    waits = f", waits for pair {have + 1}" if missing.any() else ""
    note = f"next look at {following} pairs{waits}; about {further:.0f} further pairs expected"
    return Decision(_verdict(contrast, reached, level, looks, "open", note), reached, further, following)


def expected(contrast: Contrast, looks: Looks, family: int, effect: float, sd: float) -> Outlook:
    """What to expect of a hypothesis before it has data, by simulating STUDIES with normal differences.

    Args:
        contrast: the claim; its differences do not matter.
        looks: of the study.
        family: number of the study's hypotheses.
        effect: true mean difference.
        sd: standard deviation of the differences.
    """
    noise = np.random.default_rng(0).normal(size=(STUDIES, looks.pairs[-1]))
    ended, outcomes = _simulate(contrast, looks, looks.levels(family), effect + sd * noise, 0)
    supported, refuted, equivalent, inconclusive = (float((outcomes == index).mean()) for index in range(4))
    return Outlook(supported, refuted, equivalent, inconclusive, float(ended.mean()))


def _reached(looks: Looks, levels: Sequence[float], have: int) -> list[tuple[int, float]]:
    """The looks that ``have`` pairs allow and that can decide something, with their levels."""
    return [(n, level) for n, level in zip(looks.pairs, levels, strict=True) if n <= have and level > 0]


def _verdict(contrast: Contrast, pairs: int, level: float, looks: Looks, outcome: Outcome, note: str) -> Verdict:
    """A verdict on the first pairs, tested at a level. Without a look yet (0 pairs) its p-values are 1."""
    seen = contrast.first(pairs)
    found, tests = paired(seen.differences, margin=contrast.margin), p_values(seen)
    scale = looks.alpha / level if level else 1.0
    differs, equal = (raw if math.isnan(raw) else min(1.0, raw * scale) for raw in (tests.differs, tests.equal))
    smallest = detectable(found.sd, pairs, level) if pairs else math.nan
    at = f"{note} at {pairs} pairs" if pairs and outcome != "open" else note
    return Verdict(outcome, found, differs, equal, smallest, None, at)


def _further(contrast: Contrast, have: int, looks: Looks, levels: Sequence[float]) -> float:
    """Expected further pairs, given those there are: the rest is drawn from what these say about mean and sd (normal
    differences, no prior). Without two pairs, all that are left.
    """
    seen = contrast.differences[:have]
    if have < 2:
        return float(looks.pairs[-1] - have)
    rng = np.random.default_rng(0)
    sd = seen.std(ddof=1) * np.sqrt((have - 1) / rng.chisquare(have - 1, size=(STUDIES, 1)))
    mean = seen.mean() + sd / math.sqrt(have) * rng.normal(size=(STUDIES, 1))
    rest = mean + sd * rng.normal(size=(STUDIES, looks.pairs[-1] - have))
    data = np.concatenate([np.tile(seen, (STUDIES, 1)), rest], axis=1)
    return float(_simulate(contrast, looks, levels, data, have)[0].mean() - have)


def _simulate(contrast: Contrast, looks: Looks, levels: Sequence[float], data: Array, have: int) -> tuple[Array, Array]:
    """Pairs [R] at which simulated studies [R, last look] end, and their outcomes [R]: 0 supported, 1 refuted, 2
    equivalent, 3 inconclusive. Looks up to ``have`` are past. The interval is not asked; equivalence is tested at a
    level that answers for it. None is foreseen where runs did not reach the score that the claim is of.
    """
    ended, outcomes = np.full(len(data), float(looks.pairs[-1])), np.full(len(data), 3)
    upper = contrast.margin if contrast.kind == "better" else contrast.within or 0.0
    lower = contrast.margin if contrast.kind == "better" else -upper
    for pairs, level in _reached(looks, levels, looks.pairs[-1]):
        going = np.flatnonzero(outcomes == 3)
        if pairs <= have or not len(going):
            continue
        some = data[going, :pairs]
        # a test is significant where the differences could still be shifted towards its hypothesis
        found = np.full(len(going), 3)
        if contrast.within is not None and not contrast.stopped:
            equally = equivalence_level(level)
            equal = (typical_shift(some, equally) < contrast.within) & (typical_shift(-some, equally) < contrast.within)
            found[equal] = 0 if contrast.kind == "same" else 2
        above, below = typical_shift(some, level / 2) < -upper, typical_shift(-some, level / 2) < lower
        found[above] = 0 if contrast.kind == "better" else 1
        found[below] = 1
        outcomes[going], ended[going[found != 3]] = found, pairs
    return ended, outcomes
