"""Claims with what the seeds say to them: paired differences, positive as claimed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from bench.evaluate.targets import AREA, rule_of, target_of, unit_of
from bench.stats import Contrast
from bench.store.manifest import HypothesisRow, Manifest, Measure
from bench.store.records import Outcome
from bench.study.contrasts import pairs_of
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


def hypotheses(
    manifest: Manifest, results: dict[str, Outcome], apart: bool = False, pilots: bool = False
) -> list[Claim]:
    """The study's hypotheses, in their order; none if it declares none.

    Args:
        manifest: of the study.
        results: records by cell id.
        apart: one over tasks whose metrics have different units is told of each of them alone.
        pilots: whether pilot seeds are taken too.
    """
    entries = [part for entry in manifest.hypotheses for part in (_by_task(entry) if apart else [entry])]
    return [_claim(manifest, results, entry, pilots) for entry in entries]


def _by_task(entry: HypothesisRow) -> list[HypothesisRow]:
    if len({(measure.metric, measure.of) for measure in entry.measures}) == 1:
        return [entry]
    return [entry.but(claim=f"{entry.claim} (alone)", task=one.task, measures=[one]) for one in entry.measures]


def compared(manifest: Manifest) -> list[tuple[str, str, str, bool]]:
    """What variants are compared in: how it is called, the task trained on, the metric, and whether higher is better.
    A task of the harness that models of several tasks are scored on is called by both.
    """
    twice = Counter(row.key for row in manifest.harness)
    asked = [(task.label, task.label, task.metric, task.higher_is_better) for task in manifest.tasks]
    for row in manifest.harness:
        name = row.key if twice[row.key] == 1 else f"{row.key} on {row.task}"
        asked.append((name, row.task, row.score, row.higher_is_better))
    return asked


def contrasts(manifest: Manifest, results: dict[str, Outcome], pilots: bool = False) -> dict[str, list[Claim]]:
    """Every variant against the reference by task; no task if the study has no reference.

    Args:
        manifest: of the study.
        results: records by cell id.
        pilots: whether pilot seeds are taken too.
    """
    reference = manifest.reference
    if not reference:
        return {}
    found = {}
    for name, label, metric, up in compared(manifest):
        others = [variant.label for variant in manifest.variants if variant.label != reference]
        measures = [Measure(task=label, metric=metric, higher_is_better=up)]
        entries = [
            HypothesisRow(
                claim=f"{other} against {reference}",
                better=other,
                than=reference,
                task=name,
                margin=0.0,
                measures=measures,
            )
            for other in others
        ]
        found[name] = [_claim(manifest, results, entry, pilots) for entry in entries]
    return {task: claims for task, claims in found.items() if claims}


def _claim(manifest: Manifest, results: dict[str, Outcome], entry: HypothesisRow, pilots: bool) -> Claim:
    """Differences of a manifest's hypothesis, in the order of the seeds: NaN where a cell that it needs is not done."""
    units, pairs = sorted({_unit(measure) for measure in entry.measures}), pairs_of(manifest, results, entry, pilots)
    unit = units[0] if len(units) == 1 else f"{' and '.join(units)}{SCALED}"
    bounds = gap_bounds(unit_of(entry.measures[0])) if len(units) == 1 else None
    told = ""
    # Of a deciding study that the verdict saw: later pairs are there for other claims.
    seen = next((row.pairs for row in manifest.decisions if row.claim == entry.claim), None)
    counts = pairs.counts(seen)
    if counts.runs and any(target_of(measure.metric) for measure in entry.measures):
        a, b = (counts.runs - missed for missed in counts.missed)
        told = f"reached by {a} of {counts.runs} runs of {entry.better} and {b} of {entry.than}"
        if counts.cut:
            told += f", in {counts.cut} of {counts.runs} pairs beyond the smaller training: there the ratio is cut off"
    return Claim(entry.claim, entry.better, entry.than, entry.task, unit, pairs.contrast, bounds, told)


def _unit(measure: Measure) -> str:
    """What a difference is of, in words."""
    if target_of(measure.metric):
        return f"log ratio of {metric_name(measure.metric)}"
    if rule := rule_of(measure.metric):
        other = rule_of(measure.than_metric or "")
        return f"{metric_name(measure.of or '')} gained by exits ({rule}{f' against {other}' if other else ''})"
    of = f" ({metric_name(measure.of)})" if measure.metric == AREA and measure.of else ""
    return f"{metric_name(measure.metric)}{of}"
