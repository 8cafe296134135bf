"""Two variants compared by the seeds they share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from bench.stats.intervals import Interval, bca_interval, has_spread

FLIPS = 2**13  # sign patterns tried: all of them, hence an exact test, up to 13 pairs; a seeded sample beyond


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
    """Compare a with b, paired by seed [n]: BCa interval of the mean difference, effect size, sign-flip test.

    The test (Fisher 1935) asks whether the differences lie symmetrically about ``margin``: exact for normal or any
    other symmetric noise. p is 1 for fewer than two pairs.
    """
    difference = np.atleast_1d(np.subtract(a, b)).astype(float)
    n = len(difference)
    sd = float(difference.std(ddof=1)) if n > 1 else math.nan
    return Paired(bca_interval(difference), sign_flip_p(difference - margin), smallest_p(n), hedges_g(difference), sd)


def sign_flip_p(differences: NDArray[np.float64]) -> float:
    """Two-sided p that differences [n] lie symmetrically about zero: twice the share of sign patterns whose mean is at
    least as far out, on the rarer side. 1 for fewer than two.

    All patterns where there are at most ``FLIPS`` of them; otherwise a sample, to which what was seen belongs too
    (Phipson & Smyth 2010). ``scipy.stats.permutation_test`` says the same and takes ten times as long.
    """
    n = len(differences)
    if n < 2:
        return 1.0
    exact = 2**n <= FLIPS
    means = _signs(n) @ differences / n
    seen = differences.mean()
    near = 1e-14 * np.abs(differences).mean()  # sums of the same numbers in another order
    tails = [np.count_nonzero(side) + (not exact) for side in (means <= seen + near, means >= seen - near)]
    return float(min(1.0, 2 * min(tails) / (len(means) + (not exact))))


@lru_cache(maxsize=8)
def _signs(n: int) -> NDArray[np.float64]:
    """Sign patterns [F, n] of 1 and -1; not to be changed."""
    if 2**n <= FLIPS:
        bits = np.arange(2**n)[:, None] >> np.arange(n) & 1
    else:
        bits = np.random.default_rng(0).integers(2, size=(FLIPS, n))
    return np.where(bits, -1.0, 1.0)


def smallest_p(n: int) -> float:
    """The least two-sided p of the sign-flip test on n pairs: 2 of 2^n patterns, or 2 of the sampled ones."""
    if n < 2:
        return 1.0
    return max(2.0 ** (1 - n), 2.0 / (FLIPS + 1) if 2**n > FLIPS else 0.0)


def hedges_g(differences: ArrayLike) -> float:
    """Hedges' g of paired differences: Cohen's d_z = mean / sd (ddof = 1), times the exact small-sample correction
    J(n-1) = Gamma(m/2) / (sqrt(m/2) Gamma((m-1)/2)), m = n - 1 (Hedges 1981, equation 6e).

    NaN for n < 3, where the correction does not exist, and for differences that are all equal.
    """
    data = np.asarray(differences, dtype=float)
    m = len(data) - 1
    if m < 2 or not has_spread(data):
        return math.nan
    correction = math.exp(special.gammaln(m / 2) - special.gammaln((m - 1) / 2)) / math.sqrt(m / 2)
    return float(correction * data.mean() / data.std(ddof=1))


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """Holm's (1979) step-down correction: the family-wise error is at most alpha where the result is below alpha."""
    raw = np.asarray(p, dtype=float)
    order = np.argsort(raw, kind="stable")
    stepped = np.maximum.accumulate(raw[order] * np.arange(len(raw), 0, -1))
    corrected = np.empty_like(raw)
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected


def over_tasks(differences: ArrayLike, same_unit: bool) -> NDArray[np.float64]:
    """One difference a seed [n] from those on several tasks [T, n], so that a seed stays one observation.

    It is the plain mean over tasks where all have one unit. Otherwise each task's differences are first divided by
    their root mean square: that has no unit, gives every task the same weight, and (unlike the standard deviation) does
    not change when signs are flipped, so that the sign-flip test of the result is still exact.
    """
    data = np.asarray(differences, dtype=float)
    if not same_unit and data.size:
        scale = np.sqrt(np.mean(data**2, axis=1, keepdims=True))
        data = np.divide(data, scale, out=np.zeros_like(data), where=scale > 0)
    return np.asarray(data.mean(axis=0))
