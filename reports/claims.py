"""Claims with what the seeds say to them: paired differences, positive as claimed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.evaluate.targets import AREA, read_metric, target_of
from bench.stats import Contrast, over_tasks, restricted
from bench.store.manifest import HypothesisRow, Manifest, Measure
from bench.store.records import Outcome, Record
from reports.table import cells
from reports.units import gap_bounds, metric_name

SCALED = " (scaled)"  # marks the unit of a difference over tasks that have none in common


@dataclass(frozen=True)
class Claim:
    """A hypothesis, or a contrast to the reference, with its paired differences (positive is as claimed).

    Attributes:
        unit: of the differences, in words.
        bounds: the least and the greatest difference there can be, None if there are none or they are not known.
        censored: how many runs did not reach the score that a cost is of, in words; empty for other metrics.
    """

    text: str
    better: str
    than: str
    task: str
    unit: str
    contrast: Contrast
    bounds: tuple[float, float] | None = None
    censored: str = ""

    @property
    def compared(self) -> str:
        """The two variants and what is claimed of them, in words."""
        if self.contrast.kind == "same":
            return f"{self.better} as {self.than}, within {self.contrast.within:g}"
        margin = f" by more than {self.contrast.margin:g}" if self.contrast.margin else ""
        return f"{self.better} over {self.than}{margin}"


def hypotheses(manifest: Manifest, results: dict[str, Outcome], apart: bool = False) -> list[Claim]:
    """The study's hypotheses, in their order; none if it declares none.

    apart: one over tasks whose metrics have different units is told of each of them alone.
    """
    entries = [part for entry in manifest.hypotheses for part in (_by_task(entry) if apart else [entry])]
    return [_claim(manifest, results, entry) for entry in entries]


def _by_task(entry: HypothesisRow) -> list[HypothesisRow]:
    if len({measure.metric for measure in entry.measures}) == 1:
        return [entry]
    return [entry.but(claim=f"{entry.claim} (alone)", task=one.task, measures=[one]) for one in entry.measures]


def contrasts(manifest: Manifest, results: dict[str, Outcome]) -> dict[str, list[Claim]]:
    """Every variant against the reference by task; no task if the study has no reference."""
    reference = manifest.reference
    if not reference:
        return {}
    found = {}
    for task in manifest.tasks:
        others = [variant.label for variant in manifest.variants if variant.label != reference]
        measures = [Measure(task=task.label, metric=task.metric, higher_is_better=task.higher_is_better)]
        entries = [
            HypothesisRow(
                claim=f"{other} against {reference}",
                better=other,
                than=reference,
                task=task.label,
                margin=0.0,
                measures=measures,
            )
            for other in others
        ]
        found[task.label] = [_claim(manifest, results, entry) for entry in entries]
    return {task: claims for task, claims in found.items() if claims}


def _claim(manifest: Manifest, results: dict[str, Outcome], entry: HypothesisRow) -> Claim:
    """Differences of a manifest's hypothesis, in the order of the seeds: NaN where a cell that it needs is not done."""
    gaps: list[dict[int, float]] = []
    planned: set[int] = set()
    failed: set[int] = set()
    missed, runs = [0, 0], 0
    for measure in entry.measures:
        a, b = (dict(cells(manifest, results, label, measure.task)) for label in (entry.better, entry.than))
        gap = {}
        for seed in a.keys() & b.keys():
            records = [a[seed], b[seed]]
            finished = [record for record in records if record and record.status == "done"]
            if len(finished) == 2:
                found, late = _gap(finished[0], finished[1], measure)
                missed, runs = [missed[0] + late[0], missed[1] + late[1]], runs + 1
                if not math.isnan(found):
                    gap[seed] = found
            elif any(record and record.status == "failed" for record in records):
                failed.add(seed)
        planned |= a.keys() & b.keys()
        gaps.append(gap)
    units = sorted({_unit(measure) for measure in entry.measures})
    contrast = Contrast(
        differences=_in_order(gaps, sorted(planned), len(units) == 1),
        margin=float(entry.margin),
        within=entry.within,
        kind=entry.kind,
        planned=len(planned),
        failed=len(failed),
    )
    unit = units[0] if len(units) == 1 else f"{' and '.join(units)}{SCALED}"
    first = entry.measures[0]
    bounds = gap_bounds(first.of if first.metric == AREA and first.of else first.metric) if len(units) == 1 else None
    told = ""
    if runs and any(target_of(measure.metric) for measure in entry.measures):
        told = f"not reached by {missed[0]} of {runs} runs of {entry.better} and {missed[1]} of {entry.than}"
    return Claim(entry.claim, entry.better, entry.than, entry.task, unit, contrast, bounds, told)


def _gap(a: Record, b: Record, measure: Measure) -> tuple[float, tuple[bool, bool]]:
    """By how much a is better than b on a task, NaN if that is not known; and which of them did not reach the score.

    Of costs the natural logarithm of b's over a's, within the budget that both have (``bench.stats.restricted``).
    """
    one, other = read_metric(a, measure), read_metric(b, measure)
    if one.budget is None or other.budget is None:
        gap = one.value - other.value
        return gap if measure.higher_is_better else -gap, (False, False)
    mine, theirs = (math.inf if reading.censored else reading.value for reading in (one, other))
    gap = float(restricted([mine], [theirs], one.budget, other.budget)[0])
    return gap, (one.censored, other.censored)


def _unit(measure: Measure) -> str:
    """What a difference is of, in words."""
    if target_of(measure.metric):
        return f"log ratio of {metric_name(measure.metric)}"
    of = f" ({metric_name(measure.of)})" if measure.metric == AREA and measure.of else ""
    return f"{metric_name(measure.metric)}{of}"


def _in_order(gaps: Sequence[dict[int, float]], seeds: Sequence[int], same_unit: bool) -> NDArray[np.float64]:
    """One difference a seed, over all tasks; NaN where one of them lacks it."""
    there = [seed for seed in seeds if all(seed in gap for gap in gaps)]
    found = dict(zip(there, over_tasks([[gap[seed] for seed in there] for gap in gaps], same_unit), strict=True))
    return np.array([found.get(seed, math.nan) for seed in seeds], dtype=float)
