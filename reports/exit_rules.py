"""The table and the sentences of exit rules: what each is worth, and whether one is shown to be worth more."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.stats import Contrast, Interval, interval, judge
from bench.store.manifest import Manifest
from bench.store.records import Outcome, Record, TunedThreshold
from reports.exit_figures import BOUNDS, BUDGET, ZERO_ATTENTION, common_rules, mean_rank, with_exits
from reports.policy import NOTHING, Rows, can_rank, titled, told, told_seeds, within
from reports.table import Row, exits_of
from reports.units import bounds, gap_bounds

DIGITS = 4
Areas = dict[str, NDArray[np.float64]]
"""The areas [n] of each rule, an entry a seed."""


def rule_rows(manifest: Manifest, results: dict[str, Outcome]) -> Rows:
    """A row for each rule, variant and task: its figure of merit, and what it gives when tuned."""
    rows: list[Row] = []
    shown: list[Interval] = []
    for task in manifest.tasks:
        name = task.metric
        for label, records in with_exits(manifest, results, task):
            for key in common_rules(records):
                rules = [exits_of(record).rules[key] for record in records]
                tuned = [point for rule in rules for point in rule.tuned if abs(point.budget - BUDGET) < 1e-9]
                whole = len(tuned) == len(rules)
                ranks = [known for rule in rules if (known := mean_rank(rule)) is not None]
                area = interval([rule.area for rule in rules], gap_bounds(name))
                rank = interval(ranks, (-1.0, 1.0)) if len(ranks) == len(rules) else NOTHING
                test = interval([point.test[name] for point in tuned], bounds(name)) if whole else NOTHING
                used = np.mean([_used(r, t) for r, t in zip(records, tuned, strict=True)]) if whole else np.nan
                shown += [area, rank, test]
                rows.append(
                    {
                        "task": task.label,
                        "variant": label,
                        "rule": key,
                        "area against random": told(area, DIGITS),
                        "rank correlation": told(rank, DIGITS),
                        f"tuned for {BUDGET:.0%} of the FLOPs": told(test, DIGITS),
                        "FLOPs used": f"{used:.1%}" if whole else "-",
                        "seeds": str(len(rules)),
                    }
                )
    return titled(rows, {"": shown})


class _Case(NamedTuple):
    """A task and a variant with exits: its rules' areas, and the differences of zero attention to every other rule."""

    task: str
    variant: str
    areas: Areas
    limits: tuple[float, float] | None

    @property
    def others(self) -> list[str]:
        """The rules that the zero attention is compared with."""
        here = ZERO_ATTENTION in self.areas
        return [key for key in self.areas if here and key not in BOUNDS and not key.startswith(ZERO_ATTENTION)]

    def contrast(self, other: str) -> Contrast:
        """Zero attention against another rule, paired by seed."""
        return Contrast(differences=self.areas[ZERO_ATTENTION] - self.areas[other])


def findings(manifest: Manifest, results: dict[str, Outcome]) -> list[str]:
    """One plain sentence for each task and variant with exits: which rule is worth most, and whether the attention to
    the zero tokens is shown to be worth more or less than the others are.

    The comparisons of the zero attention with every other rule, of every variant, are one family on a task, for which
    they are corrected: otherwise the best of many rules would be taken and judged by the same numbers. Below
    FEWEST_FOR_INTERVAL seeds nothing is ranked and nothing compared; nor is anything tested on pilot seeds, or where
    seeds were added by what they showed.
    """
    found = []
    for task in manifest.tasks:
        cases = [
            _Case(task.label, label, _areas(records), gap_bounds(task.metric))
            for label, records in with_exits(manifest, results, task)
        ]
        found += _of_a_task([case for case in cases if set(case.areas) - set(BOUNDS)], manifest.tested)
    return found


def _of_a_task(cases: list[_Case], tested: bool) -> list[str]:
    compared = [(number, case) for number, case in enumerate(cases) if tested and _enough(case)]
    pairs = [(number, other) for number, case in compared for other in case.others]
    found = judge([cases[number].contrast(other) for number, other in pairs])
    told_apart: dict[int, dict[str, str]] = {}
    for (number, other), one in zip(pairs, found, strict=True):
        told_apart.setdefault(number, {})[other] = one.verdict
    return [_finding(case, told_apart.get(number, {}), len(pairs)) for number, case in enumerate(cases)]


def _finding(case: _Case, verdicts: dict[str, str], family: int) -> str:
    means = {key: interval(values, case.limits) for key, values in case.areas.items()}
    rules = [key for key in means if key not in BOUNDS]
    n = means[rules[0]].n
    text = f"{case.task}, {case.variant}: "
    if not _enough(case):
        text += f"{len(rules)} rules against leaving at random, over {told_seeds([n])}, too few to rank them"
        if ZERO_ATTENTION in means:
            text += f"; zero attention is worth {told(means[ZERO_ATTENTION], DIGITS)}"
        return f"{text}{_fixed(means)}."
    order = sorted(rules, key=lambda key: -means[key].mean)
    first = order[0]
    text += f"of {len(rules)} rules the one worth most against leaving at random is {first} with "
    text += f"{told(means[first], DIGITS)}{_fixed(means)}"
    if verdicts:
        best = next(key for key in order if key in verdicts)
        apart = interval(case.areas[ZERO_ATTENTION] - case.areas[best])
        text += f"; zero attention is number {order.index(ZERO_ATTENTION) + 1} with "
        text += f"{told(means[ZERO_ATTENTION], DIGITS)}, a difference of {told(within(apart, case.limits), DIGITS)} "
        text += f"to {best}, paired by seed; after correction over {family} comparisons it is {_reading(verdicts)}"
    return f"{text} ({told_seeds([n])})."


def _reading(verdicts: dict[str, str]) -> str:
    """How many of the other rules the zero attention is told apart from, and how."""
    better, worse = (sum(one == word for one in verdicts.values()) for word in ("supported", "refuted"))
    parts = [f"{word} than {n}" for word, n in (("better", better), ("worse", worse)) if n]
    if not parts:
        return f"not shown to differ from any of {len(verdicts)} other rules"
    return f"{' and '.join(parts)} of {len(verdicts)} other rules"


def _fixed(means: dict[str, Interval]) -> str:
    if "fixed" not in means:
        return ""
    return f"; leaving all after the same number of cycles is worth {told(means['fixed'], DIGITS)}"


def _areas(records: list[Record]) -> Areas:
    return {key: np.array([exits_of(r).rules[key].area for r in records]) for key in common_rules(records)}


def _enough(case: _Case) -> bool:
    return can_rank(*(len(values) for values in case.areas.values()))


def _used(record: Record, point: TunedThreshold) -> float:
    return point.test["flops_per_token"] / exits_of(record).points[-1].flops_per_token
