"""Studies side by side: the variants that they share, and what differs between them, paired by seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from bench.config import FIRST_PILOT
from bench.stats import Contrast, interval, judge
from bench.store.manifest import Manifest, TaskRow
from bench.store.records import Outcome, Record
from reports.claims import Claim
from reports.policy import ENDS, Row, Rows, titled, told
from reports.table import cells, mean_costs, score
from reports.units import bounds, gap_bounds, human, metric_name
from reports.verdicts import READINGS, UNTESTED, numbers


class Side(NamedTuple):
    """A run of a study. name: what it is called in the tables; results: its records by cell id."""

    name: str
    manifest: Manifest
    results: dict[str, Outcome]

    def done(self, variant: str, task: str) -> dict[int, Record]:
        """The finished records of a variant on a task by seed."""
        found = cells(self.manifest, self.results, variant, task)
        return {seed: record for seed, record in found if record is not None and record.status == "done"}


class Shared(NamedTuple):
    """A variant on a task that several runs have, by labels, with the same metric; sides: those that have it."""

    task: TaskRow
    variant: str
    sides: list[Side]


def shared(sides: Sequence[Side]) -> Iterator[Shared]:
    """What at least two of the runs have, in the order of the first that has it.

    A task is the same if its label, its kind and its metric are, a variant if its label and its kind are; their shapes,
    training and data may be others: that is what is compared.
    """
    tasks = {(row.label, row.task, row.metric): row for side in reversed(sides) for row in side.manifest.tasks}
    variants = {(row.label, row.variant): row for side in reversed(sides) for row in side.manifest.variants}
    of_task = [{(row.label, row.task, row.metric) for row in side.manifest.tasks} for side in sides]
    of_variant = [{(row.label, row.variant) for row in side.manifest.variants} for side in sides]
    order = [(row.label, row.task, row.metric) for side in sides for row in side.manifest.tasks]
    names = [(row.label, row.variant) for side in sides for row in side.manifest.variants]
    for task in dict.fromkeys(order):
        for variant in dict.fromkeys(names):
            have = [side for side, t, v in zip(sides, of_task, of_variant, strict=True) if task in t and variant in v]
            if len(have) > 1:
                yield Shared(tasks[task], variants[variant].label, have)


def side_by_side(sides: Sequence[Side]) -> Rows:
    """The test score of every shared variant in each run: mean, its ends, and seeds done; and its training FLOPs."""
    rows, shown = [], []
    for found in shared(sides):
        row: Row = {"task": found.task.label, "variant": found.variant, "metric": metric_name(found.task.metric)}
        for side in sides:
            records = side.done(found.variant, found.task.label) if side in found.sides else {}
            over = interval([score(r, found.task.metric) for r in records.values()], bounds(found.task.metric))
            shown.append(over)
            column = side.name if side.name not in ("task", "variant", "metric") else f"run {side.name}"
            row[column] = f"{told(over)} (n = {over.n})" if over.n else "-"
        for side in sides:
            records = side.done(found.variant, found.task.label) if side in found.sides else {}
            row[f"FLOPs, {side.name}"] = human(mean_costs(records.values()).train_flops) if records else "-"
        rows.append(row)
    return titled(rows, {"": shown})


def apart(sides: Sequence[Side]) -> Rows:
    """Every other run against the first, variant by variant: differences of the seeds that both have, corrected over
    all that can differ. Positive: the metric is higher in the other run. Pilot seeds are left out, and nothing is
    tested where a run added seeds by what they showed.
    """
    claims, signs, untested = [], [], []
    first = sides[0]
    for found in shared(sides):
        task, label = found.task, found.task.label
        for other in found.sides if found.sides[0] is first else ():
            if other is first:
                continue
            before, after = first.done(found.variant, label), other.done(found.variant, label)
            seeds = sorted(seed for seed in before.keys() & after.keys() if seed < FIRST_PILOT)
            sign = 1 if task.higher_is_better else -1
            gaps = [score(after[seed], task.metric) - score(before[seed], task.metric) for seed in seeds]
            contrast = Contrast(sign * np.array(gaps, dtype=float), planned=max(len(before), len(after)))
            unit, limits = metric_name(task.metric), gap_bounds(task.metric)
            claims.append(Claim(found.variant, other.name, first.name, label, unit, contrast, limits))
            signs.append(sign)
            if not seeds:
                pilots = before.keys() & after.keys()
                untested.append(f"no seed in common{', pilot seeds are not compared' if pilots else ''}")
            elif all(before[seed].id == after[seed].id for seed in seeds):
                untested.append("the same cells")
            else:
                adding = any(side.manifest.decide is not None for side in (first, other))
                untested.append(UNTESTED if adding else "")
    rows, shown = [], []
    judged = iter(judge([claim.contrast for claim, why in zip(claims, untested, strict=True) if not why]))
    for claim, sign, why in zip(claims, signs, untested, strict=True):
        one = judge([claim.contrast])[0] if why else next(judged)
        row = {"task": claim.task, "variant": claim.text, "run": claim.better, "against": claim.than}
        row |= {"metric": claim.unit, **numbers(claim, one, "difference", sign)}
        for name in ("p of equivalence", "detectable"):
            del row[name]
        if why:
            row |= dict.fromkeys(("p", "corrected p"), "-")
        reading = "; ".join(part for part in (READINGS[one.verdict], one.note) if part)
        rows.append({**row, "reading": why or reading})
        shown.append(one.found.difference)
    return titled(rows, {ENDS: shown})
