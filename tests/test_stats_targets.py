"""What it costs to reach a score: by hand, and exact whatever the budgets."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from bench.stats import area_under_curve, cost_to, paired, restricted

COST = [1.0, 2.0, 4.0, 8.0]


def test_first_reached() -> None:
    assert cost_to(COST, [0.1, 0.6, 0.5, 0.9], 0.55, True) == 2.0  # once is enough
    assert cost_to(COST, [0.1, 0.6, 0.5, 0.9], 0.9, True) == 8.0 and cost_to(COST, [0.1, 0.6, 0.5, 0.9], 0.0, True) == 1
    assert cost_to(COST, [3.0, 2.0, math.nan, 1.5], 1.9, False) == 8.0
    assert cost_to(COST, [3.0, 2.0, math.nan, 1.9], 1.0, False) == math.inf == cost_to([], [], 1.0, True)


def test_costs_that_were_all_reached_are_compared_on_a_log_scale() -> None:
    a, b = np.array([1.0, 2.0, 3.0, 2.0, 1.0, 4.0]), np.array([2.0, 4.0, 6.0, 4.0, 2.0, 8.0])
    found = paired(restricted(a, b, 10, 10))
    assert math.exp(found.difference.mean) == pytest.approx(2.0) and found.p == 2 / 64


def test_a_censored_cost_is_at_least_its_budget() -> None:
    inf = math.inf
    a, b = [2.0, inf, 5.0, inf, 2.0], [inf, 4.0, inf, inf, 2.0]
    assert restricted(a, b, 8, 8) == pytest.approx([math.log(4), -math.log(2), math.log(8 / 5), 0.0, 0.0])


def test_budgets_may_differ_and_only_the_shared_one_counts() -> None:
    # a had 20 and took 15; b had 10 and did not get there: which is cheaper is not known
    assert restricted([15.0], [math.inf], 20, 10).tolist() == [0.0]
    assert restricted([5.0], [math.inf], 20, 10) == pytest.approx([math.log(2)])
    assert restricted([15.0], [5.0], 20, 10) == pytest.approx(
        [-math.log(2)]
    )  # and not log 3: b could not have shown it
    assert restricted([15.0, 1.0], [5.0, 2.0], [20, 4], [10, 3]) == pytest.approx([-math.log(2), math.log(2)])


def test_missing_pairs_and_wrong_costs() -> None:
    gap = restricted([1.0, math.nan], [2.0, 2.0], 4, 4)
    assert gap[0] == pytest.approx(math.log(2)) and math.isnan(gap[1])
    assert paired(restricted([], [], 1, 1)).p == 1.0
    for a, budget in ((0.0, 4.0), (5.0, 4.0), (1.0, 0.0)):
        with pytest.raises(ValueError, match="at most their budget"):
            restricted([a], [1.0], budget, 4.0)


def test_equal_variants_with_unequal_budgets_are_told_apart_no_more_often_than_they_should() -> None:
    rng, times = np.random.default_rng(0), 1500
    rejected = 0
    for _ in range(times):
        costs = rng.lognormal(0, 0.6, 10) * rng.lognormal(0, 0.6, (2, 10))  # a seed has its own difficulty
        budget = (4.0, 1.2)
        a, b = (np.where(cost <= limit, cost, math.inf) for cost, limit in zip(costs, budget, strict=True))
        rejected += paired(restricted(a, b, *budget)).p < 0.05
    assert stats.binom.ppf(0.001, times, 0.03) <= rejected <= stats.binom.ppf(0.999, times, 0.05)


def test_area_under_a_curve_by_hand() -> None:
    assert area_under_curve([0, 1, 3], [0, 1, 1]) == pytest.approx((0.5 + 2) / 3)
    assert area_under_curve([1, 5, 7], [0.3, 0.3, 0.3]) == pytest.approx(0.3)
    assert math.isnan(area_under_curve([1], [1])) and math.isnan(area_under_curve([], []))
    assert math.isnan(area_under_curve([1, 2], [1, math.nan]))
    for x in ([1, 1], [2, 1]):
        with pytest.raises(ValueError, match="x must rise"):
            area_under_curve(x, [1, 2])
