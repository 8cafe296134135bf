"""Statistics over seeds, on scipy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval over n values; low and high are NaN for n < 2."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Paired:
    """Mean difference a - b over n pairs, its interval, and the p-value of the exact sign-flip test.

    smallest_p: the least p that so few pairs can reach; above 0.05 no difference, however large, can be significant.
    """

    difference: Interval
    p: float
    smallest_p: float


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean: honest, hence wide, for the few seeds that are usual."""
    data = np.asarray(values, dtype=float)
    mean, n = float(data.mean()), len(data)
    if n < 2:
        return Interval(mean, math.nan, math.nan, n)
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1) * stats.sem(data, ddof=1))
    return Interval(mean, mean - half, mean + half, n)


def paired(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Compare a with b, paired by seed: t interval of the mean difference and two-sided sign-flip permutation test."""
    difference = np.subtract(a, b)
    n = len(difference)
    if n < 2:
        return Paired(mean_interval(difference), 1.0, 1.0)
    found = stats.permutation_test(
        (difference,), np.mean, permutation_type="samples", n_resamples=100_000, rng=np.random.default_rng(0)
    )
    return Paired(mean_interval(difference), float(found.pvalue), min(1.0, 2.0 ** (1 - n)))


def pareto_front(cost: ArrayLike, score: ArrayLike, higher_is_better: bool) -> NDArray[np.int64]:
    """Indices of the points that no other point beats in both cost (lower is better) and score, by rising cost."""
    costs, scores = np.asarray(cost, dtype=float), np.asarray(score, dtype=float)
    gain = scores if higher_is_better else -scores
    front, best = [], -np.inf
    for index in np.lexsort((-gain, costs)):
        if gain[index] > best:
            front.append(index)
            best = gain[index]
    return np.asarray(front, dtype=np.int64)
