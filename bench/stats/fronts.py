"""Pareto fronts of cost (lower is better) and score, over seeds.

A seed's points are an array [P, 2] of (cost, score); its front is the best score to be had at every cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
RESAMPLES = 2000
COSTS = 256  # more than a figure can show


@dataclass(frozen=True)
class Band:
    """The median front of n seeds: at each cost the median, low and high [C] of the score; NaN where at least half of
    the seeds (of a resample, for the ends) have no point that cheap.
    """

    cost: Array
    median: Array
    low: Array
    high: Array
    n: int


@dataclass(frozen=True)
class Dominance:
    """Share of bootstrap resamples of n seeds in which one median front dominates the other."""

    probability: float
    n: int


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


def median_front(seeds: Sequence[ArrayLike], higher_is_better: bool, confidence: float = 0.95) -> Band:
    """Median front of the seeds' points, at every cost where one rises, with a pointwise bootstrap band over seeds.

    Where they rise at more costs than ``COSTS``, at so many of them, evenly chosen: what is told there is exact.
    """
    sign = 1.0 if higher_is_better else -1.0
    grid = _grid(seeds, sign)
    grid = grid[np.unique(np.linspace(0, len(grid) - 1, COSTS).round().astype(int))]
    gains = _attained(seeds, grid, sign)
    resampled = _medians(gains, _resamples(len(gains)))
    tails = ((1 - confidence) / 2, (1 + confidence) / 2)
    low, high = np.quantile(resampled, tails, axis=0, method="inverted_cdf")  # no arithmetic on "not attained"
    ends = (low, high) if higher_is_better else (high, low)
    median, low, high = (np.where(np.isfinite(gain), sign * gain, np.nan) for gain in (np.median(gains, axis=0), *ends))
    return Band(grid, median, low, high, len(gains))


def dominance(a: Sequence[ArrayLike], b: Sequence[ArrayLike], higher_is_better: bool) -> Dominance:
    """Probability that a's median front dominates b's: nowhere worse and somewhere better, over all costs of both.

    Bootstrap over seeds, the same seeds of both: entry i of a and b must be the same seed.
    Raises ValueError if their numbers differ.
    """
    if len(a) != len(b):
        raise ValueError(f"fronts of {len(a)} and {len(b)} seeds cannot be paired")
    sign = 1.0 if higher_is_better else -1.0
    grid, drawn = _grid([*a, *b], sign), _resamples(len(a))
    mine, theirs = _attained(a, grid, sign), _attained(b, grid, sign)
    better = np.zeros(len(drawn), dtype=bool)
    for some in np.array_split(np.arange(len(grid)), -(-len(grid) // 16)):  # most resamples are out after a few costs
        one, other = _medians(mine[:, some], drawn), _medians(theirs[:, some], drawn)
        left = (one >= other).all(axis=1)
        drawn, better = drawn[left], (better | (one > other).any(axis=1))[left]
    return Dominance(float(better.sum() / RESAMPLES), len(a))


def hypervolume(points: ArrayLike, reference: tuple[float, float], higher_is_better: bool) -> float:
    """The area that points [P, 2] dominate up to the reference (highest cost, worst score), exactly.

    In units of cost x score. Points beyond the reference count nothing.
    """
    limit, worst = reference
    sign = 1.0 if higher_is_better else -1.0
    data = np.asarray(points, dtype=float).reshape(-1, 2)
    costs, gains = data[:, 0], sign * (data[:, 1] - worst)
    inside = (costs < limit) & (gains > 0)
    costs, gains = costs[inside], gains[inside]
    front = pareto_front(costs, gains, True)
    widths = np.diff(np.append(costs[front], limit))
    return float(widths @ gains[front])


def _grid(seeds: Sequence[ArrayLike], sign: float) -> Array:
    """Every cost at which a seed's front rises, rising."""
    arrays = [np.asarray(points, dtype=float) for points in seeds]
    return np.unique(np.concatenate([data[pareto_front(data[:, 0], sign * data[:, 1], True), 0] for data in arrays]))


def _attained(seeds: Sequence[ArrayLike], grid: Array, sign: float) -> Array:
    """Best gain [n, C] of each seed among its points of at most each cost; -inf where it has none."""
    gains = np.full((len(seeds), len(grid)), -np.inf)
    for row, points in zip(gains, seeds, strict=True):
        data = np.asarray(points, dtype=float)
        front = data[pareto_front(data[:, 0], sign * data[:, 1], True)]
        below = np.searchsorted(front[:, 0], grid, side="right")  # how many of its points each cost affords
        row[below > 0] = sign * front[below[below > 0] - 1, 1]
    return gains


@lru_cache(maxsize=8)
def _resamples(n: int) -> NDArray[np.int32]:
    """How often each of n seeds is drawn, [R, n]; not to be changed."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.int32)


def _medians(gains: Array, drawn: NDArray[np.int32]) -> Array:
    """Median [R, C] over the seeds of each resample: from sums over the sorted seeds, which costs a fifth of selecting
    the middle of every resample.
    """
    n = len(gains)
    medians = np.empty((len(drawn), gains.shape[1]))
    for column, median in zip(gains.T, medians.T, strict=True):
        order = np.argsort(column)
        up_to = drawn[:, order].cumsum(axis=1, dtype=np.int32)
        low, high = (column[order][(up_to <= place).sum(axis=1)] for place in ((n - 1) // 2, n // 2))
        median[:] = (low + high) / 2
    return medians
