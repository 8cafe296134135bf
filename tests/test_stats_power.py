"""Power: against simulation of the test that is really used."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from bench.stats import (
    Looks,
    detectable,
    equivalence_p,
    equivalence_power,
    power_of,
    seeds_for_equivalence,
    seeds_needed,
)
from bench.stats.contrasts import sign_flip_tails
from bench.stats.power import attainable_level, critical_shift, critical_values

LEVELS = [0.05, 0.05 / 3, 0.05 / 6, *Looks().levels(1)[:2], *Looks().levels(6)[1:4], Looks().levels(15)[2]]


@pytest.mark.parametrize("n", [6, 8, 10, 13, 14, 16, 24, 48])
@pytest.mark.long
def test_power_is_that_of_the_sign_flip_test(n: int) -> None:
    """At every level of fixed and deciding studies of 1, 3, 6 and 15 hypotheses, for three effects."""
    times = 1000
    for strength in (2.5, 3.5, 4.5):
        effect = 3 * strength / math.sqrt(n)
        samples = np.random.default_rng([n, int(strength)]).normal(effect, 3, (times, n))
        p = np.array([2 * sign_flip_tails(sample)[0] for sample in samples])
        for level in LEVELS:
            told = power_of(effect, 3.0, n, level)
            error = math.sqrt(max(told * (1 - told), 0.002) / times)
            assert abs(told - (p < level).mean()) < 4 * error, (level, strength)


def test_power_as_it_was_once_told_wrong() -> None:
    assert power_of(1.5, 1.0, 10, 0.05 / 6) == pytest.approx(0.837, abs=0.005)  # 30,000 simulated; a t test has .869


@pytest.mark.parametrize(
    ("n", "effect", "within", "level"),
    [(6, 0, 1.5, 0.05), (8, 0.3, 1.2, 0.05), (10, 0, 1, 0.0083), (24, 0, 1, 0.0028), (24, 0.2, 0.9, 0.0083)],
)
def test_power_of_equivalence_is_that_of_the_two_tests(n: int, effect: float, within: float, level: float) -> None:
    times, rng = 1000, np.random.default_rng(n)
    found = np.mean([equivalence_p(rng.normal(effect, 1, n), within) < level for _ in range(times)])
    told = equivalence_power(effect, 1.0, n, within, level)
    assert 0.1 < told < 0.99 and abs(told - found) < 4 * math.sqrt(told * (1 - told) / times)


def test_equivalence_that_cannot_be_shown() -> None:
    assert equivalence_power(1.0, 1.0, 50, 1.0) == equivalence_power(0.0, 1.0, 4, 1.0) == 0.0
    assert equivalence_power(0.0, 0.0, 6, 1.0) == 1.0 and equivalence_power(0.0, 1.0, 8, 0.1) == 0.0
    assert seeds_for_equivalence(2.0, 1.0, 1.0) is None
    need = seeds_for_equivalence(0.0, 1.0, 1.0, 0.05 / 6)
    assert need is not None and equivalence_power(0.0, 1.0, need, 1.0, 0.05 / 6) >= 0.8
    assert equivalence_power(0.0, 1.0, need - 1, 1.0, 0.05 / 6) < 0.8


def test_power_is_the_t_tests_where_the_level_is_no_matter() -> None:
    effect, n = 0.5, 60  # by the definition of the noncentral t
    cut = stats.t.ppf(0.975, n - 1)
    rng = np.random.default_rng(0)
    rejected = stats.ttest_1samp(rng.normal(effect, 1, (20_000, n)), 0, axis=1).statistic > cut
    assert power_of(effect, 1.0, n) == pytest.approx(rejected.mean(), abs=0.012)


@pytest.mark.parametrize(("n", "alpha", "level"), [(5, 0.05, 0.0), (6, 0.05, 1 / 32), (8, 0.05, 6 / 128)])
def test_attainable_levels(n: int, alpha: float, level: float) -> None:
    assert attainable_level(n, alpha) == level


@pytest.mark.parametrize(
    ("n", "alpha", "power"), [(6, 0.05, 0.8), (8, 0.05 / 4, 0.8), (10, 0.05, 0.9), (50, 0.01, 0.8)]
)
def test_the_detectable_effect_is_detected_with_the_power_asked_for(n: int, alpha: float, power: float) -> None:
    assert power_of(detectable(2.0, n, alpha, power), 2.0, n, alpha) == pytest.approx(power, abs=1e-6)


def test_what_cannot_be_detected() -> None:
    assert seeds_needed(1.0, math.nan) is None
    assert detectable(1.0, 5) == math.inf and detectable(1.0, 8, 0.05 / 7) == math.inf
    assert detectable(0.0, 8) == 0.0 and math.isnan(detectable(math.nan, 1))
    assert power_of(1.0, 1.0, 5) == power_of(-1.0, 1.0, 9) == 0.0 and power_of(1.0, 0.0, 6) == 1.0


@pytest.mark.parametrize(("effect", "alpha"), [(3.0, 0.05), (0.8, 0.05), (0.8, 0.01), (0.3, 0.05), (0.1, 0.05 / 12)])
def test_seeds_needed_is_the_least_number_that_suffices(effect: float, alpha: float) -> None:
    found = seeds_needed(effect, 1.0, alpha)
    assert found is not None and power_of(effect, 1.0, found, alpha) >= 0.8
    assert all(power_of(effect, 1.0, n, alpha) < 0.8 for n in range(max(2, found - 12), found))


def test_six_seeds_are_the_least_for_any_effect_and_tiny_effects_have_no_number() -> None:
    assert seeds_needed(1e6, 1.0) == 6 and seeds_needed(1.0, 0.0) == 6
    assert seeds_needed(1e-4, 1.0) is None and seeds_needed(0.0, 1.0) is None


@pytest.mark.parametrize("level", [0.025, 0.05 / 12, 0.001])
@pytest.mark.parametrize("n", [5, 7, 10, 12, 14])
def test_both_sides_of_the_critical_values_are_those_of_the_noise_and_of_its_negative(n: int, level: float) -> None:
    values = critical_values(n, level) / math.sqrt(n)
    noise = np.random.default_rng(n).normal(size=(len(values), n))
    noise = (noise - noise.mean(axis=1, keepdims=True)) / noise.std(axis=1, ddof=1, keepdims=True)
    for side, sign in enumerate((1, -1)):
        assert values[:, side] == pytest.approx(critical_shift(sign * noise, level), rel=1e-12)
