"""Two variants compared by the seeds they share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from bench.stats.distributions import log_gamma
from bench.stats.intervals import Array, Interval, has_spread, interval

FLIPS = 2**13  # up to 13 pairs every sign pattern is tried
GRID = 2**13  # steps into which the sum of the absolute differences is divided beyond that


@dataclass(frozen=True)
class Paired:
    """Mean difference over n pairs, its interval, and the p-value of the two-sided sign-flip test.

    smallest_p: the least p that so few pairs can reach; above 0.05 no difference, however large, can be significant.
    effect_size: Hedges' g of the differences (``hedges_g``); sd: their standard deviation, ddof = 1.
    """

    difference: Interval
    p: float
    smallest_p: float
    effect_size: float
    sd: float


def paired(a: ArrayLike, b: ArrayLike = 0.0, margin: float = 0.0) -> Paired:
    """Compare a with b, paired by seed [n]: interval of the mean difference, effect size, sign-flip test.

    The test (Fisher 1935) asks whether the differences lie symmetrically about ``margin``: exact for normal or any
    other symmetric noise. p is 1 for fewer than two pairs.
    """
    difference = np.atleast_1d(np.subtract(a, b)).astype(float)
    n = len(difference)
    sd = float(difference.std(ddof=1)) if n > 1 else math.nan
    return Paired(interval(difference), sign_flip_p(difference - margin), smallest_p(n), hedges_g(difference), sd)


def sign_flip_p(differences: Array) -> float:
    """Two-sided p that differences [n] lie symmetrically about zero: twice the rarer tail. 1 for fewer than two."""
    return min(1.0, 2 * min(sign_flip_tails(differences))) if len(differences) > 1 else 1.0


def sign_flip_tails(differences: Array) -> tuple[float, float]:
    """One-sided p-values that the centre of differences [n] is above zero, and that it is below it.

    Each is the share of the 2^n sign patterns whose sum is at least as far out as the one seen; 1 and 1 where n = 0 or
    a difference is NaN. Up to 13 pairs every pattern is tried (``scipy.stats.permutation_test`` says the same and takes
    ten times as long). Beyond, the absolute differences are rounded to steps of 1/GRID of their sum and the patterns
    counted by dynamic programming, as for Wilcoxon's signed ranks (Pagano & Tritchler 1983). The test stays exact,
    since the rounded differences are as symmetric as the differences, and p has no floor but 2^-n: sampled patterns
    could not reach the levels of a study with many looks.
    """
    n = len(differences)
    if n == 0 or np.isnan(differences).any():
        return 1.0, 1.0
    if 2**n > FLIPS:
        return _counted_tails(differences)
    means = _signs(n) @ differences / n
    seen = differences.mean()
    near = 1e-14 * np.abs(differences).mean()  # sums of the same numbers in another order
    return float(np.mean(means >= seen - near)), float(np.mean(means <= seen + near))


def equivalence_p(differences: Array, within: float, below: Array | None = None) -> float:
    """p of two one-sided sign-flip tests that the centre of differences [n] is between -within and within.

    The greater of the two (TOST: Schuirmann 1987), so that it is exact where each of them is. 1 for n = 0.

    below: what is held against the lower bound, [n], if that is not the same.
    """
    lower = differences if below is None else below
    return max(sign_flip_tails(lower + within)[0], sign_flip_tails(differences - within)[1])


def _counted_tails(differences: Array) -> tuple[float, float]:
    """``sign_flip_tails`` of differences [n] on the grid, by the distribution of the sum of the positive ones."""
    sizes = np.abs(differences)
    if not sizes.any():
        return 1.0, 1.0
    steps = np.rint(sizes * (GRID / sizes.sum())).astype(int)
    share = np.zeros(steps.sum() + 1)  # of the patterns, by their sum
    share[0], top = 1.0, 0
    for step in steps:
        share[: top + 1] /= 2
        share[step : top + step + 1] += share[: top + 1].copy()
        top += step
    seen = steps[differences > 0].sum()
    return min(1.0, float(share[seen:].sum())), min(1.0, float(share[: seen + 1].sum()))


@lru_cache(maxsize=8)
def _signs(n: int) -> Array:
    """All sign patterns [2^n, n] of 1 and -1; not to be changed."""
    return np.where(np.arange(2**n)[:, None] >> np.arange(n) & 1, -1.0, 1.0)


def smallest_p(n: int) -> float:
    """The least two-sided p of the sign-flip test on n pairs: 2 of 2^n patterns."""
    return 2.0 ** (1 - n) if n > 1 else 1.0


def hedges_g(differences: ArrayLike) -> float:
    """Hedges' g of paired differences: Cohen's d_z = mean / sd (ddof = 1), times the exact small-sample correction
    J(n-1) = Gamma(m/2) / (sqrt(m/2) Gamma((m-1)/2)), m = n - 1 (Hedges 1981, equation 6e).

    NaN for n < 3, where the correction does not exist, and for differences that are all equal.
    """
    data = np.asarray(differences, dtype=float)
    m = len(data) - 1
    if m < 2 or not has_spread(data):
        return math.nan
    correction = math.exp(log_gamma(m / 2) - log_gamma((m - 1) / 2)) / math.sqrt(m / 2)
    return float(correction * data.mean() / data.std(ddof=1))


def over_tasks(
    differences: ArrayLike, same_unit: bool, first: int | None = None, scaled_by: ArrayLike | None = None
) -> Array:
    """One difference a seed [n] from those on several tasks [T, n], so that a seed stays one observation.

    It is the plain mean over tasks where all have one unit. Otherwise each task's differences are first divided by
    their root mean square: that has no unit, gives every task the same weight, and (unlike the standard deviation) does
    not change when signs are flipped, so that the sign-flip test of the result is still exact.

    Args:
        differences: by task and seed.
        same_unit: of all tasks.
        first: seeds whose root mean square is taken, all by default. A study that looks at its data several times takes
            those of the first look: what a look has seen is then never changed by later seeds.
        scaled_by: other differences [T, n] whose root mean square is taken; then ``differences`` may be infinite.
    """
    data = np.asarray(differences, dtype=float)
    if not same_unit and data.size:
        by = data if scaled_by is None else np.asarray(scaled_by, dtype=float)
        scale = np.sqrt(np.mean(by[:, :first] ** 2, axis=1, keepdims=True))
        data = np.divide(data, scale, out=np.where(np.isinf(data), data, 0.0), where=scale > 0)
    return np.asarray(data.mean(axis=0))
