"""The tables of what the seeds can tell: a study's hypotheses, and every variant against the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bench.stats import Contrast, Interval, Verdict, judge, over_tasks
from bench.store.manifest import HypothesisRow, Manifest, Measure
from bench.store.records import Outcome
from reports.table import Row, cells, score
from reports.units import metric_name


@dataclass(frozen=True)
class Claim:
    """A hypothesis, or a contrast to the reference, with its paired differences (positive is as claimed)."""

    text: str
    better: str
    than: str
    task: str
    unit: str
    contrast: Contrast


def hypotheses(manifest: Manifest, results: dict[str, Outcome]) -> list[Claim]:
    """The study's hypotheses, in their order; none if it declares none."""
    return [_claim(manifest, results, entry) for entry in manifest.hypotheses]


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
                claim=f"{other} better than {reference}",
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


def verdicts(manifest: Manifest, results: dict[str, Outcome]) -> list[Row]:
    """The verdict on each of the study's hypotheses, with Holm's correction over all of them."""
    claims = hypotheses(manifest, results)
    rows = []
    for claim, found in zip(claims, judge([claim.contrast for claim in claims]), strict=True):
        margin = f" by more than {claim.contrast.margin:g}" if claim.contrast.margin else ""
        row = {
            "hypothesis": claim.text,
            "verdict": found.verdict,
            "compared": f"{claim.better} over {claim.than}{margin}",
        }
        rows.append({**row, "task": claim.task, "metric": claim.unit, **_numbers(claim, found, "gain", 1)})
        rows[-1]["note"] = found.note
    return rows


def differences(manifest: Manifest, results: dict[str, Outcome]) -> list[Row]:
    """Every variant against the reference, paired by the seeds that both have, with Holm's correction within a task."""
    rows = []
    words = {"supported": "better", "refuted": "worse", "inconclusive": "no difference shown"}
    higher = {task.label: task.higher_is_better for task in manifest.tasks}
    for task, claims in contrasts(manifest, results).items():
        for claim, found in zip(claims, judge([claim.contrast for claim in claims]), strict=True):
            row = {"task": task, "variant": claim.better, "reference": claim.than, "metric": claim.unit}
            row |= _numbers(claim, found, "difference", 1 if higher[task] else -1)
            if found.found.difference.n:
                reading = "; ".join(part for part in (words[found.verdict], found.note) if part)
            else:
                reading = f"no pair of seeds: {found.note}"
            rows.append({**row, "reading": reading})
    return rows


def _claim(manifest: Manifest, results: dict[str, Outcome], entry: HypothesisRow) -> Claim:
    """Differences of a manifest's hypothesis, by the seeds that have every cell it needs."""
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
    seeds = sorted(set.intersection(*map(set, gaps)))
    units = sorted({metric_name(measure.metric) for measure in entry.measures})
    data = over_tasks([[gap[seed] for seed in seeds] for gap in gaps], len(units) == 1)
    unit = units[0] if len(units) == 1 else f"{' and '.join(units)} (scaled)"
    contrast = Contrast(data, float(entry.margin), len(planned), len(failed))
    return Claim(entry.claim, entry.better, entry.than, entry.task, unit, contrast)


def _numbers(claim: Claim, judged: Verdict, name: str, sign: int) -> dict[str, str]:
    """The numbers of a row. sign: -1 shows the metric's own direction where lower is better."""
    found, n = judged.found, judged.found.difference.n
    effect = "-" if math.isnan(found.effect_size) else f"{sign * found.effect_size:+.2f}"
    return {
        name: f"{sign * found.difference.mean:+.3f}" if n else "-",
        "95 % interval": _interval(found.difference, sign),
        "p": f"{found.p:.3g}" if n > 1 else "-",
        "Holm p": f"{judged.p_corrected:.3g}" if n > 1 else "-",
        "pairs": f"{n}/{claim.contrast.planned}",
        "Hedges g": effect,
        "detectable": detectable_text(judged.detectable),
    }


def detectable_text(value: float) -> str:
    """A smallest detectable effect; "none" where no effect could be significant."""
    if math.isnan(value):
        return "-"
    return "none" if np.isinf(value) else f"{value:.3g}"


def _interval(gap: Interval, sign: int) -> str:
    if math.isnan(gap.low):
        return "-"
    low, high = sorted((sign * gap.low, sign * gap.high))
    return f"[{low:+.3f}, {high:+.3f}]"
