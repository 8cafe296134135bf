"""Verdicts: right on simulated truth, never more often wrong than they say."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from bench.stats import Contrast, Verdict, judge


def one(differences: list[float] | np.ndarray, margin: float = 0.0, others: int = 0, **counts: int) -> Verdict:
    data = np.asarray(differences, dtype=float)
    nothing = [Contrast(np.array([])) for _ in range(others)]
    return judge([Contrast(data, margin, **{"planned": len(data), **counts}), *nothing])[0]


def around(mean: float, n: int = 8, sd: float = 0.1) -> np.ndarray:
    noise = np.random.default_rng(0).normal(size=n)
    return mean + sd * (noise - noise.mean()) / noise.std(ddof=1)


@pytest.mark.parametrize(
    ("mean", "margin", "verdict", "note"),
    [
        (1.0, 0.0, "supported", ""),
        (-1.0, 0.0, "refuted", ""),
        (0.01, 0.0, "inconclusive", ""),
        (1.0, 0.5, "supported", ""),
        (1.0, 0.99, "inconclusive", ""),
        (0.5, 1.0, "refuted", "better, but by less than the margin"),
    ],
)
def test_verdicts_of_plain_cases(mean: float, margin: float, verdict: str, note: str) -> None:
    found = one(around(mean), margin)
    assert (found.verdict, found.note) == (verdict, note)
    assert found.found.difference.mean == pytest.approx(mean) and found.p_corrected == found.found.p


def test_the_family_is_what_corrects() -> None:
    data = around(1.0)
    assert [one(data, others=k).p_corrected for k in (0, 3)] == pytest.approx([2 / 256, 4 * 2 / 256])
    assert one(data, others=5).verdict == "supported"  # 6 x 0.0078 = 0.047
    too_many = one(data, others=6)
    assert too_many.verdict == "inconclusive" and too_many.detectable == np.inf
    assert too_many.note == (
        "too few seeds: p cannot go below 0.00781 x 7 comparisons = 0.0547 with 8 pairs; 9 are the least that can"
    )


def test_too_few_seeds_are_told() -> None:
    found = one(around(1.0, n=5))
    assert found.verdict == "inconclusive" and found.p_corrected == 0.0625
    assert "p cannot go below 0.0625 with 5 pairs; 6 are the least" in found.note and "interval by t" in found.note
    assert "one pair cannot be tested" in one([1.0]).note


def test_missing_pairs_are_told() -> None:
    assert one(around(1.0), planned=10, failed=1).note == "2 of 10 pairs missing, 1 by a failed cell"
    nothing = one([], planned=4)
    assert (nothing.verdict, nothing.note, nothing.p_corrected) == ("inconclusive", "4 of 4 pairs missing", 1.0)


def test_significance_alone_is_not_support() -> None:
    found = one([0.01] * 5 + [5.0])  # all positive, p = 2/64, but the mean is one seed's doing
    assert found.p_corrected < 0.05 and found.verdict == "inconclusive" and "reaches across" in found.note


def test_verdicts_are_wrong_under_the_null_no_more_often_than_they_say() -> None:
    rng, families = np.random.default_rng(6), 200
    wrong = first = 0
    for number in range(families):
        margin = 0.4 * (number % 2)
        found = judge([Contrast(rng.normal(margin, 1, 10), margin, 10) for _ in range(3)])
        wrong += any(verdict.verdict != "inconclusive" for verdict in found)
        first += found[0].found.p < 0.05
    assert wrong <= stats.binom.ppf(0.999, families, 0.05)
    low, high = stats.binom.interval(0.999, families, 25 / 512)  # the test itself is exact, neither shy nor bold
    assert low <= first <= high
    assert wrong > 0  # and the simulation could have failed


def test_a_real_effect_is_found_and_never_refuted() -> None:
    rng = np.random.default_rng(7)
    found = [one(rng.normal(1.5, 1, 10)).verdict for _ in range(60)]
    assert found.count("supported") > 50 and "refuted" not in found
