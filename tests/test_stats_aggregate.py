"""Aggregates over tasks, held against rliable, the implementation of the paper that defines them."""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any

import numpy as np
import pytest
from pandas.util import _decorators

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
    a, b = rng.beta([4, 2, 6], [2, 3, 1], (10, 3)), rng.beta([3, 2, 5], [2, 3, 2], (8, 3))
    return a.round(1), b.round(1)


def test_interquartile_mean_is_rliables(rliable: Any, scores: tuple[np.ndarray, np.ndarray]) -> None:
    a = scores[0]
    found = interquartile_mean(a.T)
    assert found.mean == pytest.approx(rliable.metrics.aggregate_iqm(a)) and found.n == 30
    np.random.seed(0)
    aggregate = lambda s: np.array([rliable.metrics.aggregate_iqm(s)])  # noqa: E731
    _, interval = rliable.get_interval_estimates({"a": a}, aggregate, reps=4000)
    assert (found.low, found.high) == pytest.approx(interval["a"].ravel(), abs=0.012)


def test_probability_of_improvement_is_rliables(rliable: Any, scores: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = scores
    found = probability_of_improvement(a.T, b.T)
    assert found.mean == pytest.approx(rliable.metrics.probability_of_improvement(a, b)) and found.n == 54
    np.random.seed(0)
    aggregate = lambda x, y: np.array([rliable.metrics.probability_of_improvement(x, y)])  # noqa: E731
    _, interval = rliable.get_interval_estimates({"a": [a, b]}, aggregate, reps=500)
    assert (found.low, found.high) == pytest.approx(interval["a"].ravel(), abs=0.03)
    assert probability_of_improvement(a.T, a.T).mean == rliable.metrics.probability_of_improvement(a, a) == 0.5


def test_performance_profile_is_rliables(rliable: Any, scores: tuple[np.ndarray, np.ndarray]) -> None:
    a = scores[0]
    found = performance_profile(a.T, TAU)
    np.random.seed(0)
    profile, interval = rliable.create_performance_profile({"a": a}, TAU)
    np.testing.assert_allclose(found.share, profile["a"])
    np.testing.assert_allclose([found.low, found.high], interval["a"], atol=0.04)  # one run is 0.033
    assert found.n == 30


def test_tasks_may_have_different_numbers_of_runs() -> None:
    tasks = [np.array([0.1, 0.2, 0.3, 0.9]), np.array([0.5, 0.6])]
    assert interquartile_mean(tasks).mean == pytest.approx(np.mean([0.2, 0.3, 0.5, 0.6]))  # sorted: 1 off each end
    assert performance_profile(tasks, 0.25).share == pytest.approx([(0.5 + 1) / 2])
    better = probability_of_improvement(tasks, [np.array([0.15]), np.array([0.5, 0.7])])
    assert better.mean == pytest.approx((0.75 + (0.5 + 1 + 0 + 0) / 4) / 2)
    assert math.isnan(better.low) and better.method.startswith("none")
    with pytest.raises(ValueError, match="2 and 1 tasks"):
        probability_of_improvement(tasks, tasks[:1])


def test_interval_of_the_interquartile_mean_covers_the_truth() -> None:
    rng, times = np.random.default_rng(1), 120  # symmetric about 0.5, so that this is the interquartile mean
    found = [interquartile_mean(rng.normal(0.5, 0.1, (3, 10))) for _ in range(times)]
    rate = np.mean([i.low <= 0.5 <= i.high for i in found])
    assert abs(rate - 0.95) < 0.03 + 3 * math.sqrt(0.95 * 0.05 / times)
