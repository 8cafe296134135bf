"""Verdicts: right on simulated truth, never more often wrong than they say."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from sizes import drawn
from statsmodels.stats.multitest import multipletests

from bench.stats import Contrast, Looks, Verdict, judge, replay, step_down
from bench.stats.verdicts import p_values


def one(
    differences: list[float] | np.ndarray,
    margin: float = 0.0,
    others: int = 0,
    within: float | None = None,
    **counts: int,
) -> Verdict:
    data = np.asarray(differences, dtype=float)
    nothing = [Contrast(np.array([])) for _ in range(others)]
    return judge([Contrast(data, margin, within, **{"planned": len(data), **counts}), *nothing])[0]


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
    assert found.verdict == verdict and (verdict == "inconclusive" or found.note == note)
    assert found.found.difference.mean == pytest.approx(mean) and found.p_corrected == found.found.p


def test_the_family_is_what_corrects() -> None:
    data = around(1.0)
    assert [one(data, others=k).p_corrected for k in (0, 3)] == pytest.approx([2 / 256, 4 * 2 / 256])
    assert one(data, others=5).verdict == "supported"  # 6 x 0.0078 = 0.047
    too_many = one(data, others=6)
    assert too_many.verdict == "inconclusive" and too_many.detectable == np.inf
    assert too_many.note == (
        "too few seeds: p cannot go below 0.00781 x 7 comparisons = 0.0547 with 8 pairs; 9 are the least that can; "
        "a study of its own with about 9 pairs would decide, if mean and sd stay as they are (power 0.8)"
    )
    assert too_many.seeds == 9


def test_fewer_seeds_can_tell_that_two_are_the_same() -> None:
    """Its tests are one-sided: 8 pairs can do what a difference would need 9 for."""
    rng = np.random.default_rng(0)
    near, wide = 0.001 + rng.normal(0, 0.002, 8), rng.normal(0, 0.08, 8)
    first, *others = judge([Contrast(gaps, within=0.05, kind="same", planned=8) for gaps in (near, *[wide] * 6)])
    assert first.verdict == "supported" and first.p_equivalent < 0.05
    assert all(other.verdict == "inconclusive" and "too few" not in other.note for other in others)
    (few, *_) = judge([Contrast(wide[:5], within=0.05, kind="same", planned=5)] * 7)
    assert "p cannot go below 0.0312 x 7 comparisons = 0.219 with 5 pairs; 8 are the least" in few.note, few.note


def test_too_few_seeds_are_told() -> None:
    found = one(around(1.0, n=5))
    assert found.verdict == "inconclusive" and found.p_corrected == 0.0625
    assert "p cannot go below 0.0625 with 5 pairs; 6 are the least" in found.note
    assert "one pair cannot be tested" in one([1.0]).note


def test_missing_pairs_are_told() -> None:
    assert one(around(1.0), planned=10, failed=1).note == "2 of 10 pairs missing, 1 by a failed cell"
    nothing = one([], planned=4)
    assert (nothing.verdict, nothing.note, nothing.p_corrected) == ("inconclusive", "4 of 4 pairs missing", 1.0)


def test_significance_alone_is_not_support() -> None:
    found = one([0.01] * 5 + [5.0])  # all positive, p = 2/64, but the mean is one seed's doing
    assert found.p_corrected < 0.05 and found.verdict == "inconclusive" and "reaches across" in found.note


def test_an_inconclusive_verdict_says_how_many_pairs_would_decide() -> None:
    found = one(around(0.05))
    assert found.verdict == "inconclusive" and found.seeds is not None
    assert f"about {found.seeds} pairs would decide" in found.note
    more = one(around(0.05, n=found.seeds))
    assert more.verdict == "supported" and more.seeds is None
    either = one(around(0.05), within=0.12)  # whichever comes first: to show 0.05, or that it is within 0.12
    assert either.seeds is not None and either.seeds < found.seeds
    assert one([1.0]).seeds == 6 and one([0.0] * 8).seeds is None
    assert one(around(1e-4)).seeds is None and "more than 10,000 pairs" in one(around(1e-4)).note


@pytest.mark.parametrize(
    ("mean", "kind", "verdict"),
    [
        (0.0, "better", "equivalent"),
        (1.0, "better", "supported"),
        (-1.0, "better", "refuted"),
        (0.3, "better", "supported"),  # within the bounds too: the note says so
        (0.0, "same", "supported"),
        (0.3, "same", "supported"),
        (1.0, "same", "refuted"),
        (-1.0, "same", "refuted"),
        (0.5, "same", "inconclusive"),
    ],
)
def test_verdicts_with_bounds(mean: float, kind: Literal["better", "same"], verdict: str) -> None:
    found = judge([Contrast(around(mean, 12), within=0.5, kind=kind)])[0]
    assert found.verdict == verdict
    assert ("yet the difference is within 0.5" in found.note) == (mean == 0.3 and kind == "better")


def test_bounds_that_make_no_sense() -> None:
    data = np.zeros(6)
    for wrong in ({"margin": 0.1, "within": 0.1}, {"within": 0.0}, {"kind": "same"}, {"within": math.nan}):
        with pytest.raises(ValueError, match="within"):
            Contrast(data, **wrong)
    with pytest.raises(ValueError, match="margin"):
        Contrast(data, 0.1, 0.2, "same")
    with pytest.raises(ValueError, match="infinite"):
        Contrast(np.array([math.inf]))


def test_pairs_that_are_not_there_are_left_out() -> None:
    data = np.insert(around(1.0), 3, math.nan)
    assert judge([Contrast(data, planned=9)])[0].found == one(around(1.0)).found
    assert judge([Contrast(np.full(4, math.nan))])[0].verdict == "inconclusive" and judge([]) == []


@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_with_one_test_a_claim_the_correction_is_holms(n: int) -> None:
    p = np.random.default_rng(n).uniform(0, 0.2, n).round(2)  # with ties
    corrected = step_down([(each, math.nan) for each in p])
    assert corrected[:, 0] == pytest.approx(multipletests(p, method="holm")[1]) and np.isnan(corrected[:, 1]).all()


def test_correction_of_two_tests_a_claim_by_hand() -> None:
    # three claims are open at .01; still three at .02 since .5 of the first is not rejected yet; then as Holm
    found = step_down([(0.5, 0.01), (0.02, math.nan), (0.03, 0.04)])
    assert found[0] == pytest.approx([0.5, 0.03]) and found[1, 0] == pytest.approx(0.06)
    assert found[2] == pytest.approx([0.06, 0.08])  # two claims left: the second is settled


def test_the_correction_keeps_the_family_wise_error() -> None:
    rng, times = np.random.default_rng(4), 2000
    data = rng.normal(size=(times, 5, 10))
    data[:, :2] += 1.5  # two real effects, three nulls
    p = stats.ttest_1samp(data, 0, axis=-1).pvalue
    corrected = np.array([step_down([(each, math.nan) for each in row])[:, 0] for row in p])
    wrong, uncorrected = ((some[:, 2:] < 0.05).any(axis=1).sum() for some in (corrected, p))
    assert wrong <= stats.binom.ppf(0.999, times, 0.05) < uncorrected
    assert (corrected[:, 0] < 0.05).mean() > 0.8  # and still finds what is there


@pytest.mark.parametrize("truth", [0.0, 0.8, -0.8])
@pytest.mark.long
def test_verdicts_with_bounds_are_wrong_no_more_often_than_they_say(truth: float) -> None:
    """Three claims with one reference, whose true difference is the margin or one of the bounds."""
    rng, families, wrong = np.random.default_rng(11), drawn(250), 0
    for _ in range(families):
        runs = rng.normal(size=(4, 10)) * math.sqrt(0.5)
        family = [
            Contrast(runs[k] - runs[3] + truth, within=0.8, kind="same" if k == 2 else "better") for k in range(3)
        ]
        found = [verdict.verdict for verdict in judge(family)]
        right = {0.0: ("equivalent",), 0.8: ("supported",), -0.8: ("refuted",)}[truth]
        same = "supported" if truth == 0 else "refuted"
        wrong += any(v not in (*right, "inconclusive") for v in found[:2]) or found[2] not in (same, "inconclusive")
    assert wrong <= stats.binom.ppf(0.999, families, 0.05)


def test_verdicts_are_wrong_under_the_null_no_more_often_than_they_say() -> None:
    rng, families = np.random.default_rng(6), drawn(200)
    wrong = first = 0
    for number in range(families):
        margin = 0.4 * (number % 2)
        found = judge([Contrast(rng.normal(margin, 1, 10), margin) for _ in range(3)])
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


def test_equivalence_is_not_one_that_the_interval_reaches_beyond() -> None:
    data = np.append(np.linspace(-0.01, 0.01, 15), -1.0)  # one seed lies far outside of the bounds
    (found,) = judge([Contrast(data, within=0.2)])
    assert found.p_equivalent < 0.05 and found.found.difference.low < -0.2
    assert found.verdict == "inconclusive" and "the interval reaches across the bounds" in found.note
    assert judge([Contrast(data, within=0.2, kind="same")])[0].verdict == "inconclusive"
    assert judge([Contrast(data[:-1], within=0.2)])[0].verdict == "equivalent"


def test_runs_that_were_stopped_say_nothing_of_equivalence() -> None:
    """Where neither of a pair reached the score the difference is 0 since both were stopped; where one did, it is only
    the least that it may be.
    """
    nothing, every = np.zeros(16), np.full(16, math.inf)
    for kind in ("same", "better"):
        for stopped in ({"most": every, "least": -every}, {"most": every}, {"least": -every}):
            contrast = Contrast(nothing, within=0.1, kind=kind, **stopped)
            (found,) = judge([contrast])
            assert found.verdict == "inconclusive" and found.p_equivalent == 1.0 and found.seeds is None
            assert "runs that did not reach the score" in found.note and "may differ by more than is seen" in found.note
            looks = replay([contrast], Looks((8, 16), (0.5, 0.5)))[0]
            assert looks.verdict.verdict == "inconclusive" and looks.pairs == 16
            waiting = replay([contrast.first(8)], Looks((8, 16), (0.5, 0.5)))[0]
            assert waiting.verdict.verdict == "open" and waiting.further == 8


def test_what_is_seen_counts_where_it_speaks_against_equivalence() -> None:
    seen, few = around(0.0, 16, 0.01), np.arange(16) < 4

    def open_in(pairs: NDArray[np.bool_], data: NDArray[np.float64] = seen, both: bool = True) -> Contrast:
        least = np.where(pairs, -math.inf, data) if both else None
        return Contrast(data, within=0.1, most=np.where(pairs, math.inf, data), least=least)

    some = open_in(few)
    assert p_values(some).equal == p_values(Contrast(seen[4:], within=0.1)).equal  # as if those were not there
    assert judge([some])[0].verdict == "equivalent"
    assert judge([open_in(np.arange(16) < 13)])[0].verdict == "inconclusive"  # three pairs tell
    assert judge([open_in(np.arange(16) < 1, both=False)])[0].verdict == "equivalent"
    far = open_in(few, np.where(few, 0.5, seen), both=False)
    assert p_values(far).equal == p_values(Contrast(far.differences, within=0.1)).equal
    gap = open_in(np.insert(few, 3, True), np.insert(seen, 3, math.nan))
    assert p_values(gap).equal == p_values(some).equal


def test_a_difference_that_is_known_beyond_what_is_seen_counts_as_it_is() -> None:
    seen = around(0.0, 16, 0.01)
    assert (
        p_values(Contrast(seen, within=0.1, most=seen + 0.3)).equal == p_values(Contrast(seen + 0.3, within=0.1)).equal
    )
    assert (
        p_values(Contrast(seen, within=0.1, least=seen - 0.3)).equal == p_values(Contrast(seen - 0.3, within=0.1)).equal
    )
    for ends in ({"most": seen + 0.3}, {"least": seen - 0.3}):
        (found,) = judge([Contrast(seen, within=0.1, **ends)])
        assert found.verdict == "inconclusive" and found.seeds is None and "may differ by more" in found.note
    (near,) = judge(
        [Contrast(seen, within=0.1, most=seen + 0.001)]
    )  # budgets that are nearly equal hide next to nothing
    assert near.verdict == "equivalent"
    assert not Contrast(seen, within=0.1, most=seen + 0.001).stopped


def test_the_note_does_not_contradict_itself() -> None:
    data = np.append(np.linspace(-0.01, 0.01, 15), -1.0)
    note = judge([Contrast(data, within=0.2)])[0].note
    assert "the interval reaches across the bounds" in note and "yet the difference" not in note
    shown = judge([Contrast(around(0.03, 12, 0.03), within=0.05)])[0]
    assert shown.verdict == "supported" and shown.found.difference.high < 0.05
    assert ("yet the difference is within 0.05" in shown.note) == (shown.p_equivalent < 0.05)


def test_pairs_that_did_not_decide_are_not_said_to_be_enough() -> None:
    """p is small, yet the interval is not beyond the margin: by p alone 11 pairs would do."""
    gaps = [0.01, 0.0189, -0.0236, 0.0131, 0.0061, 0.0081, 0.0186, 0.0214, 0.0264, 0.0178, 0.0214, 0.0133]
    (found,) = judge([Contrast(np.array(gaps), planned=12)])
    assert found.verdict == "inconclusive" and found.p_corrected < 0.05 and found.seeds is None
    assert "significant, but" in found.note and "with more than these 12 pairs would decide" in found.note
