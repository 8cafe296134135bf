"""Aggregates over tasks, held against rliable, the implementation of the paper that defines them."""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any

import numpy as np
import pytest
from pandas.util import _decorators
from scipy import stats

from bench.stats import interquartile_mean, performance_profile, probability_of_improvement

TAU = np.linspace(0, 1, 7)


@pytest.fixture(scope="module")
def rliable() -> Any:
    """rliable asks for an arch that predates pandas 3, whose deprecation decorator has a new first argument."""
    with pytest.MonkeyPatch.context() as patch:
        old = _decorators.deprecate_kwarg
        if "klass" in inspect.signature(old).parameters:
            patch.setattr(_decorators, "deprecate_kwarg", functools.partial(old, DeprecationWarning))
        from rliable import library, metrics
    library.metrics = metrics
    return library


@pytest.fixture
def scores() -> tuple[np.ndarray, np.ndarray]:
    """Runs of two methods on three tasks, [runs, tasks], with ties."""
    rng = np.random.default_rng(0)
    a, b = rng.beta([4, 2, 6], [2, 3, 1], (10, 3)), rng.beta([3, 2, 5], [2, 3, 2], (10, 3))
    return a.round(1), b.round(1)


def test_interquartile_mean_is_rliables(rliable: Any, scores: tuple[np.ndarray, np.ndarray]) -> None:
    a = scores[0]
    found = interquartile_mean(a.T)
    assert found.mean == pytest.approx(rliable.metrics.aggregate_iqm(a)) and found.n == 10
    np.random.seed(0)
    aggregate = lambda s: np.array([rliable.metrics.aggregate_iqm(s)])  # noqa: E731
    _, interval = rliable.get_interval_estimates({"a": a}, aggregate, reps=4000)
    low, high = interval["a"].ravel()
    assert found.low - 0.01 < low < high < found.high + 0.01  # its own, which covers too little, lies within


def test_probability_of_improvement_is_rliables(rliable: Any, scores: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = scores
    found = probability_of_improvement(a.T, b.T)
    assert found.mean == pytest.approx(rliable.metrics.probability_of_improvement(a, b)) and found.n == 10
    assert 0 < found.low < found.mean < found.high < 1
    assert probability_of_improvement(a.T, a.T).mean == rliable.metrics.probability_of_improvement(a, a) == 0.5
    with pytest.raises(ValueError, match="cannot be paired"):
        probability_of_improvement(a.T, b.T[:2])


def test_performance_profile_is_rliables(rliable: Any, scores: tuple[np.ndarray, np.ndarray]) -> None:
    a = scores[0]
    found = performance_profile(a.T, TAU)
    np.random.seed(0)
    profile, _ = rliable.create_performance_profile({"a": a}, TAU)
    np.testing.assert_allclose(found.share, profile["a"])
    assert (found.low <= found.share).all() and (found.share <= found.high).all() and found.n == 10
    assert found.low.min() >= 0 and found.high.max() <= 1 and (found.high - found.low).min() > 0.1


def test_tasks_may_lack_seeds() -> None:
    tasks = np.array([[0.1, 0.2, 0.3, 0.9], [0.5, 0.6, math.nan, math.nan]])
    assert interquartile_mean(tasks).mean == pytest.approx(np.mean([0.2, 0.3, 0.5, 0.6]))  # sorted: 1 off each end
    assert performance_profile(tasks, 0.25).share == pytest.approx([(0.5 + 1) / 2])
    other = np.array([[math.nan, 0.15, math.nan, math.nan], [0.5, 0.7, math.nan, math.nan]])
    better = probability_of_improvement(tasks, other)
    assert better.mean == pytest.approx((0.75 + (0.5 + 1 + 0 + 0) / 4) / 2)
    assert (better.kind, better.n) == ("none", 1) and math.isnan(better.low)


def test_seeds_that_a_variant_lacks_do_not_narrow_its_intervals() -> None:
    """In a study that adds seeds one variant may have many more than another."""
    rng = np.random.default_rng(0)
    few, many = rng.normal(0.5, 0.1, (2, 8)), rng.normal(0.4, 0.1, (2, 48))
    short, wide = many[:, :8], np.concatenate([few, np.full((2, 40), math.nan)], axis=1)
    assert interquartile_mean(wide) == interquartile_mean(few)
    alone, beside = probability_of_improvement(few, short), probability_of_improvement(wide, many)
    assert beside.n == 8 and beside.high - beside.low == pytest.approx(alone.high - alone.low, abs=0.1)
    assert beside.mean == pytest.approx(
        np.mean([(row[:, None] > other).mean() for row, other in zip(few, many, strict=True)])
    )
    ends = performance_profile(few, TAU), performance_profile(wide, TAU)
    assert ends[1].n == 8
    np.testing.assert_array_equal(ends[0].low, ends[1].low)


@pytest.mark.parametrize("n", [0, 1, 4])
def test_few_seeds_have_no_interval(n: int) -> None:
    data = np.random.default_rng(0).random((2, n))
    profile = performance_profile(data, TAU)
    for found in (interquartile_mean(data), probability_of_improvement(data, data)):
        assert (found.kind, found.n, math.isnan(found.mean)) == ("none", n, n == 0) and math.isnan(found.high)
    assert np.isnan(profile.low).all() and profile.n == n


def test_equal_variants_have_an_interval_with_a_width() -> None:
    data = np.ones((2, 6))
    same = probability_of_improvement(data, data)
    assert same.mean == 0.5 and same.low < 0.3 and same.high > 0.7
    apart = probability_of_improvement(data, np.zeros((2, 6)))
    assert apart.mean == apart.high == 1.0 and apart.low < 0.7
    assert interquartile_mean(data).low == interquartile_mean(data).high == 1.0


DRAWS = {
    "normal": lambda rng, size: rng.normal(0.5, 0.1, size),
    "skewed": lambda rng, size: 1 - rng.exponential(0.1, size),
    "near 1": lambda rng, size: rng.beta(9, 1, size),
    "two heaps": lambda rng, size: np.where(rng.random(size) < 0.6, rng.beta(100, 2, size), rng.beta(20, 30, size)),
}


@pytest.mark.parametrize("n", [5, 8, 10, 20])
@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.long
def test_interval_of_the_interquartile_mean_covers_the_truth(kind: str, n: int) -> None:
    rng, times, shifts = np.random.default_rng(n), 300, np.array([[0.0], [0.05], [0.1]])
    truth = stats.trim_mean((DRAWS[kind](rng, (3, 200_000)) + shifts).ravel(), 0.25)
    found = [interquartile_mean(DRAWS[kind](rng, (3, n)) + shifts) for _ in range(times)]
    rate = np.mean([each.low <= truth <= each.high for each in found])
    assert rate > 0.935 - 3 * math.sqrt(0.95 * 0.05 / times)


@pytest.mark.parametrize("n", [5, 8, 20])
@pytest.mark.parametrize("shift", [0.0, 0.1, 0.2])
def test_interval_of_the_probability_of_improvement_covers_the_truth(shift: float, n: int) -> None:
    rng, times = np.random.default_rng(n), 500
    truth = stats.norm.cdf(shift / (0.1 * math.sqrt(2)))
    data = rng.normal(0.5, 0.1, (times, 2, 2, n)) + np.array([shift, 0.0])[:, None, None]
    found = [probability_of_improvement(a, b) for a, b in data]
    rate = np.mean([each.low <= truth <= each.high for each in found])
    assert rate > 0.94 - 3 * math.sqrt(0.95 * 0.05 / times)


@pytest.mark.parametrize("n", [5, 10, 20])
def test_bands_of_a_profile_cover_the_truth(n: int) -> None:
    rng, times, taus = np.random.default_rng(n), 400, np.array([0.3, 0.5, 0.6, 0.7])
    shared = rng.normal(0, 0.07, (times, 1, n))  # what a seed does to all tasks
    found = [performance_profile(0.5 + seed + rng.normal(0, 0.07, (3, n)), taus) for seed in shared]
    truth = stats.norm.sf((taus - 0.5) / (0.07 * math.sqrt(2)))
    rates = np.mean([(each.low <= truth) & (truth <= each.high) for each in found], axis=0)
    assert (rates > 0.94 - 3 * math.sqrt(0.95 * 0.05 / times)).all()
