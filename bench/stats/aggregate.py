"""One number over several tasks (Agarwal et al. 2021, arXiv 2108.13264).

Scores are [T, n]: a row a task, a column a seed, NaN where a seed has no score on a task. They are normalised so that
tasks can be put together. The paper resamples runs of each task by themselves; here a seed is the unit, with all of its
tasks, since a seed's scores on several tasks are not independent. Its intervals cover 72 to 90 % of what they should at
2 to 10 seeds, those here 92 to 98 % from 5 on (tests/test_stats_aggregate.py); below there is none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from bench.stats.intervals import (
    FEWEST_FOR_INTERVAL,
    Array,
    Bounds,
    Interval,
    jackknife,
    over_seeds,
    share_ends,
)


@dataclass(frozen=True)
class Profile:
    """Share of runs with a score above each tau [K] and its pointwise interval; n: seeds that have every task.

    low, high: NaN for n < FEWEST_FOR_INTERVAL.
    """

    tau: Array
    share: Array
    low: Array
    high: Array
    n: int


def interquartile_mean(scores: ArrayLike, bounds: Bounds = None) -> Interval:
    """Mean of the middle half of all runs on all tasks (their section 4.3), for scores [T, n]. NaN without any."""
    return over_seeds(_middle, scores, bounds)


def probability_of_improvement(a: ArrayLike, b: ArrayLike) -> Interval:
    """P(a run of a beats a run of b), ties counting half, averaged over the tasks (their section 4.3).

    a, b: scores [T, n] of the same seeds on the same tasks; every run of a is compared with every run of b on its task.
    Raises ValueError if their shapes differ.
    """
    one, other = (np.asarray(scores, dtype=float) for scores in (a, b))
    if one.shape != other.shape:
        raise ValueError(f"scores of shapes {one.shape} and {other.shape} cannot be paired")
    both = np.concatenate([one, other])
    share, pseudo = jackknife(_improvement, both)
    n = len(pseudo)
    if n < FEWEST_FOR_INTERVAL or not np.isfinite(pseudo).all():
        return Interval(float(share), math.nan, math.nan, n, "none")
    low, high = share_ends(share, pseudo)
    return Interval(float(share), float(low), float(high), n, "interval")


def performance_profile(scores: ArrayLike, tau: ArrayLike) -> Profile:
    """Share of the runs [T, n] above each tau, tasks weighing alike: the run-score distribution (their section 4.2)."""
    data, taus = np.asarray(scores, dtype=float), np.atleast_1d(np.asarray(tau, dtype=float))

    def above(some: Array) -> Array:
        runs = np.isfinite(some).sum(axis=1)[:, None]
        # tasks weigh alike, as in a full matrix, also where some have fewer runs
        return np.asarray(np.mean((some[:, :, None] > taus).sum(axis=1) / np.where(runs, runs, math.nan), axis=0))

    share, pseudo = jackknife(above, data)
    n = len(pseudo)
    if n < FEWEST_FOR_INTERVAL or not np.isfinite(pseudo).all():
        return Profile(taus, share, np.full(len(taus), math.nan), np.full(len(taus), math.nan), n)
    return Profile(taus, share, *share_ends(share, pseudo), n)


def _middle(scores: Array) -> Array:
    """``scipy.stats.trim_mean`` at a quarter of the finite of scores [..., T, n]."""
    runs = np.sort(scores.reshape(*scores.shape[:-2], -1), axis=-1)  # NaN last
    count = np.isfinite(runs).sum(axis=-1, keepdims=True)
    place, off = np.arange(runs.shape[-1]), count // 4
    kept = (place >= off) & (place < count - off)
    total = np.where(kept, runs, 0.0).sum(axis=-1)
    return np.divide(total, kept.sum(axis=-1), out=np.full(total.shape, math.nan), where=kept.any(axis=-1))


def _improvement(both: Array) -> Array:
    """The probability for both [2T, n]: the rows of a, then those of b."""
    one, other = np.split(both, 2)
    gap = one[:, :, None] - other[:, None, :]
    known = np.isfinite(gap).sum(axis=(1, 2))
    won = (gap > 0).sum(axis=(1, 2)) + (gap == 0).sum(axis=(1, 2)) / 2
    return np.asarray(np.mean(won / np.where(known, known, math.nan))) if len(one) else np.asarray(math.nan)
