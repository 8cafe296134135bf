"""What a cycle is worth in blocks: phi, where a study has both numbers of cycles and numbers of blocks."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from itertools import takewhile
from typing import NamedTuple

from bench.config import NUMBERLESS
from bench.stats import Recurrence, fit_phi
from bench.store.manifest import Manifest, TaskRow
from bench.store.records import Outcome, Record
from reports.policy import ENDS, Rows, ends, titled, told
from reports.table import Row, done, score
from reports.units import metric_name, plain

VARIED = ("n_blocks", "n_cycles")  # of the model, within one fit


class Run(NamedTuple):
    """A finished cell.

    Attributes:
        shape: blocks that run once, blocks that run more often, and how often these run (1 if there are none).
        seed: of the cell.
        score: the task's metric on test data.
    """

    shape: tuple[int, int, int]
    seed: int
    score: float


class Family(NamedTuple):
    """A variant whose entries differ in blocks and cycles alone, on a task, with the plain stacks to compare with."""

    task: TaskRow
    name: str
    runs: list[Run]
    fit: Recurrence


def shape_of(schedule: str) -> tuple[int, int, int] | None:
    """``Run.shape`` of a schedule as a record tells it (``0 1 2 1 2 3``); None if its blocks run differently often.

    The blocks of a plain stack count as blocks that run once.
    """
    uses = Counter(schedule.split())
    often = {count for count in uses.values() if count > 1}
    if len(often) > 1:
        return None
    fixed = sum(count == 1 for count in uses.values())
    return fixed, len(uses) - fixed, next(iter(often), 1)


def families(manifest: Manifest, results: dict[str, Outcome]) -> Iterator[Family]:
    """Every variant whose number of cycles varies, with the plain stacks that equal it in everything else."""
    for task in manifest.tasks:
        labels: dict[tuple[str, str], list[str]] = {}
        found: dict[tuple[str, str], list[Run]] = {}
        for variant in manifest.variants:
            for record in done(manifest, results, variant.label, task.label):
                shape = shape_of(record.schedule)
                if shape is None:
                    continue
                base = _base(record, {"lr"} if manifest.tuning else set())
                key = (variant.variant + json.dumps(record.cell.options, sort_keys=True), base)
                found.setdefault(key, []).append(Run(shape, record.cell.seed, score(record, task.metric)))
                labels.setdefault(key, []).append(variant.label)
        stacks = {key: runs for key, runs in found.items() if all(run.shape[2] == 1 for run in runs)}
        for (kind, base), runs in found.items():
            if len({run.shape[2] for run in runs}) < 2:
                continue
            plain_runs = [run for key, some in stacks.items() if key[1] == base for run in some]
            finite = [run for run in _cycled([*plain_runs, *runs]) if math.isfinite(run.score)]
            every = list({(run.shape, run.seed): run for run in finite}.values())
            if every:
                yield Family(task, _common(labels[kind, base]), every, _fit(every, task.higher_is_better))


def recurrence(found: Sequence[Family]) -> Rows:
    """A row for each family."""
    rows: list[Row] = []
    for family in found:
        fit = family.fit
        shapes = sorted({run.shape for run in family.runs})
        rows.append(
            {
                "task": family.task.label,
                "variant": family.name,
                "metric": metric_name(family.task.metric),
                "phi": plain(fit.phi.mean, 2),
                ENDS: ends(fit.phi, 2),
                "R2": plain(fit.r2, 2),
                "cycles": ", ".join(map(str, sorted({cycles for _, _, cycles in shapes}))),
                "configurations": str(fit.configurations),
                "seeds": str(len({run.seed for run in family.runs})),
                "note": fit.note,
            }
        )
    return titled(rows, {ENDS: [family.fit.phi for family in found]})


def findings(found: Sequence[Family]) -> list[str]:
    """What each phi says, in a sentence."""
    lines = []
    for family in found:
        fit = family.fit
        if not math.isnan(fit.phi.mean):
            explains = f"; the curve explains {fit.r2:.0%} of what {fit.configurations} configurations differ in"
            lines.append(
                f"{family.task.label}, {family.name}: a block that runs r times is worth r^phi blocks of its own, with "
                f"phi = {told(fit.phi, 2)}{'' if math.isnan(fit.r2) else explains}"
                f"{f' ({fit.note})' if fit.note else ''}."
            )
    return lines


def _fit(runs: list[Run], higher_is_better: bool) -> Recurrence:
    fixed, cycled, cycles = zip(*(run.shape for run in runs), strict=True)
    scores, seeds = [run.score for run in runs], [run.seed for run in runs]
    return fit_phi(fixed, cycled, cycles, scores, seeds, higher_is_better)


def _cycled(runs: list[Run]) -> list[Run]:
    """The runs, with the stack that equals one cycle told as such where there is only one kind of loop: a study without
    other stacks then has nothing to compare cycles with, and the fit says so.
    """
    loops = {run.shape[:2] for run in runs if run.shape[2] > 1}
    if len(loops) != 1:
        return runs
    ((fixed, cycled),) = loops
    one = (fixed + cycled, 0, 1)
    return [run._replace(shape=(fixed, cycled, 1)) if run.shape == one else run for run in runs]


def _base(record: Record, tuned: Set[str]) -> str:
    """What must be the same within a fit: the shape but for what varies, the training but for what was tuned, and for
    being computed in a stack, which the shape decides, and what it started from.
    """
    model = {key: value for key, value in record.cell.model.items() if key not in VARIED}
    train = {key: value for key, value in record.cell.train.items() if key not in {*tuned, *NUMBERLESS, "stacked"}}
    return json.dumps([model, train, record.cell.init], sort_keys=True, default=str)


def _common(labels: list[str]) -> str:
    """The words that the labels of a family begin with; the first label if there are none."""
    words = [label.split() for label in dict.fromkeys(labels)]
    alike = takewhile(lambda place: len(set(place)) == 1, zip(*words, strict=False))
    return " ".join(place[0] for place in alike) or labels[0]
