"""Pareto fronts of cost (lower is better) and score, over seeds.

A seed's points are an array [P, 2] of (cost, score); its front is the best score to be had at every cost. Or they are
[P, 3], of (cost, score, chosen by): at every cost the front has the score of the affordable point that is the best by
the third column. With a validation score there and a test score before, nothing is chosen on test data; such a front
may fall.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bench.stats.distributions import binomial_up_to
from bench.stats.intervals import CONFIDENCE, FEWEST_FOR_INTERVAL, Array

RESAMPLES = 2000
COSTS = 256  # more than a figure can show


@dataclass(frozen=True)
class Band:
    """The median front of n seeds: at each cost the median, low and high [C] of the score; NaN where at least half of
    the seeds (for the ends: those that the interval of the median reaches) have no point that cheap. low and high are
    NaN at every cost for n < FEWEST_FOR_INTERVAL.
    """

    cost: Array
    median: Array
    low: Array
    high: Array
    n: int


@dataclass(frozen=True)
class Dominance:
    """Share of bootstrap resamples of n seeds in which one median front dominates the other; NaN for
    n < FEWEST_FOR_INTERVAL.
    """

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


def median_front(seeds: Sequence[ArrayLike], higher_is_better: bool) -> Band:
    """Median front of the seeds' points, at every cost where one rises, with a pointwise 95 % band over seeds.

    The band is the interval of the median between two order statistics, interpolated (Hettmansperger & Sheather 1986,
    Statistics & Probability Letters 4): it needs no resamples, holds for every kind of data, and covers 94 to 96 % at
    every n but 5, whose widest interval, the range, covers 93.75 %. Where the fronts rise at more costs than ``COSTS``,
    at so many of them, evenly chosen: what is told there is exact.
    """
    sign = 1.0 if higher_is_better else -1.0
    grid = _grid(seeds, sign)
    grid = grid[np.unique(np.linspace(0, len(grid) - 1, COSTS).round().astype(int))]
    gains = _attained(seeds, grid, sign)
    n = len(gains)
    low, high = median_ends(gains) if n >= FEWEST_FOR_INTERVAL else np.full((2, len(grid)), -np.inf)
    ends = (low, high) if higher_is_better else (high, low)
    median, low, high = (np.where(np.isfinite(gain), sign * gain, np.nan) for gain in (np.median(gains, axis=0), *ends))
    return Band(grid, median, low, high, n)


def median_ends(values: Array) -> tuple[Array, Array]:
    """The ends [...] of the 95 % interval of the median of values [n, ...], n >= FEWEST_FOR_INTERVAL."""
    ordered, n = np.sort(values, axis=0), len(values)
    # coverage from the k-th lowest to the k-th highest value (Thompson 1936)
    covers = 1 - 2 * binomial_up_to(np.arange(n // 2), n, 0.5)
    k = max(1, int((covers >= CONFIDENCE).sum()))
    weight = 0.0
    if k < len(covers) and covers[k - 1] > CONFIDENCE:
        step = (covers[k - 1] - CONFIDENCE) / (covers[k - 1] - covers[k])
        weight = (n - k) * step / (k + (n - 2 * k) * step)
    low, high = (_between(ordered[outer], ordered[inner], weight) for outer, inner in ((k - 1, k), (n - k, n - k - 1)))
    return low, high


def dominance(a: Sequence[ArrayLike], b: Sequence[ArrayLike], higher_is_better: bool) -> Dominance:
    """Probability that a's median front dominates b's: nowhere worse and somewhere better, over all costs of both.

    Bootstrap over seeds, the same seeds of both: entry i of a and b must be the same seed.
    Raises ValueError if their numbers differ.
    """
    if len(a) != len(b):
        raise ValueError(f"fronts of {len(a)} and {len(b)} seeds cannot be paired")
    if len(a) < FEWEST_FOR_INTERVAL:
        return Dominance(math.nan, len(a))
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
    """The area between the front of a seed's points and the reference (highest cost, worst score), exactly.

    In units of cost x score. What lies beyond the reference counts nothing.
    """
    limit, worst = reference
    sign = 1.0 if higher_is_better else -1.0
    front = _front(points, sign)
    front = front[front[:, 0] < limit]
    widths = np.diff(np.append(front[:, 0], limit))
    return float(widths @ np.maximum(front[:, 1] - sign * worst, 0.0)) if len(front) else 0.0


def _grid(seeds: Sequence[ArrayLike], sign: float) -> Array:
    """Every cost at which a seed's front changes, rising."""
    return np.unique(np.concatenate([_front(points, sign)[:, 0] for points in seeds]))


def _front(points: ArrayLike, sign: float) -> Array:
    """(cost, gain) [F, 2] at every cost at which the front of a seed's points changes, rising in cost."""
    data = np.asarray(points, dtype=float)
    if not data.size:
        return np.empty((0, 2))
    front = data[pareto_front(data[:, 0], sign * data[:, -1], True)]
    return np.asarray(np.stack([front[:, 0], sign * front[:, 1]], axis=1))


def _attained(seeds: Sequence[ArrayLike], grid: Array, sign: float) -> Array:
    """Gain [n, C] of each seed's front at each cost; -inf where it has no point that cheap."""
    gains = np.full((len(seeds), len(grid)), -np.inf)
    for row, points in zip(gains, seeds, strict=True):
        front = _front(points, sign)
        below = np.searchsorted(front[:, 0], grid, side="right")  # how many of its points each cost affords
        row[below > 0] = front[below[below > 0] - 1, 1]
    return gains


def _between(outer: Array, inner: Array, weight: float) -> Array:
    """(1 - weight) x outer + weight x inner; outer where it is not attained (-inf), which has no arithmetic."""
    attained = np.isfinite(outer) & np.isfinite(inner)
    return np.where(attained, (1 - weight) * outer + weight * np.where(attained, inner, 0.0), outer)


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
