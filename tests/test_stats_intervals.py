"""Intervals: against scipy, and against data whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bench.stats import FEWEST_FOR_BCA, Interval, bca_interval, mean_interval, sd_interval

VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=12)
Make = Callable[..., Interval]


def coverage(make: Make, draw: Callable[[], np.ndarray], truth: float, times: int) -> float:
    found = [make(draw()) for _ in range(times)]
    return float(np.mean([i.low <= truth <= i.high for i in found]))


@given(VALUES)
def test_interval_is_students(values: list[float]) -> None:
    found = mean_interval(values)
    mean, sem = np.mean(values), np.std(values, ddof=1) / math.sqrt(len(values))
    if sem > 1e-9:
        expected = stats.t.interval(0.95, len(values) - 1, loc=mean, scale=sem)
        assert (found.low, found.high) == pytest.approx(expected)
    assert found.n == len(values) and found.mean == pytest.approx(mean)


@pytest.mark.parametrize("make", [mean_interval, bca_interval, sd_interval])
def test_one_value_or_none_has_no_interval(make: Make) -> None:
    for values in ([3.0], []):
        found = make(values)
        assert math.isnan(found.low) and math.isnan(found.high) and found.n == len(values)
    assert mean_interval([3.0]).mean == 3.0 and math.isnan(mean_interval([]).mean)


def test_t_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    rate = coverage(mean_interval, lambda: rng.normal(5, 2, 4), 5, 2000)
    assert abs(rate - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


@pytest.mark.parametrize("n", [FEWEST_FOR_BCA, 20])
def test_bca_interval_covers_the_truth_and_plain_bca_does_not(n: int) -> None:
    rng, times = np.random.default_rng(n), 400
    error = math.sqrt(0.95 * 0.05 / times)
    assert abs(coverage(bca_interval, lambda: rng.normal(5, 2, n), 5, times) - 0.95) < 0.015 + 3 * error
    if n == FEWEST_FOR_BCA:  # the reason for the expanded level

        def plain(values: np.ndarray) -> Interval:
            ends = stats.bootstrap((values,), np.mean, n_resamples=999, rng=rng).confidence_interval
            return Interval(0, ends.low, ends.high, n)

        assert coverage(plain, lambda: rng.normal(5, 2, n), 5, times) < 0.95 - 3 * error


def test_bca_covers_skewed_data_better_than_t() -> None:
    rng, n = np.random.default_rng(2), 10
    samples = [rng.exponential(size=n) for _ in range(300)]
    bca, t = (coverage(make, iter(samples).__next__, 1.0, 300) for make in (bca_interval, mean_interval))
    assert t < bca and abs(bca - 0.95) < 0.06


def test_bca_interval_is_scipys_at_the_expanded_level() -> None:
    values = np.random.default_rng(3).gamma(2.0, size=12)
    # Hesterberg 2015: twice Phi(-sqrt(n / (n - 1)) t) instead of twice Phi(-z)
    level = 1 - 2 * stats.norm.cdf(-math.sqrt(12 / 11) * stats.t.ppf(0.975, 11))
    expected = stats.bootstrap(
        (values,), np.mean, confidence_level=level, n_resamples=50_000, rng=np.random.default_rng(1)
    ).confidence_interval
    found = bca_interval(values)
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.03)
    assert found.method == "BCa" and found.n == 12 and found == bca_interval(values)


@pytest.mark.parametrize(
    ("values", "reason"), [([1.0, 2.0, 4.0], "fewer than 8"), ([0.1 + 0.2] * 9, "all values equal")]
)
def test_bca_falls_back_on_t_and_says_why(values: list[float], reason: str) -> None:
    found, t = bca_interval(values), mean_interval(values)
    assert reason in found.method and (found.low, found.high, found.mean) == (t.low, t.high, t.mean)


def test_interval_of_a_standard_deviation_covers_it() -> None:
    rng = np.random.default_rng(4)
    rate = coverage(sd_interval, lambda: rng.normal(0, 3, 5), 3, 2000)
    assert abs(rate - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)
    assert sd_interval([1.0, 3.0]).mean == pytest.approx(math.sqrt(2))  # ddof = 1
