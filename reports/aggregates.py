"""What the tasks of a study say together: aggregates and performance profiles over normalised scores."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from bench.stats import Profile, interquartile_mean, performance_profile, probability_of_improvement
from bench.store.manifest import Manifest, TaskRow
from bench.store.records import Outcome
from reports.fronts import trivial
from reports.policy import ENDS, NOTHING, Rows, ends, titled
from reports.table import Row, cells, score
from reports.units import bounds, plain

STEPS = 100  # of a profile's axis
BETTER, ITS_ENDS = "P(better than reference)", f"its {ENDS}"
Scores = NDArray[np.float64]


def aggregates(manifest: Manifest, results: dict[str, Outcome]) -> Rows:
    """Interquartile mean over tasks and probability of improvement over the reference; none for fewer than two tasks.

    Scores are put on one scale: 0 is a task's level (chance, unigram), 1 is perfect (accuracy 1, loss or bits 0). A
    task without a level, or where a variant has no finished cell, is left out for that variant and shown as left out.
    """
    tasks = comparable(manifest)
    rows: list[Row] = []
    middles, chances = [], []
    if not tasks:
        return Rows()
    base = _normalised(manifest, results, manifest.reference or "", tasks)
    for variant in manifest.variants:
        label = variant.label
        runs = _normalised(manifest, results, label, tasks)
        planned = sum(len(cells(manifest, results, label, task.label)) for task in tasks)
        have = np.isfinite(runs).any(axis=1)
        middle = interquartile_mean(runs[have], _bounds(tasks)) if have.any() else NOTHING
        both, better = have & np.isfinite(base).any(axis=1), NOTHING
        if both.any() and label != manifest.reference:
            better = probability_of_improvement(runs[both], base[both])
        better = better if better.kind == "interval" else NOTHING  # of too few seeds it is not told who is better
        middles.append(middle)
        chances.append(better)
        rows.append(
            {
                "variant": label,
                "interquartile mean": plain(middle.mean),
                ENDS: ends(middle),
                BETTER: plain(better.mean, 2),
                ITS_ENDS: ends(better),
                "runs": f"{int(np.isfinite(runs).sum())}/{planned}",
                "tasks": f"{int(have.sum())}/{len(manifest.tasks)}",
            }
        )
    if not any(better.n for better in chances):
        rows = [{key: value for key, value in row.items() if key not in (BETTER, ITS_ENDS)} for row in rows]
    return titled(rows, {ENDS: middles, ITS_ENDS: chances})


def profiles(manifest: Manifest, results: dict[str, Outcome]) -> dict[int, Profile]:
    """By the variant's place in the manifest, its performance profile over the tasks of ``aggregates``; none for a
    variant that has no finished cell on one of them.
    """
    tasks = comparable(manifest)
    if not tasks:
        return {}
    found = {
        index: _normalised(manifest, results, variant.label, tasks) for index, variant in enumerate(manifest.variants)
    }
    whole = {index: runs for index, runs in found.items() if np.isfinite(runs).any(axis=1).all()}
    lowest = min((float(np.nanmin(runs)) for runs in whole.values()), default=0.0)
    tau = np.linspace(min(lowest, 0.0), 1.0, STEPS + 1)
    return {index: performance_profile(runs, tau) for index, runs in whole.items()}


def comparable(manifest: Manifest) -> list[TaskRow]:
    """The tasks that have a level which leaves something to be learned, so that their scores can be put together; none
    if there are fewer than two.
    """
    tasks = [task for task in manifest.tasks if trivial(task) not in (None, _perfect(task))]
    return tasks if len(tasks) > 1 else []


def _normalised(manifest: Manifest, results: dict[str, Outcome], variant: str, tasks: list[TaskRow]) -> Scores:
    """A variant's normalised scores [T, n], a column for each of the study's seeds, NaN where a cell is not done."""
    columns = {seed: column for column, seed in enumerate(sorted({cell.seed for cell in manifest.cells}))}
    found = np.full((len(tasks), len(columns)), math.nan)
    for row, task in zip(found, tasks, strict=True):
        for seed, record in cells(manifest, results, variant, task.label):
            if record and record.status == "done":
                row[columns[seed]] = _scaled(score(record, task.metric), task)
    return found


def _perfect(task: TaskRow) -> float:
    return 1.0 if task.higher_is_better else 0.0


def _scaled(value: float, task: TaskRow) -> float:
    level, perfect = trivial(task), _perfect(task)
    assert level is not None
    return (value - level) / (perfect - level)


def _bounds(tasks: list[TaskRow]) -> tuple[float, float]:
    """The least and the greatest normalised score there can be on any of the tasks."""
    worst = [(bounds(task.metric) or (-math.inf, math.inf))[0 if task.higher_is_better else 1] for task in tasks]
    return min(_scaled(value, task) for value, task in zip(worst, tasks, strict=True)), 1.0
