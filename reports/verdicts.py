"""What the seeds can tell: a study's hypotheses, as a table and in words, and every variant against the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.stats import Contrast, Verdict, judge, over_tasks
from bench.store.manifest import HypothesisRow, Manifest, Measure
from bench.store.records import Outcome
from reports.policy import ENDS, Rows, counted, ends, titled, told, within
from reports.table import Row, cells, score
from reports.units import gap_bounds, metric_name

SCALED = " (scaled)"  # marks the unit of a difference over tasks that have none in common


@dataclass(frozen=True)
class Claim:
    """A hypothesis, or a contrast to the reference, with its paired differences (positive is as claimed).

    bounds: the least and the greatest difference there can be, None if there are none or they are not known.
    """

    text: str
    better: str
    than: str
    task: str
    unit: str
    contrast: Contrast
    bounds: tuple[float, float] | None = None

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


def judged(claims: Sequence[Claim]) -> list[Verdict]:
    """The verdicts on all hypotheses of a study, corrected for all of them."""
    return judge([claim.contrast for claim in claims])


def verdicts(manifest: Manifest, results: dict[str, Outcome]) -> Rows:
    """The verdict on each of the study's hypotheses, corrected for all of them."""
    claims = hypotheses(manifest, results)
    rows: list[Row] = []
    found = judged(claims)
    for claim, one in zip(claims, found, strict=True):
        row = {"hypothesis": claim.text, "verdict": one.verdict, "compared": claim.compared}
        row |= {"task": claim.task, "metric": claim.unit, **_numbers(claim, one, "gain", 1)}
        rows.append({**row, "note": one.note})
    if all(math.isnan(one.p_equivalent) for one in found):
        rows = [{key: value for key, value in row.items() if key != "p of equivalence"} for row in rows]
    return titled(rows, {ENDS: [one.found.difference for one in found]})


def sentences(manifest: Manifest, results: dict[str, Outcome]) -> list[str]:
    """The verdict on each hypothesis in one plain sentence."""
    claims = hypotheses(manifest, results)
    return [_sentence(claim, found, len(claims)) for claim, found in zip(claims, judged(claims), strict=True)]


def differences(manifest: Manifest, results: dict[str, Outcome]) -> Rows:
    """Every variant against the reference, paired by the seeds that both have, corrected within a task."""
    rows, shown = [], []
    words = {"supported": "better", "refuted": "worse", "inconclusive": "no difference shown"}
    higher = {task.label: task.higher_is_better for task in manifest.tasks}
    for task, claims in contrasts(manifest, results).items():
        for claim, found in zip(claims, judged(claims), strict=True):
            row = {"task": task, "variant": claim.better, "reference": claim.than, "metric": claim.unit}
            row |= _numbers(claim, found, "difference", 1 if higher[task] else -1)
            del row["p of equivalence"]
            if found.found.difference.n:
                reading = "; ".join(part for part in (words[found.verdict], found.note) if part)
            else:
                reading = f"no pair of seeds: {found.note}"
            rows.append({**row, "reading": reading})
            shown.append(found.found.difference)
    return titled(rows, {ENDS: shown})


def _claim(manifest: Manifest, results: dict[str, Outcome], entry: HypothesisRow) -> Claim:
    """Differences of a manifest's hypothesis, in the order of the seeds: NaN where a cell that it needs is not done."""
    gaps: list[dict[int, float]] = []
    planned: set[int] = set()
    failed: set[int] = set()
    for measure in entry.measures:
        a, b = (dict(cells(manifest, results, label, measure.task)) for label in (entry.better, entry.than))
        gap = {}
        for seed in a.keys() & b.keys():
            records = [a[seed], b[seed]]
            scores = [score(record, measure.metric) for record in records if record and record.status == "done"]
            if len(scores) == 2:
                gap[seed] = scores[0] - scores[1] if measure.higher_is_better else scores[1] - scores[0]
            elif any(record and record.status == "failed" for record in records):
                failed.add(seed)
        planned |= a.keys() & b.keys()
        gaps.append(gap)
    units = sorted({metric_name(measure.metric) for measure in entry.measures})
    contrast = Contrast(
        differences=_in_order(gaps, sorted(planned), len(units) == 1),
        margin=float(entry.margin),
        planned=len(planned),
        failed=len(failed),
    )
    unit = units[0] if len(units) == 1 else f"{' and '.join(units)}{SCALED}"
    bounds = gap_bounds(entry.measures[0].metric) if len(units) == 1 else None
    return Claim(entry.claim, entry.better, entry.than, entry.task, unit, contrast, bounds)


def _in_order(gaps: Sequence[dict[int, float]], seeds: Sequence[int], same_unit: bool) -> np.ndarray:
    """One difference a seed, over all tasks; NaN where one of them lacks it."""
    there = [seed for seed in seeds if all(seed in gap for gap in gaps)]
    found = dict(zip(there, over_tasks([[gap[seed] for seed in there] for gap in gaps], same_unit), strict=True))
    return np.array([found.get(seed, math.nan) for seed in seeds], dtype=float)


def _numbers(claim: Claim, found: Verdict, name: str, sign: int) -> dict[str, str]:
    """The numbers of a row. sign: -1 shows the metric's own direction where lower is better."""
    gap = found.found.difference
    effect = found.found.effect_size
    return {
        name: f"{sign * gap.mean:+.3f}" if gap.n else "-",
        ENDS: ends(within(gap, claim.bounds), sign=sign, plus=True),
        "p": f"{found.found.p:.3g}" if gap.n > 1 else "-",
        "corrected p": f"{found.p_corrected:.3g}" if gap.n > 1 else "-",
        "p of equivalence": _known(found.p_equivalent) if gap.n > 1 else "-",
        "pairs": f"{gap.n}/{claim.contrast.planned}",
        "Hedges g": "-" if math.isnan(effect) else f"{sign * effect:+.2f}",
        "detectable": detectable_text(found.detectable),
    }


def _sentence(claim: Claim, found: Verdict, family: int) -> str:
    gap = found.found.difference
    start = f"{claim.text}: {found.verdict}"
    if not gap.n:
        return f"{start}: {found.note or 'no pair of seeds is planned'}."
    numbers = f"{told(within(gap, claim.bounds), plus=True)} {claim.unit} over {counted([gap.n])}"
    if gap.n > 1:
        numbers += f", {_p_values(claim, found)}"
        numbers += f" after correction over {family} hypotheses" if family > 1 else ""
    return f"{start}: {numbers}{f'; {found.note}' if found.note else ''}."


def _p_values(claim: Claim, found: Verdict) -> str:
    """The p-values that a verdict rests on."""
    differs = f"p = {found.p_corrected:.2g}"
    if claim.contrast.within is None:
        return differs
    equal = f"p = {found.p_equivalent:.2g} that it is within {claim.contrast.within:g}"
    if found.verdict == "inconclusive":
        return f"{differs} of a difference, {equal}"
    same = claim.contrast.kind == "same"
    return equal if found.verdict == ("supported" if same else "equivalent") else differs


def _known(p: float) -> str:
    return "-" if math.isnan(p) else f"{p:.3g}"


def detectable_text(value: float) -> str:
    """A smallest detectable effect; "none" where no effect could be significant."""
    if math.isnan(value):
        return "-"
    return "none" if np.isinf(value) else f"{value:.3g}"
