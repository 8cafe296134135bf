"""One policy for intervals: of a mean, of a statistic over seeds, of a share; and of a standard deviation.

Below FEWEST_FOR_INTERVAL values there is no interval: the values' own range is told instead. From there on it is one
whose real coverage was measured (``COVERAGE``), since no method covers exactly 95 % for every kind of data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bench.stats.distributions import chi_square_above, normal_below, student_quantile

Array = NDArray[np.float64]
Bounds = tuple[float, float] | None
CONFIDENCE = 0.95
FEWEST_FOR_INTERVAL = 5
RESAMPLES = 1000

# Measured coverage of ``interval`` by the kind of data and the number of values (SIZES), 100,000 samples of each:
# tests/test_stats_intervals.py draws them, measures them again and says how.
SIZES = (5, 8, 10, 16, 20)
COVERAGE: dict[str, tuple[float, ...]] = {
    "normal": (0.967, 0.963, 0.961, 0.958, 0.956),
    "exponential": (0.937, 0.946, 0.950, 0.955, 0.958),
    "lognormal, sd of log 0.5": (0.947, 0.947, 0.950, 0.952, 0.954),
    "lognormal, sd of log 1": (0.904, 0.913, 0.919, 0.930, 0.934),
    "beta(9, 1)": (0.946, 0.952, 0.955, 0.960, 0.961),
    "beta(20, 0.5)": (0.918, 0.944, 0.949, 0.957, 0.960),
    "share of 50, p = 0.9": (0.970, 0.962, 0.961, 0.958, 0.956),
}


@dataclass(frozen=True)
class Interval:
    """A number (of what, the function that made it says) over n values or seeds, with what is known of its ends.

    kind: "interval": low and high are the ends of a 95 % confidence interval; "range": there are too few values for
    one, low and high are the least and the greatest of them; "none": nothing can be said, low and high are NaN.
    """

    mean: float
    low: float
    high: float
    n: int
    kind: Literal["interval", "range", "none"]


def interval(values: ArrayLike, bounds: Bounds = None) -> Interval:
    """The mean of n values with its 95 % interval; their range where n < FEWEST_FOR_INTERVAL.

    The interval is the wider, at each end, of Student's t interval and the t interval of Hall's transformed statistic,
    which removes the skewness (Hall 1992, JRSS B 54(1), equation 2.4). t alone covers 82 to 90 % of skewed data; Hall's
    alone does as well as a studentised bootstrap and needs no resamples; both together hold at 5 and 8 values too.
    Values that are all equal give an interval of width 0. No interval knows of failures that no seed showed: of seeds
    that fail one time in five, five show none a third of the time.

    Args:
        values: [n]; a NaN or an infinite one among them leaves nothing to say.
        bounds: the least and the greatest value the metric can have (may be infinite); the interval stays within.

    Raises:
        ValueError: a value lies outside the bounds.
    """
    data = np.asarray(values, dtype=float)
    n = len(data)
    mean = float(data.mean()) if n else math.nan
    if not math.isfinite(mean):
        return Interval(mean, math.nan, math.nan, n, "none")
    if bounds and (data.min() < bounds[0] or data.max() > bounds[1]):
        raise ValueError(f"values from {data.min():g} to {data.max():g} are outside of {bounds[0]:g} to {bounds[1]:g}")
    if n < FEWEST_FOR_INTERVAL:
        return Interval(mean, float(data.min()), float(data.max()), n, "range")
    low, high = mean_ends(data) if has_spread(data) else (mean, mean)
    return _within(mean, float(low), float(high), n, bounds)


def mean_ends(data: Array) -> tuple[Array, Array]:
    """The ends [...] of the interval of the mean of data [..., n], whose values are not all equal."""
    n = data.shape[-1]
    mean, sd = data.mean(axis=-1), data.std(axis=-1, ddof=1)
    standard = (data - mean[..., None]) / np.where(sd > 0, sd, 1.0)[..., None]  # 0 where squares underflow
    skewness = n / ((n - 1) * (n - 2)) * (standard**3).sum(axis=-1)  # scipy.stats.skew(bias=False), many times faster
    skewness = np.where(np.abs(skewness) < 1e-6, 1e-6, skewness)  # the transformation's limit at 0 is t itself
    t = student_quantile(n - 1, (1 + CONFIDENCE) / 2) / math.sqrt(n)

    def hall(quantile: float) -> Array:
        """(mean - truth) / sd at which the transformed statistic is the quantile."""
        return np.asarray(3 / skewness * (np.cbrt(1 + skewness * (quantile - skewness / (6 * n))) - 1))

    return mean - sd * np.maximum(t, hall(t)), mean + sd * np.maximum(t, -hall(-t))


def coverage(n: int) -> float:
    """The measured coverage of ``interval`` with n values for the kind of data that it covers worst.

    Of the greatest measured size up to n. NaN below FEWEST_FOR_INTERVAL, where there is no interval.
    """
    measured = [index for index, size in enumerate(SIZES) if size <= n]
    return min(row[measured[-1]] for row in COVERAGE.values()) if measured else math.nan


def over_seeds(statistic: Callable[[Array], Array], scores: ArrayLike, bounds: Bounds = None) -> Interval:
    """A smooth statistic of scores on several rows (tasks, configurations) with its 95 % interval over seeds.

    A seed is the unit: it is left out or drawn with all of its rows. The interval is the wider, at each end, of
    ``interval`` of the statistic's jackknife pseudo-values (Tukey 1958) and a percentile bootstrap at an expanded level
    (Hesterberg 2015, The American Statistician 69(4)). The first is right for few seeds, the second where scores lie in
    two heaps and a quartile between them. Seeded: equal scores give an equal interval.

    Args:
        statistic: maps scores [..., K, n] to [...]; it has to cope with NaN.
        scores: [K, n], a column a seed; NaN where a seed lacks a row. The interval is of the seeds that have all rows,
            whose number is told; the statistic itself is of all scores.
        bounds: as of ``interval``.
    """
    data = np.asarray(scores, dtype=float)
    estimate, pseudo = jackknife(statistic, data)
    n = len(pseudo)
    if n < FEWEST_FOR_INTERVAL or not np.isfinite(pseudo).all():
        return Interval(float(estimate), math.nan, math.nan, n, "none")
    shifted = pseudo - pseudo.mean() + estimate
    first = interval(shifted)
    drawn = np.random.default_rng(0).integers(n, size=(RESAMPLES, n))
    resampled = statistic(np.moveaxis(whole_seeds(data)[:, drawn], 0, 1))
    tail = normal_below(-math.sqrt(n / (n - 1)) * student_quantile(n - 1, (1 + CONFIDENCE) / 2))
    low, high = np.nanquantile(resampled, (tail, 1 - tail))
    return _within(float(estimate), min(first.low, float(low)), max(first.high, float(high)), n, bounds)


def share_ends(share: Array, pseudo: Array) -> tuple[Array, Array]:
    """The ends [...] of the 95 % interval of shares [...] whose pseudo-values over seeds are [n, ...].

    Wilson's (1927) interval with a t quantile and the effective sample size of Korn and Graubard (1998, Survey
    Methodology 24): share (1 - share) over the jackknife variance, and n where that is 0. So a share of 1 over few
    seeds has an interval with a width.
    """
    n = len(pseudo)
    variance, binomial = pseudo.var(axis=0, ddof=1) / n, share * (1 - share)
    known = (variance > 1e-12) & (binomial > 1e-12)
    size = np.where(known, np.divide(binomial, variance, out=np.ones_like(binomial), where=known), n)
    t = student_quantile(n - 1, (1 + CONFIDENCE) / 2)
    centre = (share + t**2 / (2 * size)) / (1 + t**2 / size)
    half = t * np.sqrt(binomial / size + t**2 / (4 * size**2)) / (1 + t**2 / size)
    return np.maximum(centre - half, 0.0), np.minimum(centre + half, 1.0)


def jackknife(statistic: Callable[[Array], Array], scores: Array) -> tuple[Array, Array]:
    """The statistic [...] of scores [K, N], and its pseudo-values [n, ...] of the n seeds that have every row: n times
    it less n - 1 times it without seed i.
    """
    estimate, seeds = np.asarray(statistic(scores)), whole_seeds(scores)
    n = seeds.shape[1]
    if n < 2:
        return estimate, np.full((n, *estimate.shape), math.nan)
    without = np.stack([statistic(np.delete(seeds, seed, axis=1)) for seed in range(n)])
    return estimate, n * np.asarray(statistic(seeds)) - (n - 1) * without


def whole_seeds(scores: Array) -> Array:
    """The columns of scores [K, N] that have every row, since a seed counts with all of its rows; none without rows."""
    return scores[:, np.isfinite(scores).all(axis=0) & (len(scores) > 0)]


def sd_interval(values: ArrayLike) -> Interval:
    """Standard deviation (ddof = 1, as ``mean``) with its chi-squared 95 % interval, right for normal values only.

    No interval for n < FEWEST_FOR_INTERVAL, NaN for n < 2.
    """
    data = np.asarray(values, dtype=float)
    n = len(data)
    sd = float(data.std(ddof=1)) if n > 1 else math.nan
    if n < FEWEST_FOR_INTERVAL or not math.isfinite(sd):
        return Interval(sd, math.nan, math.nan, n, "none")
    tails = ((1 + CONFIDENCE) / 2, (1 - CONFIDENCE) / 2)
    low, high = (sd * math.sqrt((n - 1) / chi_square_above(n - 1, 1 - q)) for q in tails)
    return Interval(sd, low, high, n, "interval")


def has_spread(data: Array) -> bool:
    """Whether values differ by more than rounding."""
    return bool(np.ptp(data) > 1e-12 * np.abs(data).max(initial=0.0))


def _within(mean: float, low: float, high: float, n: int, bounds: Bounds) -> Interval:
    least, most = bounds or (-math.inf, math.inf)
    return Interval(mean, max(low, least), min(high, most), n, "interval")
