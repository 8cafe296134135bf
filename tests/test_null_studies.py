"""Whole studies of equal variants: what their reports conclude is wrong no more often than promised."""

from __future__ import annotations

from typing import Any

import numpy as np
from records import of_seeds
from scipy import stats
from sizes import drawn

from bench.stats import dominance, judge
from bench.store.manifest import HypothesisRow, Measure
from reports.claims import hypotheses
from reports.exit_rules import findings
from reports.fronts import points_by_seed

SEEDS = 8


def null(number: int) -> tuple[Any, Any]:
    """A study of two equal variants on two tasks: skewed noise of the seed, the same for both, and some of each."""
    rng = np.random.default_rng([5, number])
    shared = 0.02 * rng.exponential(size=(2, SEEDS))
    own = 0.01 * rng.normal(size=(2, 2, SEEDS))

    def noise(variant: str, task: str, seed: int) -> float:
        at = int(task == "kjv")
        return float(shared[at, seed] + own[int(variant == "ztt"), at, seed]) - 0.05

    return of_seeds(SEEDS, noise)


def claims() -> list[HypothesisRow]:
    """That ztt is better, that htc is, that they are the same: on a task, and over both."""
    p_hop = Measure(task="p_hop", metric="accuracy", higher_is_better=True)
    kjv = Measure(task="kjv", metric="bits_per_byte", higher_is_better=False)

    def claim(text: str, measures: list[Measure], better: str = "ztt", **fields: Any) -> HypothesisRow:
        than = "htc" if better == "ztt" else "ztt"
        row = {"claim": text, "better": better, "than": than, "task": "all", "margin": 0.0, "measures": measures}
        return HypothesisRow(**{**row, **fields})

    return [
        claim("better on p_hop", [p_hop]),
        claim("worse on kjv", [kjv], better="htc", within=0.02),
        claim("better over both", [p_hop, kjv]),
        claim("not the same on p_hop", [p_hop], kind="same", within=0.0001),
    ]


def test_verdicts_on_equal_variants_are_wrong_no_more_often_than_they_say() -> None:
    times, wrong, equal, uncorrected = drawn(200), 0, 0, 0
    for number in range(times):
        manifest, results = null(number)
        family = hypotheses(manifest.but(hypotheses=claims()), results)
        found = judge([claim.contrast for claim in family])
        # of equal variants "equivalent" is right, and so is that they are the same
        said = [one.verdict for one in found]
        wrong += any(one in ("supported", "refuted") for one in said[:3]) or said[3] == "refuted"
        equal += said[1] == "equivalent"
        uncorrected += any(one.found.p < 0.05 for one in found[:3])
    assert wrong <= stats.binom.ppf(0.999, times, 0.05) and wrong < uncorrected
    assert equal > 0, "and something can be concluded"


def test_no_front_of_equal_variants_dominates_more_often_than_the_other() -> None:
    times, one_exit, fronts = 60, [], []
    for number in range(times):
        manifest, results = null(number)
        a, b = (
            [points_by_seed(manifest, results, v, manifest.tasks[0])[seed] for seed in range(SEEDS)]
            for v in ("ztt", "htc")
        )
        fronts.append([dominance(x, y, True).probability for x, y in ((a, b), (b, a))])
        last = [[points[-1:] for points in side] for side in (a, b)]
        one_exit.append([dominance(x, y, True).probability for x, y in (last, last[::-1])])
    for found in (np.array(fronts), np.array(one_exit)):
        gap = found[:, 0] - found[:, 1]
        assert abs(gap.mean()) < 3.3 * gap.std(ddof=1) / np.sqrt(times)
        assert (found.sum(axis=1) <= 1).all() and gap.std() > 0.1
    whole = np.array(one_exit).sum(axis=1)
    assert whole.mean() > 0.8, "of fronts of one point one dominates, but for ties of the medians"
    assert abs(np.array(one_exit)[:, 0].mean() - whole.mean() / 2) < 0.12


def test_rules_that_are_worth_the_same_are_seldom_told_apart() -> None:
    times, wrong = drawn(100), 0
    for number in range(times):
        rng = np.random.default_rng([9, number])
        manifest, results = of_seeds(SEEDS)
        manifest = manifest.but(tasks=manifest.tasks[:1])
        for record in results.values():
            rules, template = record.exits.rules, record.exits.rules["confidence"]
            for key in ("zero_attention", "confidence", "kl", "entropy"):
                rules[key] = template.but(area=0.05 + 0.01 * rng.normal())
        wrong += any(" it is better" in line or " it is worse" in line for line in findings(manifest, results))
    assert wrong <= stats.binom.ppf(0.999, times, 0.05)
