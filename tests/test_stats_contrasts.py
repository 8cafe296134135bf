"""The sign-flip test, effect size, Holm's correction, tasks put together."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bench.stats import equivalence_p, hedges_g, over_tasks, paired, smallest_p
from bench.stats.contrasts import FLIPS, _counted_tails, sign_flip_tails


def flip_p(differences: np.ndarray, axis: int = -1) -> np.ndarray:
    """The exact two-sided sign-flip test, from its definition, for the samples [..., n]."""
    assert axis in (-1, differences.ndim - 1)
    signs = np.array(list(product((1, -1), repeat=differences.shape[-1])))
    sums = np.abs(differences @ signs.T)
    return (sums >= sums[..., :1] * (1 - 1e-12)).mean(axis=-1)


def test_sign_flip_test_by_hand() -> None:
    found = paired([2.0, 3.0, 4.0], [1.0, 1.0, 1.0])  # differences 1, 2, 3: two of eight sign patterns are as extreme
    assert found.p == pytest.approx(0.25) and found.smallest_p == 0.25 and found.difference.mean == 2.0
    assert paired([1.0] * 6, [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]).p == pytest.approx(2 / 64)


@given(st.lists(st.integers(-20, 20), min_size=2, max_size=9), st.sampled_from([0.0, 0.5, 3.0]))
def test_sign_flip_test_counts_the_patterns(values: list[int], margin: float) -> None:
    data = np.array(values, dtype=float)
    assert paired(data, margin=margin).p == pytest.approx(float(flip_p(data - margin)))


@pytest.mark.parametrize("n", [2, 7, 13, 14, 40])
def test_sign_flip_test_is_scipys(n: int) -> None:
    data = np.random.default_rng(n).normal(0.3, 1, n)
    theirs = stats.permutation_test(
        (data,), np.mean, permutation_type="samples", n_resamples=FLIPS, rng=np.random.default_rng(1)
    ).pvalue
    sampled = 2**n > FLIPS
    assert paired(data).p == pytest.approx(theirs, abs=4 * math.sqrt(theirs / FLIPS) if sampled else 1e-12)


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0, 1.5])
def test_counting_on_the_grid_agrees_with_trying_every_pattern(shift: float) -> None:
    rng = np.random.default_rng(8)
    for _ in range(30):
        data = rng.normal(shift, 1, 13)
        assert _counted_tails(data) == pytest.approx(sign_flip_tails(data), rel=0.03, abs=2 / 2**13)


@pytest.mark.parametrize("n", [14, 24, 48, 200])
def test_small_p_of_many_pairs_are_exact(n: int) -> None:
    assert paired(np.ones(n)).p == smallest_p(n) == 2.0 ** (1 - n)
    one_below = np.ones(n)
    one_below[0] = -1.0  # as extreme: this pattern for each of the pairs, and all above
    assert paired(one_below).p == pytest.approx((n + 1) * smallest_p(n))
    half = [1.0, -1.0] * (n // 2)
    assert sign_flip_tails(np.array(half)) == pytest.approx([stats.binom.sf(n // 2 - 1, n, 0.5)] * 2)


def test_the_test_of_many_pairs_keeps_small_levels_for_skewed_noise_of_equal_variants() -> None:
    rng, times, level = np.random.default_rng(9), 4000, 0.01
    noise = rng.exponential(size=(2, times, 24))
    p = np.array([sign_flip_tails(sample) for sample in noise[0] - noise[1]])
    for rejected in (p < level).sum(axis=0):
        low, high = stats.binom.interval(0.999, times, level)
        assert low <= rejected <= high


def test_equivalence_is_the_greater_of_two_tests() -> None:
    data = np.array([0.1, -0.2, 0.0, 0.1, 0.05])
    assert equivalence_p(data, 0.5) == 1 / 32  # both tests: all of one sign
    assert equivalence_p(data, 0.15) == max(sign_flip_tails(data + 0.15)[0], sign_flip_tails(data - 0.15)[1]) > 1 / 32
    assert equivalence_p(data + 1, 0.5) == 1.0 == equivalence_p(data[:0], 1.0)


@pytest.mark.parametrize("n", [8, 24])
def test_equivalence_at_its_bounds_keeps_its_level(n: int) -> None:
    rng, times = np.random.default_rng(n), 1500
    wrong = sum(equivalence_p(rng.normal(0.9, 1, n), 0.9) < 0.05 for _ in range(times))
    assert stats.binom.ppf(0.001, times, 0.03) <= wrong <= stats.binom.ppf(0.999, times, 0.05)


@pytest.mark.parametrize("values", [[], [math.nan, 1.0], [math.nan] * 20])
def test_nothing_to_test(values: list[float]) -> None:
    assert sign_flip_tails(np.array(values)) == (1.0, 1.0) and paired(values).p == 1.0


@pytest.mark.parametrize("n", [5, 20])
def test_no_difference_at_all(n: int) -> None:
    found = paired(np.zeros(n))
    assert found.p == 1.0 and found.sd == 0 and math.isnan(found.effect_size)
    assert equivalence_p(np.zeros(n), 0.1) == 2.0**-n


def test_sign_flip_test_keeps_its_level_under_the_null() -> None:
    rng, times = np.random.default_rng(1), 600
    rejected = sum(paired(rng.normal(size=7), rng.normal(size=7)).p < 0.05 for _ in range(times))
    low, high = stats.binom.interval(0.999, times, 3 / 64)  # 3 of 64 is the greatest attainable level below 0.05
    assert low <= rejected <= high


def test_five_pairs_cannot_be_significant() -> None:
    assert smallest_p(5) == 0.0625 == paired([1.0, 2.0, 3.0, 4.0, 5.0]).p
    assert smallest_p(1) == smallest_p(0) == 1.0 and paired([1.0]).p == 1.0


def test_many_pairs_are_close_to_the_t_test() -> None:
    data = np.random.default_rng(2).normal(0.35, 1, 30)
    found = paired(data)
    assert found.p == paired(data).p == pytest.approx(stats.ttest_1samp(data, 0).pvalue, abs=0.01)


def test_effect_size_is_hedges() -> None:
    data = np.array([0.3, 0.1, 0.25, 0.4, -0.05, 0.2])
    m = len(data) - 1
    correction = math.gamma(m / 2) / (math.sqrt(m / 2) * math.gamma((m - 1) / 2))
    assert hedges_g(data) == pytest.approx(correction * data.mean() / data.std(ddof=1))
    assert correction == pytest.approx(1 - 3 / (4 * m - 1), abs=2e-3)  # the usual approximation
    assert math.isnan(hedges_g([1.0, 2.0])) and math.isnan(hedges_g([1.0] * 5))


def test_effect_size_is_unbiased_where_cohens_d_is_not() -> None:
    samples = np.random.default_rng(3).normal(0.8, 1, (4000, 6))
    g = np.array([hedges_g(sample) for sample in samples])
    error = g.std(ddof=1) / math.sqrt(len(g))
    assert abs(g.mean() - 0.8) < 4 * error < abs((samples.mean(1) / samples.std(1, ddof=1)).mean() - 0.8)


def test_tasks_of_one_unit_are_averaged() -> None:
    assert over_tasks([[1.0, 2.0], [3.0, 6.0]], True).tolist() == [2.0, 4.0]


def test_tasks_of_different_units_weigh_alike() -> None:
    a, b = np.array([1.0, 2.0, -1.0]), np.array([0.0, 3.0, 1.0])
    found = over_tasks([a, b], False)
    assert found == pytest.approx(over_tasks([1000 * a, b], False))
    assert found == pytest.approx((a / math.sqrt(2) + b / math.sqrt(10 / 3)) / 2)
    assert over_tasks([a, np.zeros(3)], False) == pytest.approx(a / math.sqrt(2) / 2)


def test_the_test_over_tasks_of_different_units_keeps_its_level() -> None:
    rng, times = np.random.default_rng(5), 600
    shared = rng.normal(size=(times, 1, 7))  # what a seed does to all tasks
    data = (shared + rng.normal(size=(times, 3, 7))) * np.array([1.0, 50.0, 0.01])[:, None]
    rejected = sum(float(flip_p(over_tasks(sample, False))) < 0.05 for sample in data)
    low, high = stats.binom.interval(0.999, times, 3 / 64)
    assert low <= rejected <= high
