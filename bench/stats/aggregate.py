"""One number over several tasks (Agarwal et al. 2021, arXiv 2108.13264).

Scores are given as one array a task, [runs], normalised so that tasks can be put together; tasks may have different
numbers of runs. Intervals are percentile intervals of the stratified bootstrap: the runs of each task are resampled by
themselves, which is what scipy's bootstrap does with several unpaired samples. The n of an interval counts runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from bench.stats.intervals import Interval

Array = NDArray[np.float64]
RESAMPLES = 2000


@dataclass(frozen=True)
class Profile:
    """Share of n runs with a score above each tau [K], with the pointwise interval."""

    tau: Array
    share: Array
    low: Array
    high: Array
    n: int


def interquartile_mean(tasks: Sequence[ArrayLike], confidence: float = 0.95) -> Interval:
    """Mean of the middle half of all runs on all tasks (their section 4.3)."""

    def statistic(*runs: Array, axis: int) -> Any:
        return stats.trim_mean(np.concatenate(runs, axis=-1), 0.25, axis=-1)

    return _stratified(tasks, statistic, confidence)


def probability_of_improvement(a: Sequence[ArrayLike], b: Sequence[ArrayLike], confidence: float = 0.95) -> Interval:
    """P(a run of a beats a run of b), ties counting half, averaged over the tasks [same order] (their section 4.3).

    By ranks (Mann and Whitney 1947): of n runs of a and m of b it is (rank sum of a - n(n+1)/2) / nm.
    Raises ValueError if a and b have different numbers of tasks.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} tasks cannot be paired")

    def statistic(*runs: Array, axis: int) -> Any:
        shares = []
        for x, y in zip(runs[: len(a)], runs[len(a) :], strict=True):
            n, m = x.shape[-1], y.shape[-1]
            ranks = stats.rankdata(np.concatenate([x, y], axis=-1), axis=-1)[..., :n]
            shares.append((ranks.sum(axis=-1) - n * (n + 1) / 2) / (n * m))
        return np.mean(shares, axis=0)

    return _stratified([*a, *b], statistic, confidence)


def performance_profile(tasks: Sequence[ArrayLike], tau: ArrayLike, confidence: float = 0.95) -> Profile:
    """Share of all runs on all tasks above each tau: the run-score distribution (their section 4.2)."""
    taus = np.atleast_1d(np.asarray(tau, dtype=float))

    def statistic(*runs: Array, axis: int) -> Any:
        # tasks weigh alike, as in a full [runs, tasks] matrix, also where some have fewer runs
        return np.mean([np.stack([(run > value).mean(axis=-1) for value in taus]) for run in runs], axis=0)

    samples = [np.asarray(runs, dtype=float) for runs in tasks]
    share = statistic(*samples, axis=-1)
    low, high = _ends(samples, statistic, confidence) or np.full((2, len(taus)), math.nan)
    return Profile(taus, share, low, high, sum(map(len, samples)))


def _stratified(tasks: Sequence[ArrayLike], statistic: Callable[..., Any], confidence: float) -> Interval:
    samples = [np.asarray(runs, dtype=float) for runs in tasks]
    n = sum(map(len, samples))
    estimate = float(statistic(*samples, axis=-1))
    ends = _ends(samples, statistic, confidence)
    if ends is None:
        return Interval(estimate, math.nan, math.nan, n, "none: a task with one run")
    return Interval(estimate, float(ends[0]), float(ends[1]), n, "stratified bootstrap")


def _ends(samples: Sequence[Array], statistic: Callable[..., Any], confidence: float) -> tuple[Array, Array] | None:
    """The ends of the interval, of the statistic's shape; None where a task has one run."""
    if min(map(len, samples)) < 2:
        return None
    found = stats.bootstrap(
        samples,
        statistic,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return np.asarray(found.low), np.asarray(found.high)
