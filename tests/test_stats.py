import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bench.stats import mean_interval, paired, pareto_front

VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=12)


@given(VALUES)
def test_interval_is_students(values: list[float]) -> None:
    found = mean_interval(values)
    mean, sem = np.mean(values), np.std(values, ddof=1) / math.sqrt(len(values))
    if sem > 1e-9:
        expected = stats.t.interval(0.95, len(values) - 1, loc=mean, scale=sem)
        assert (found.low, found.high) == pytest.approx(expected)
    assert found.n == len(values) and found.mean == pytest.approx(mean)


def test_one_value_has_no_interval() -> None:
    found = mean_interval([3.0])
    assert found.mean == 3.0 and math.isnan(found.low) and math.isnan(found.high)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = [found.low <= 5 <= found.high for found in (mean_interval(rng.normal(5, 2, 4)) for _ in range(2000))]
    assert abs(np.mean(hits) - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


def test_sign_flip_test_by_hand() -> None:
    found = paired([2.0, 3.0, 4.0], [1.0, 1.0, 1.0])  # differences 1, 2, 3: two of eight sign patterns are as extreme
    assert found.p == pytest.approx(0.25) and found.smallest_p == 0.25 and found.difference.mean == 2.0
    assert paired([1.0] * 6, [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]).p == pytest.approx(2 / 64)


def test_sign_flip_test_keeps_its_level_under_the_null() -> None:
    rng = np.random.default_rng(1)
    rejected = np.mean([paired(rng.normal(size=7), rng.normal(size=7)).p < 0.05 for _ in range(400)])
    assert rejected < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=15), st.booleans())
def test_front_holds_exactly_the_points_that_nothing_beats(points: list[tuple[int, int]], higher: bool) -> None:
    cost, score = np.array(points).T
    front = {points[i] for i in pareto_front(cost, score, higher)}
    gain = {point: point[1] if higher else -point[1] for point in points}
    beaten = {p for p in points for q in points if q != p and q[0] <= p[0] and gain[q] >= gain[p]}
    assert front == set(points) - beaten
