"""phi: a planted one is recovered, and nothing is told where nothing can be."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bench.stats import fit_phi

SHAPES = [(2, 2, 1), (2, 4, 1), (2, 6, 1), (2, 10, 1), (2, 2, 2), (2, 2, 4), (2, 2, 8)]
Row = tuple[float, float, float, float, int]


def rows(phi: float, noise: float, seeds: int, rng: np.random.Generator, slope: float = 0.2) -> list[Row]:
    return [
        (fixed, cycled, r, 0.3 + slope * math.log(fixed + cycled * r**phi) + noise * rng.normal(), seed)
        for seed in range(seeds)
        for fixed, cycled, r in SHAPES
    ]


@pytest.mark.parametrize("phi", [0.0, 0.46, 1.0])
@pytest.mark.parametrize("slope", [0.2, -0.5])  # an accuracy, a loss
def test_a_planted_exponent_is_recovered(phi: float, slope: float) -> None:
    found = fit_phi(*zip(*rows(phi, 0.0, 5, np.random.default_rng(0), slope), strict=True), slope > 0)
    assert found.phi.mean == pytest.approx(phi, abs=1e-3) and found.slope == pytest.approx(slope, rel=1e-2)
    assert found.r2 == pytest.approx(1.0) and found.intercept == pytest.approx(0.3, abs=0.01)
    assert (found.phi.n, found.configurations, found.note) == (5, 7, "")


@pytest.mark.parametrize("n", [5, 10])
def test_its_interval_covers_it(n: int) -> None:
    rng, times = np.random.default_rng(n), 150
    found = [fit_phi(*zip(*rows(0.46, 0.02, n, rng), strict=True)).phi for _ in range(times)]
    rate = np.mean([each.low <= 0.46 <= each.high for each in found])
    assert rate > 0.94 - 3 * math.sqrt(0.95 * 0.05 / times)


def test_missing_runs_and_few_seeds() -> None:
    data = rows(0.46, 0.01, 8, np.random.default_rng(1))
    assert fit_phi(*zip(*data[1:], strict=True)).phi.n == 7
    few = fit_phi(*zip(*data[: 4 * len(SHAPES)], strict=True))
    assert few.phi.kind == "none" and few.phi.mean == pytest.approx(0.46, abs=0.2) and math.isnan(few.phi.low)
    with pytest.raises(ValueError, match="twice"):
        fit_phi(*zip(*data, data[0], strict=True))


@pytest.mark.parametrize(
    ("shapes", "score", "why"),
    [
        ([], 0.5, "fewer than three"),
        ([(0, 2, 1), (0, 4, 1)], None, "fewer than three"),
        ([(0, 2, 1), (0, 4, 1), (0, 8, 1)], None, "cycles does not vary"),
        ([(0, 2, 1), (0, 2, 2), (0, 2, 4)], None, "told apart"),
        ([(0, 2, 1), (0, 4, 2), (0, 8, 4)], None, "told apart"),
        ([(0, 2, 1), (0, 4, 1), (0, 2, 4)], 0.5, "score the same"),
        ([(0, 2, 1), (0, 4, 1), (0, 2, 4)], math.nan, "no score"),
    ],
)
def test_nothing_to_fit(shapes: list[tuple[int, int, int]], score: float | None, why: str) -> None:
    data = [
        (*shape, 0.1 * index if score is None else score, seed)
        for seed in range(6)
        for index, shape in enumerate(shapes)
    ]
    found = fit_phi(*(zip(*data, strict=True) if data else [[]] * 5))
    assert why in found.note and math.isnan(found.phi.mean) and found.phi.kind == "none" and math.isnan(found.r2)


def test_an_exponent_at_the_end_of_the_range_is_told() -> None:
    assert "at an end" in fit_phi(*zip(*rows(2.5, 0.0, 5, np.random.default_rng(0)), strict=True)).note


@pytest.mark.parametrize("slope", [0.2, -0.5])
def test_where_blocks_do_harm_there_is_no_phi(slope: float) -> None:
    found = fit_phi(*zip(*rows(0.46, 0.0, 5, np.random.default_rng(0), slope), strict=True), slope < 0)
    assert (
        math.isnan(found.phi.mean) and found.note == "more blocks and cycles score worse here: phi would compare harms"
    )


def test_an_interval_that_ends_with_the_range_says_so() -> None:
    found = fit_phi(*zip(*rows(1.0, 0.06, 6, np.random.default_rng(2)), strict=True))
    assert found.phi.high >= 1.5 and "the interval ends where the range looked at does" in found.note
