"""Fronts: by definition, by counting, and on simulated seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.stats import dominance, hypervolume, median_front, pareto_front
from bench.stats.fronts import _medians, _resamples, median_ends

POINTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=15)


@given(POINTS, st.booleans())
def test_front_holds_exactly_the_points_that_nothing_beats(points: list[tuple[int, int]], higher: bool) -> None:
    cost, score = np.array(points).T
    front = {points[i] for i in pareto_front(cost, score, higher)}
    gain = {point: point[1] if higher else -point[1] for point in points}
    beaten = {p for p in points for q in points if q != p and q[0] <= p[0] and gain[q] >= gain[p]}
    assert front == set(points) - beaten


@given(POINTS, st.booleans())
def test_hypervolume_counts_the_unit_squares_that_are_dominated(points: list[tuple[int, int]], higher: bool) -> None:
    limit, worst = 8, (2 if higher else 7)
    squares = 0
    for x in range(limit):
        for y in range(-20, 20):  # the square [x, x+1] x [y, y+1]
            lower, upper = (worst, y + 1) if higher else (y, worst)
            inside = (y >= worst) if higher else (y + 1 <= worst)
            assert lower is not None and upper is not None
            reach = any(c <= x and (s >= y + 1 if higher else s <= y) for c, s in points)
            squares += inside and reach
    assert hypervolume(points, (limit, worst), higher) == squares


def test_median_front_by_hand() -> None:
    seeds = [[(1, 0.2), (3, 0.9)], [(1, 0.4), (2, 0.3), (3, 0.8)], [(2, 0.5)]]
    band = median_front(seeds, True)
    assert band.cost.tolist() == [1, 2, 3] and band.n == 3
    # attained: 0.2 0.2 0.9 / 0.4 0.4 0.8 / none 0.5 0.5
    assert band.median.tolist() == [0.2, 0.4, 0.8]
    assert np.isnan(band.low).all() and np.isnan(band.high).all()  # too few seeds for a band
    more = median_front(seeds * 2, True)
    assert np.isnan(more.low[0]) and more.high[0] == 0.4  # a third of the seeds has nothing at cost 1
    assert (more.low[1:] <= more.median[1:]).all() and (more.median <= more.high).all()
    lower = median_front([[(c, -s) for c, s in seed] for seed in seeds * 2], False)
    np.testing.assert_array_equal(lower.median, -more.median)
    np.testing.assert_array_equal(lower.low, -more.high)


def test_ends_of_a_median_are_order_statistics() -> None:
    low, high = median_ends(np.arange(5.0))
    assert (low, high) == (0.0, 4.0)  # the range covers 93.75 %: there is nothing wider
    low, high = median_ends(np.arange(10.0))  # 2nd to 9th value: 97.9 %; 3rd to 8th: 89.1 %
    assert 1 < low < 2 and high == pytest.approx(9 - low)


@pytest.mark.parametrize("n", [5, 6, 7, 8, 10, 16, 20])
def test_ends_of_a_median_cover_it(n: int) -> None:
    rng, times = np.random.default_rng(n), 20_000
    kinds = ((rng.normal(0, 1, (n, times)), 0.0), (rng.exponential(1, (n, times)), math.log(2)))
    for values, truth in (*kinds, (rng.beta(20, 1, (n, times)), 0.5 ** (1 / 20))):
        low, high = median_ends(values)
        rate, error = np.mean((low <= truth) & (truth <= high)), 4 * math.sqrt(0.95 * 0.05 / times)
        assert (0.9375 if n == 5 else 0.94) - error < rate < 0.953 + error


def test_band_covers_the_true_median_front() -> None:
    rng, hits, times = np.random.default_rng(0), 0, 400
    for _ in range(times):
        shift = rng.normal(0, 0.1, 15)
        band = median_front([[(1, 0.4 + s), (2, 0.6 + s)] for s in shift], True)
        hits += bool((band.low <= [0.4, 0.6]).all() and (band.high >= [0.4, 0.6]).all())
    assert abs(hits / times - 0.95) < 4 * (0.95 * 0.05 / times) ** 0.5


def test_dominance() -> None:
    rng = np.random.default_rng(1)
    base = [[(1, 0.5 + s), (2, 0.7 + s)] for s in rng.normal(0, 0.1, 9)]
    better = [[(c, y + 0.01) for c, y in seed] for seed in base]  # on every seed, by less than seeds differ
    assert dominance(better, base, True).probability == 1.0 and dominance(base, better, True).probability == 0.0
    assert dominance(better, base, False).probability == 0.0
    assert dominance(base, base, True).probability == 0.0  # nowhere better
    dear = [[(c + 0.5, y) for c, y in seed] for seed in better]  # the base has something cheaper
    assert dominance(dear, base, True).probability == 0.0
    mixed = better[:5] + [[(c, y - 0.3) for c, y in seed] for seed in base[5:]]
    assert 0.05 < dominance(mixed, base, True).probability < 0.95
    assert dominance(mixed, base, True).n == 9
    assert math.isnan(dominance(better[:4], base[:4], True).probability)  # too few seeds to say
    with pytest.raises(ValueError, match="9 and 8 seeds"):
        dominance(base, base[:8], True)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 25])
def test_medians_of_resamples_are_numpys(n: int) -> None:
    rng = np.random.default_rng(n)
    gains, drawn = rng.normal(size=(n, 20)).round(1), _resamples(n)[:200]
    gains[rng.random(gains.shape) < 0.3] = -np.inf
    assert (drawn.sum(axis=1) == n).all() and drawn.shape == (200, n)
    expected = [np.median(np.repeat(gains, times, axis=0), axis=0) for times in drawn]
    np.testing.assert_array_equal(_medians(gains, drawn), expected)
