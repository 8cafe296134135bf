"""Confidence intervals of a mean and of a standard deviation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

RESAMPLES = 4999
FEWEST_FOR_BCA = 8  # below, resamples of so few values cover visibly less than they say (tests/test_stats_intervals.py)


@dataclass(frozen=True)
class Interval:
    """A mean (of what, the function that made it says) with its confidence interval over n values.

    low, high: NaN where there is no interval. method: how it was made and, where that is not the usual way, why.
    """

    mean: float
    low: float
    high: float
    n: int
    method: str = "t"


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean: honest, hence wide, for the few seeds that are usual. NaN for n < 2."""
    data = np.asarray(values, dtype=float)
    n = len(data)
    mean = float(data.mean()) if n else math.nan
    if n < 2:
        return Interval(mean, math.nan, math.nan, n)
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1) * stats.sem(data, ddof=1))
    return Interval(mean, mean - half, mean + half, n)


def bca_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Bias-corrected and accelerated bootstrap interval of the mean (Efron 1987), at an expanded level.

    A resample of n values has (n-1)/n of their variance and a normal, not a t, tail: at n = 8 the plain interval covers
    87 % where it says 95 %. The level is therefore expanded so that for symmetric data the ends are those of the t
    interval: tail = Phi(-sqrt(n/(n-1)) t(n-1)) (Hesterberg 2015, The American Statistician 69(4), "expanded
    percentile"). With fewer than FEWEST_FOR_BCA values, or values that are all equal, it is the t interval and
    ``method`` says why. Seeded: equal values give an equal interval.
    """
    data = np.asarray(values, dtype=float)
    fallback = mean_interval(data, confidence)
    n = fallback.n
    if n < FEWEST_FOR_BCA:
        return Interval(fallback.mean, fallback.low, fallback.high, n, f"t: fewer than {FEWEST_FOR_BCA} values")
    if not has_spread(data):
        return Interval(fallback.mean, fallback.low, fallback.high, n, "t: all values equal")
    tail = stats.norm.sf(math.sqrt(n / (n - 1)) * stats.t.ppf((1 + confidence) / 2, n - 1))
    found = stats.bootstrap(
        (data,),
        np.mean,
        confidence_level=float(1 - 2 * tail),
        n_resamples=RESAMPLES,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    if not math.isfinite(found.low) or not math.isfinite(found.high):
        return Interval(fallback.mean, fallback.low, fallback.high, n, "t: BCa is degenerate")
    return Interval(fallback.mean, float(found.low), float(found.high), n, "BCa")


def sd_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Standard deviation (ddof = 1, as ``mean``) with its chi-squared interval for normal values. NaN for n < 2."""
    data = np.asarray(values, dtype=float)
    n = len(data)
    if n < 2:
        return Interval(math.nan, math.nan, math.nan, n, "chi-squared")
    sd = float(data.std(ddof=1))
    low, high = (
        sd * math.sqrt((n - 1) / stats.chi2.ppf(q, n - 1)) for q in ((1 + confidence) / 2, (1 - confidence) / 2)
    )
    return Interval(sd, low, high, n, "chi-squared")


def has_spread(data: np.ndarray) -> bool:
    """Whether values differ by more than rounding."""
    return bool(np.ptp(data) > 1e-12 * np.abs(data).max(initial=0.0))
