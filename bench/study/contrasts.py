"""From a manifest and its results to the paired differences of a claim, and to the verdicts on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bench.config import FIRST_PILOT
from bench.evaluate.targets import read_metric
from bench.stats import Contrast, Looks, Verdict, judge, over_tasks, replay, restricted
from bench.stats.intervals import Array
from bench.stats.verdicts import DIGITS
from bench.store.manifest import HypothesisRow, Manifest, Measure
from bench.store.records import Outcome, Record


class Counts(NamedTuple):
    """missed: runs of either variant that did not reach the score that a cost is of, of so many runs; cut: pairs of
    which both did, one of them beyond the training that both had.
    """

    missed: tuple[int, int] = (0, 0)
    runs: int = 0
    cut: int = 0


@dataclass(frozen=True)
class Pairs:
    """What the seeds say of a claim.

    contrast: the differences, in the order of the seeds that both variants have; NaN where a cell that the pair needs,
    on any of the tasks, is not done. by_seed: ``Counts`` of each of these seeds.
    """

    contrast: Contrast
    by_seed: tuple[Counts, ...]

    def counts(self, first: int | None = None) -> Counts:
        """Of all seeds together, or of so many first ones."""
        some = self.by_seed[:first]
        missed = sum(one.missed[0] for one in some), sum(one.missed[1] for one in some)
        return Counts(missed, sum(one.runs for one in some), sum(one.cut for one in some))


class _Gap(NamedTuple):
    """By how much one run is better than another on a task: what is seen, and between which the truth lies.

    missed: which of them did not reach the score that a cost is of.
    """

    seen: float
    least: float
    most: float
    missed: tuple[bool, bool] = (False, False)


def looks_of(manifest: Manifest) -> Looks | None:
    """The looks of a deciding study, None of one whose seeds were fixed before."""
    row = manifest.decide
    return None if row is None else Looks(tuple(row.looks), tuple(row.shares), row.alpha)


def pairs_of(manifest: Manifest, results: Mapping[str, Outcome], entry: HypothesisRow, pilots: bool = False) -> Pairs:
    """What the seeds say of a claim, positive as claimed.

    Args:
        manifest: which cells there are.
        results: records by cell id; cells without one may be left out.
        entry: the claim.
        pilots: whether pilot seeds are taken too: to plan a study, never for a verdict.
    """
    seeds: set[int] = set()
    failed: set[int] = set()
    gaps: list[dict[int, _Gap]] = []
    counted: dict[int, Counts] = {}
    for measure in entry.measures:
        a, b = (_records(manifest, results, label, measure.task, pilots) for label in (entry.better, entry.than))
        gap = {}
        for seed in a.keys() & b.keys():
            records = [a[seed], b[seed]]
            finished = [record for record in records if record is not None and record.status == "done"]
            if len(finished) == 2:
                found = _gap(finished[0], finished[1], measure)
                missed, runs, cut = counted.get(seed, Counts())
                cut += not any(found.missed) and not found.least == found.seen == found.most
                counted[seed] = Counts((missed[0] + found.missed[0], missed[1] + found.missed[1]), runs + 1, cut)
                if not math.isnan(found.seen):
                    gap[seed] = found
            elif any(record is not None and record.status == "failed" for record in records):
                failed.add(seed)
        seeds |= a.keys() & b.keys()
        gaps.append(gap)
    order, looks = sorted(seeds), looks_of(manifest)
    there = [seed for seed in order if all(seed in gap for gap in gaps)]
    same = len({(measure.metric, measure.of) for measure in entry.measures}) == 1
    first = None if looks is None else sum(seed in there for seed in order[: looks.pairs[0]]) or None
    seen = np.array([[gap[seed].seen for seed in there] for gap in gaps], dtype=float)
    least = np.array([[gap[seed].least for seed in there] for gap in gaps], dtype=float)
    most = np.array([[gap[seed].most for seed in there] for gap in gaps], dtype=float)
    differences = over_tasks(seen, same, first)
    less, more = (over_tasks(hidden, same, first, scaled_by=seen) for hidden in (seen - least, most - seen))

    def by_seed(values: Array) -> Array:
        known = dict(zip(there, np.round(values, DIGITS), strict=True))
        return np.array([known.get(seed, math.nan) for seed in order], dtype=float)

    contrast = Contrast(
        differences=by_seed(differences),
        margin=float(entry.margin),
        within=entry.within,
        kind=entry.kind,
        planned=len(order),
        failed=len(failed),
        least=by_seed(differences - less),
        most=by_seed(differences + more),
    )
    return Pairs(contrast, tuple(counted.get(seed, Counts()) for seed in order))


def _records(
    manifest: Manifest, results: Mapping[str, Outcome], label: str, task: str, pilots: bool
) -> dict[int, Outcome | None]:
    """The records of a variant on a task by seed, None where there is none yet."""
    cells = (cell for cell in manifest.cells if (cell.variant, cell.task) == (label, task))
    return {cell.seed: results.get(cell.id) for cell in cells if pilots or cell.seed < FIRST_PILOT}


def _gap(a: Record, b: Record, measure: Measure) -> _Gap:
    """By how much a is better than b on a task, NaN if that is not known.

    Of costs the natural logarithm of b's over a's, of which is seen what lies within the budget that both have
    (``bench.stats.restricted``).
    """
    try:
        one = read_metric(a, measure)
        other = read_metric(b, measure.but(metric=measure.than_metric or measure.metric))
    except KeyError:  # a task of the harness or an exit rule that they have not been scored on
        return _Gap(math.nan, math.nan, math.nan)
    if one.budget is None or other.budget is None:
        gap = one.value - other.value if measure.higher_is_better else other.value - one.value
        return _Gap(gap, gap, gap)
    mine, theirs = (math.inf if reading.censored else reading.value for reading in (one, other))
    gap = float(restricted([mine], [theirs], one.budget, other.budget)[0])
    # A cost that was cut off is known, or at least the whole training: then the ratio lies between these.
    low, high = min(mine, one.budget), min(theirs, other.budget)
    with np.errstate(divide="ignore"):
        least, most = np.log([high / mine, theirs / low])
    return _Gap(gap, min(gap, float(least)), max(gap, float(most)), (one.censored, other.censored))


def contrast_of(manifest: Manifest, results: Mapping[str, Outcome], entry: HypothesisRow) -> Contrast:
    """The differences of a claim; see ``pairs_of``."""
    return pairs_of(manifest, results, entry).contrast


def verdicts_of(manifest: Manifest, family: Sequence[Contrast]) -> list[Verdict]:
    """The verdicts on a study's hypotheses: by its looks where it decides, else of all seeds, corrected for all."""
    looks = looks_of(manifest)
    return judge(family) if looks is None else [decision.verdict for decision in replay(family, looks)]
