"""Deciding studies: whole studies simulated, look by look, with the verdicts they end with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sizes import drawn

from bench.stats import Contrast, Looks, expected, power_of, replay
from bench.stats.decide import decide

Noise = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
NOISE: dict[str, Noise] = {  # of one run, with sd 1
    "normal": lambda rng, size: rng.normal(size=size),
    "skewed": lambda rng, size: rng.exponential(size=size),
    "heavy": lambda rng, size: rng.lognormal(size=size) / math.sqrt((math.e - 1) * math.e),
}
LAST = Looks().pairs[-1]


def studies(rng: np.random.Generator, noise: Noise, times: int, family: int) -> np.ndarray:
    """Differences [times, family, LAST] with sd 1 of variants that are all compared with the same reference."""
    runs = noise(rng, (times, family + 1, LAST)) / math.sqrt(2)
    return runs[:, 1:] - runs[:, :1]


def ends(data: np.ndarray, **claim: Any) -> list[list[tuple[str, int]]]:
    """Verdict and pairs of each hypothesis of the studies [S, m, LAST].

    Hypotheses of which a t test says that they are far from decided at every look are not replayed: that takes a
    twentieth of the time, and what it takes is checked against ``replay`` below.
    """
    looks, family = Looks(), data.shape[1]
    levels, near = looks.levels(family), np.zeros(data.shape[:2], dtype=bool)
    within = claim.get("within")
    for pairs, level in zip(looks.pairs, levels, strict=True):
        some = data[..., :pairs]
        error = some.std(axis=-1, ddof=1) / math.sqrt(pairs)
        cut = stats.t.isf(min(0.4, 8 * level + 2.0 ** (2 - pairs)), pairs - 1)
        mean = some.mean(axis=-1)
        if claim.get("kind") != "same":
            near |= np.abs(mean - claim.get("margin", 0.0)) / error > cut
        if within is not None:
            near |= (within - np.abs(mean)) / error > cut
            near |= (np.abs(mean) - within) / error > cut
    found = []
    for study, close in zip(data, near, strict=True):
        row = [("inconclusive", LAST)] * family
        for index in np.flatnonzero(close):
            decision = decide(Contrast(study[index], **claim), looks, levels)
            row[index] = (decision.verdict.verdict, decision.pairs)
        found.append(row)
    return found


def test_what_is_left_out_of_the_simulations_is_inconclusive() -> None:
    data = studies(np.random.default_rng(0), NOISE["skewed"], 6, 4)
    for claim in ({}, {"within": 0.8}, {"within": 0.8, "kind": "same"}):
        for study, row in zip(data, ends(data, **claim), strict=True):
            whole = replay([Contrast(each, **claim) for each in study], Looks())
            assert [(decision.verdict.verdict, decision.pairs) for decision in whole] == row
            assert not any(decision.open for decision in whole)


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.long
def test_family_wise_error_under_the_null(noise: str) -> None:
    """2,000 studies of six hypotheses with one reference: none of the variants differs."""
    times = drawn(2000)
    found = ends(studies(np.random.default_rng(1), NOISE[noise], times, 6))
    wrong = sum(any(verdict != "inconclusive" for verdict, _ in row) for row in found)
    assert wrong <= stats.binom.ppf(0.999, times, 0.05)
    assert wrong > 0.01 * times  # and the simulation could have failed


@pytest.mark.parametrize("truth", [0.6, -0.6])
@pytest.mark.parametrize("kind", ["better", "same"])
@pytest.mark.long
def test_family_wise_error_at_the_bounds(kind: str, truth: float) -> None:
    """Every difference is exactly one of the bounds: to call it equivalent (or of the other sign) is wrong."""
    times = drawn(400)
    found = ends(studies(np.random.default_rng(2), NOISE["normal"], times, 3) + truth, within=0.6, kind=kind)
    right = ("supported" if truth > 0 else "refuted") if kind == "better" else "refuted"
    wrong = sum(any(verdict not in (right, "inconclusive") for verdict, _ in row) for row in found)
    assert wrong <= stats.binom.ppf(0.999, times, 0.05)


@pytest.mark.parametrize(("family", "share"), [(1, 0.95), (3, 0.93), (6, 0.9)])
def test_equal_variants_end_as_equivalent_within_24_pairs_at_sd_equal_to_the_bounds(family: int, share: float) -> None:
    times = drawn(300)
    data = studies(np.random.default_rng(3), NOISE["normal"], times // family, family)
    each = [decision for row in ends(data, within=1.0) for decision in row]
    rate = np.mean([verdict == "equivalent" and pairs <= 24 for verdict, pairs in each])
    assert rate > share - 3 * math.sqrt(share * (1 - share) / times)


@pytest.mark.parametrize(("effect", "least", "lost", "saved"), [(0.75, 0.95, 0.04, 16), (1.0, 0.99, 0.01, 25)])
def test_power_and_seeds_saved_beside_a_fixed_design(effect: float, least: float, lost: float, saved: float) -> None:
    """Six hypotheses; the fixed design has the seeds of the last look and tests at 0.05 / 6."""
    times = 50
    data = studies(np.random.default_rng(4), NOISE["normal"], times, 6) + effect
    each = [decision for row in ends(data) for decision in row]
    power, pairs = np.mean([verdict == "supported" for verdict, _ in each]), np.mean([pairs for _, pairs in each])
    error = math.sqrt(least * (1 - least) / times)  # hypotheses of a study are correlated: counted as one
    assert power > least - 3 * error and power > power_of(effect, 1.0, LAST, 0.05 / 6) - lost - 3 * error
    assert LAST - pairs > saved


@pytest.mark.parametrize(("effect", "within"), [(0.0, 1.0), (0.0, None), (0.75, None), (0.6, 0.8)])
def test_what_is_expected_is_what_happens(effect: float, within: float | None) -> None:
    times = drawn(150)
    data = studies(np.random.default_rng(5), NOISE["normal"], times, 1) * 2 + effect * 2
    claim = {"within": None if within is None else 2 * within}
    levels = Looks().levels(4)
    found = [decide(Contrast(study[0], **claim), Looks(), levels) for study in data]
    told = expected(Contrast(np.array([]), **claim), Looks(), 4, 2 * effect, 2.0)
    pairs = [decision.pairs for decision in found]
    assert np.mean(pairs) == pytest.approx(told.pairs, abs=4 * np.std(pairs) / math.sqrt(times) + 1.0)
    for name in ("supported", "refuted", "equivalent", "inconclusive"):
        rate, chance = np.mean([decision.verdict.verdict == name for decision in found]), getattr(told, name)
        assert abs(rate - chance) <= 4 * math.sqrt(max(chance * (1 - chance), 0.005) / times)
    assert told.supported + told.refuted + told.equivalent + told.inconclusive == pytest.approx(1.0)


def test_decisions_never_change_however_seeds_arrive() -> None:
    rng = np.random.default_rng(6)
    whole = rng.normal(1.0, 1, 48)
    final = replay([Contrast(whole)], Looks())[0]
    assert final.verdict.verdict == "supported" and final.pairs < 48
    data, seen = np.full(48, math.nan), []
    for index in rng.permutation(48):
        data[index] = whole[index]
        seen.append(replay([Contrast(data.copy())], Looks())[0])
    first = next(index for index, decision in enumerate(seen) if not decision.open)
    assert all(decision == final for decision in seen[first:]) and all(decision.open for decision in seen[:first])
    assert not np.isnan(data[: final.pairs]).any() and final.verdict.found.difference.n == final.pairs


def test_a_look_sees_its_own_pairs_alone() -> None:
    data = np.concatenate([np.linspace(0.9, 1.1, 12), np.full(3, -50.0)])
    assert replay([Contrast(data)] * 2, Looks())[0] == replay([Contrast(data[:12])] * 2, Looks())[0]
    assert replay([Contrast(data)] * 2, Looks())[0].verdict.note == "decided at 12 pairs"


def test_open_hypotheses_say_what_they_wait_for() -> None:
    data = np.random.default_rng(7).normal(0.3, 1, 14)
    data[5] = math.nan
    found = replay([Contrast(data)] * 3, Looks())[0]
    assert found.open and found.pairs == 0 and found.verdict.verdict == "open"
    assert "next look at 12 pairs, waits for pair 6; about" in found.verdict.note and 1 <= found.further <= 43
    nothing = replay([Contrast(np.array([]))], Looks())[0]
    assert nothing.open and nothing.further == 48 and nothing.verdict.p_corrected == 1.0
    assert math.isnan(nothing.verdict.p_equivalent) and replay([], Looks()) == []


def test_expected_further_pairs_follow_what_is_seen() -> None:
    noise = np.random.default_rng(8).normal(size=10)
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    few, many = (replay([Contrast(noise + mean)] * 2, Looks())[0].further for mean in (1.5, 0.3))
    assert 2 <= few < 6 < many <= 38


def test_undecided_at_the_last_look_is_closed() -> None:
    found = replay([Contrast(np.tile([1.0, -1.0], 30))], Looks())[0]
    assert (found.open, found.pairs, found.further) == (False, 48, 0.0)
    assert found.verdict.note == "not decided at 48 pairs"
    hopeless = replay([Contrast(np.ones(4))] * 100, Looks((4, 6), (0.5, 0.5)))[0]
    assert not hopeless.open and "can decide nothing" in hopeless.verdict.note


def test_levels_are_spent_as_declared() -> None:
    looks = Looks()
    assert sum(looks.shares) == pytest.approx(1.0)
    for family in (1, 2, 6, 30, 1000):
        assert family * sum(looks.levels(family)) == pytest.approx(0.05)  # what the first looks cannot use goes on
    assert looks.levels(1) == pytest.approx([0.05 * share for share in looks.shares])
    assert [looks.earliest(family) for family in (1, 2, 6, 50, 2000)] == [8, 12, 12, 16, 24]
    half = Looks((6, 10), (0.25, 0.25))
    assert half.levels(1) == (0.0, 0.025) and half.earliest(1) == 10  # 6 pairs give 0.031 at the least
    assert Looks((4, 5), (0.5, 0.5)).earliest(1) is None and Looks((4, 5), (0.5, 0.5)).levels(1) == (0.0, 0.0)


@pytest.mark.parametrize("family", [1, 6])
def test_the_earliest_look_can_decide_and_none_before_can(family: int) -> None:
    first = Looks().earliest(family)
    assert first is not None
    found = replay([Contrast(np.linspace(1, 2, 48))] * family, Looks())[0]
    assert (found.verdict.verdict, found.pairs) == ("supported", first)


@pytest.mark.parametrize(
    ("pairs", "shares", "alpha"),
    [
        ((8, 8), (0.5, 0.5), 0.05),
        ((), (), 0.05),
        ((8, 9), (0.5,), 0.05),
        ((8, 9), (0.6, 0.6), 0.05),
        ((8,), (0.0,), 0.05),
        ((8,), (1.0,), 1.0),
    ],
)
def test_looks_that_make_no_sense(pairs: tuple[int, ...], shares: tuple[float, ...], alpha: float) -> None:
    with pytest.raises(ValueError, match=r"must|min"):
        Looks(pairs, shares, alpha)
