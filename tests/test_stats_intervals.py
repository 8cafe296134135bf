"""Intervals: against scipy, and against data whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bench.stats import COVERAGE, FEWEST_FOR_INTERVAL, SIZES, Interval, coverage, interval, over_seeds, sd_interval
from bench.stats.intervals import jackknife, mean_ends, share_ends

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
# every kind of data with its true mean
KINDS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda rng, size: rng.normal(0, 1, size), 0.0),
    "exponential": (lambda rng, size: rng.exponential(1, size), 1.0),
    "lognormal, sd of log 0.5": (lambda rng, size: rng.lognormal(0, 0.5, size), math.exp(0.125)),
    "lognormal, sd of log 1": (lambda rng, size: rng.lognormal(0, 1, size), math.exp(0.5)),
    "beta(9, 1)": (lambda rng, size: rng.beta(9, 1, size), 0.9),
    "beta(20, 0.5)": (lambda rng, size: rng.beta(20, 0.5, size), 20 / 20.5),
    "share of 50, p = 0.9": (lambda rng, size: rng.binomial(50, 0.9, size) / 50, 0.9),
}
BOUNDED = ("beta(9, 1)", "beta(20, 0.5)", "share of 50, p = 0.9")


def measured(kind: str, n: int, times: int, seed: int) -> float:
    """Share of ``times`` samples of n values whose interval holds the true mean. COVERAGE is this with 100,000 samples
    and seed 0: ``python -m tests.test_stats_intervals`` prints it.
    """
    draw, truth = KINDS[kind]
    data = draw(np.random.default_rng([seed, n, list(KINDS).index(kind)]), (times, n))
    data = data[np.ptp(data, axis=1) > 0]
    low, high = mean_ends(data)
    return float(((low <= truth) & (truth <= high)).sum() / times)


@pytest.mark.parametrize("kind", KINDS)
def test_the_coverage_told_is_the_coverage_measured(kind: str) -> None:
    times = 10_000
    for n, told in zip(SIZES, COVERAGE[kind], strict=True):
        error = math.sqrt(told * (1 - told) * (1 / times + 1 / 100_000))
        assert abs(measured(kind, n, times, 1) - told) < 4 * error + 0.0005  # told to three digits


def test_the_coverage_told_is_the_worst_kinds() -> None:
    assert coverage(8) == coverage(9) == min(row[1] for row in COVERAGE.values())
    assert coverage(1000) == min(row[-1] for row in COVERAGE.values())
    assert math.isnan(coverage(FEWEST_FOR_INTERVAL - 1))
    usual = [row for kind, row in COVERAGE.items() if kind != "lognormal, sd of log 1"]
    assert min(map(min, usual)) > 0.9 and all(0.93 < rate < 0.98 for row in usual for rate in row[1:])


@given(st.lists(st.floats(-100, 100), min_size=5, max_size=12))
def test_interval_is_never_narrower_than_students(values: list[float]) -> None:
    found, sem = interval(values), np.std(values, ddof=1) / math.sqrt(len(values))
    assert found.n == len(values) and found.mean == pytest.approx(np.mean(values)) and found.kind == "interval"
    if sem > 1e-9:
        low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=sem)
        assert found.low <= low + 1e-9 and found.high >= high - 1e-9


def test_interval_of_symmetric_values_is_students_but_for_halls_cubic_term() -> None:
    values = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    low, high = stats.t.interval(0.95, 4, scale=stats.sem(values))
    assert (interval(values).low, interval(values).high) == pytest.approx((low, high), rel=1e-4)


def test_halls_transformation_is_inverted() -> None:
    values = np.random.default_rng(0).exponential(size=10)  # skewed to the right: the upper end is Hall's
    g, found = stats.skew(values, bias=False), interval(values)
    w = (values.mean() - found.high) / values.std(ddof=1)
    transformed = w + g * w**2 / 3 + g**2 * w**3 / 27 + g / 60  # Hall 1992, equation 2.4
    assert math.sqrt(10) * transformed == pytest.approx(stats.t.ppf(0.025, 9))
    mirrored = interval(-values)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))


@pytest.mark.parametrize("kind", BOUNDED)
def test_interval_of_a_bounded_metric_stays_within(kind: str) -> None:
    rng, draw = np.random.default_rng(3), KINDS[kind][0]
    reached = 0
    for _ in range(200):
        values = draw(rng, (5,))
        found, free = interval(values, (0.0, 1.0)), interval(values)
        assert 0 <= found.low <= found.mean <= found.high <= 1
        reached += free.high > 1 == found.high
    assert reached > 10  # and without bounds it would not
    with pytest.raises(ValueError, match="outside of 0 to 1"):
        interval([0.5, 1.5], (0.0, 1.0))


def test_few_values_have_a_range() -> None:
    assert interval([3.0, 1.0, 2.0, 2.0]) == Interval(2.0, 1.0, 3.0, 4, "range")
    assert interval([3.0]) == Interval(3.0, 3.0, 3.0, 1, "range")


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [1.0] * 6 + [math.nan], [math.inf] * 6])
def test_nothing_to_say(values: list[float]) -> None:
    found = interval(values, (-math.inf, math.inf))
    assert found.kind == "none" and math.isnan(found.low) and math.isnan(found.high) and found.n == len(values)


def test_equal_values_have_an_interval_without_width() -> None:
    found = interval([0.1 + 0.2] * 9)
    assert found.low == found.mean == found.high == pytest.approx(0.3) and found.kind == "interval"


def mean_of_rows(scores: np.ndarray) -> np.ndarray:
    return np.nansum(scores, axis=(-1, -2)) / np.isfinite(scores).sum(axis=(-1, -2))


def test_pseudo_values_of_a_mean_are_the_values() -> None:
    scores = np.random.default_rng(0).normal(size=(3, 7))
    whole, pseudo = jackknife(mean_of_rows, scores)
    assert whole == pytest.approx(scores.mean()) and pseudo == pytest.approx(scores.mean(axis=0))
    found, plain = over_seeds(mean_of_rows, scores), interval(scores.mean(axis=0))
    assert found.n == 7 and found.low <= plain.low + 1e-12 and found.high >= plain.high - 1e-12
    assert over_seeds(mean_of_rows, scores, (-0.01, 5.0)).low >= -0.01


def test_statistics_over_few_seeds_have_no_interval() -> None:
    scores = np.random.default_rng(1).normal(size=(2, 8))
    scores[1, :4] = math.nan  # four seeds only on the second row
    for few in (scores, scores[:, :1], scores[:, :0]):
        with np.errstate(all="ignore"):
            found = over_seeds(mean_of_rows, few)
        assert found.kind == "none" and math.isnan(found.low) and found.n == (4 if few is scores else 0)


def test_shares_of_nothing_and_of_all_have_an_interval_with_a_width() -> None:
    low, high = share_ends(np.array([0.0, 1.0]), np.repeat([[0.0, 1.0]], 6, axis=0))
    assert low[0] == 0.0 and high[1] == 1.0 and 0.3 < high[0] < 0.7 and high[0] == pytest.approx(1 - low[1])


@pytest.mark.parametrize(("n", "p"), [(5, 0.9), (8, 0.5), (20, 0.95)])
def test_interval_of_a_share_covers_it(n: int, p: float) -> None:
    wins = np.random.default_rng(n).random((n, 20_000)) < p  # of one task: the pseudo-values are the wins themselves
    low, high = share_ends(wins.mean(axis=0), wins.astype(float))
    assert np.mean((low <= p) & (p <= high)) > 0.93


def test_interval_of_a_standard_deviation_covers_it() -> None:
    rng = np.random.default_rng(4)
    found = [sd_interval(rng.normal(0, 3, 5)) for _ in range(2000)]
    rate = np.mean([each.low <= 3 <= each.high for each in found])
    assert abs(rate - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)
    assert sd_interval([1.0, 3.0]).mean == pytest.approx(math.sqrt(2))  # ddof = 1
    assert sd_interval([1.0, 3.0]).kind == sd_interval([1.0]).kind == "none" and math.isnan(sd_interval([]).mean)


if __name__ == "__main__":
    for name in KINDS:
        print(f'    "{name}": ({", ".join(f"{measured(name, n, 100_000, 0):.3f}" for n in SIZES)}),')
