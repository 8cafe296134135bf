"""From a manifest and its results to the paired differences of a claim, and to the verdicts on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from bench.config import FIRST_PILOT
from bench.stats import Contrast, Decision, Looks, Verdict, judge, over_tasks, replay
from bench.store.manifest import HypothesisRow, Manifest
from bench.store.records import Outcome


def looks_of(manifest: Manifest) -> Looks | None:
    """The looks of a deciding study, None of one whose seeds were fixed before."""
    row = manifest.decide
    return None if row is None else Looks(tuple(row.looks), tuple(row.shares), row.alpha)


def contrast_of(manifest: Manifest, results: Mapping[str, Outcome], entry: HypothesisRow) -> Contrast:
    """The differences of a claim, positive as claimed, in the order of the seeds that both variants have.

    NaN where a cell that the pair needs, on any of the tasks, is not done. Pilot seeds are left out.
    """
    ids = {(cell.variant, cell.task, cell.seed): cell.id for cell in manifest.cells if cell.seed < FIRST_PILOT}
    seeds: set[int] = set()
    failed: set[int] = set()
    gaps: list[dict[int, float]] = []
    for measure in entry.measures:
        a, b = (
            {seed: results.get(id) for (variant, task, seed), id in ids.items() if (variant, task) == (v, measure.task)}
            for v in (entry.better, entry.than)
        )
        gap = {}
        for seed in a.keys() & b.keys():
            records = [a[seed], b[seed]]
            scores = [r.test(measure.metric) for r in records if r is not None and r.status == "done"]
            if len(scores) == 2:
                gap[seed] = scores[0] - scores[1] if measure.higher_is_better else scores[1] - scores[0]
            elif any(r is not None and r.status == "failed" for r in records):
                failed.add(seed)
        seeds |= a.keys() & b.keys()
        gaps.append(gap)
    order = sorted(seeds)
    there = [seed for seed in order if all(seed in gap for gap in gaps)]
    same = len({measure.metric for measure in entry.measures}) == 1
    first = None
    if (looks := looks_of(manifest)) is not None:
        first = sum(seed in there for seed in order[: looks.pairs[0]]) or None
    found = dict(zip(there, over_tasks([[gap[seed] for seed in there] for gap in gaps], same, first), strict=True))
    return Contrast(
        np.array([found.get(seed, math.nan) for seed in order], dtype=float),
        margin=float(entry.margin),
        within=entry.within,
        planned=len(order),
        failed=len(failed),
    )


def decisions_of(manifest: Manifest, results: Mapping[str, Outcome]) -> list[Decision]:
    """Where each hypothesis of a deciding study stands, by taking its looks again; none of any other study."""
    looks = looks_of(manifest)
    if looks is None:
        return []
    return replay([contrast_of(manifest, results, entry) for entry in manifest.hypotheses], looks)


def verdicts_of(manifest: Manifest, family: Sequence[Contrast]) -> list[Verdict]:
    """The verdicts on a study's hypotheses: by its looks where it decides, else of all seeds, corrected for all."""
    looks = looks_of(manifest)
    return judge(family) if looks is None else [decision.verdict for decision in replay(family, looks)]
