"""Power: against simulation of the test that is really used."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from test_stats_contrasts import flip_p

from bench.stats import detectable, power_of, seeds_needed
from bench.stats.power import attainable_level


@pytest.mark.parametrize(
    ("n", "alpha", "effect", "tolerance"),
    [
        (6, 0.05, 1.2, 0.03),  # all of one sign: exact
        (6, 0.05, 1.8, 0.03),
        (8, 0.0125, 1.8, 0.03),
        (8, 0.05, 1.2, 0.06),
        (10, 0.05, 0.8, 0.06),
        (11, 0.01, 1.2, 0.06),
    ],
)
def test_power_is_that_of_the_sign_flip_test(n: int, alpha: float, effect: float, tolerance: float) -> None:
    rng = np.random.default_rng(n)
    simulated = stats.power(
        flip_p, lambda size: rng.normal(3 * effect, 3, size), n, significance=alpha, n_resamples=3000, vectorized=True
    ).power
    assert power_of(3 * effect, 3.0, n, alpha) == pytest.approx(float(simulated), abs=tolerance)


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
    assert detectable(1.0, 5) == math.inf and detectable(1.0, 8, 0.05 / 7) == math.inf
    assert detectable(0.0, 8) == 0.0 and math.isnan(detectable(math.nan, 1))
    assert power_of(1.0, 1.0, 5) == power_of(-1.0, 1.0, 9) == 0.0 and power_of(1.0, 0.0, 6) == 1.0


@pytest.mark.parametrize(("effect", "alpha"), [(3.0, 0.05), (0.8, 0.05), (0.8, 0.01), (0.3, 0.05), (0.1, 0.05 / 12)])
def test_seeds_needed_is_the_least_number_that_suffices(effect: float, alpha: float) -> None:
    found = seeds_needed(effect, 1.0, alpha)
    assert found is not None and found == next(n for n in range(2, 10_000) if power_of(effect, 1.0, n, alpha) >= 0.8)


def test_six_seeds_are_the_least_for_any_effect_and_tiny_effects_have_no_number() -> None:
    assert seeds_needed(1e6, 1.0) == 6 and seeds_needed(1.0, 0.0) == 6
    assert seeds_needed(1e-4, 1.0) is None and seeds_needed(0.0, 1.0) is None
