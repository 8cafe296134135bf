"""Tables of what several points or tasks say together: fronts over budgets, and aggregates over tasks."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from bench.stats import (
    Interval,
    Profile,
    bca_interval,
    dominance,
    hypervolume,
    interquartile_mean,
    performance_profile,
    probability_of_improvement,
)
from bench.store.manifest import Manifest, TaskRow
from bench.store.records import Outcome, Record
from reports.table import Row, cells, done, score
from reports.units import human, metric_name, plain

Points = NDArray[np.float64]
STEPS = 100  # of a profile's axis
ROOM = 1.1  # the reference budget over the dearest variant's, so that this one counts too


def fronts(manifest: Manifest, results: dict[str, Outcome]) -> list[Row]:
    """Hypervolume of each variant's front, and the probability that it dominates the reference variant's.

    A seed's front is of every exit point and threshold it was tested at, none chosen. The hypervolume is divided by the
    reference budget: the mean, over all budgets up to it, of how far the best affordable score lies beyond the level.
    """
    rows = []
    for task in manifest.tasks:
        label, labels = task.label, [variant.label for variant in manifest.variants]
        seeds = {variant: points_by_seed(manifest, results, variant, task) for variant in labels}
        everything = [points for found in seeds.values() for points in found.values()]
        if not everything:
            continue
        stacked = np.concatenate(everything)
        budget = ROOM * float(stacked[:, 0].max())
        level = _level(task)
        if level is None:
            level = float((np.min if task.higher_is_better else np.max)(stacked[:, 1]))
        base = seeds.get(manifest.reference or "", {})
        for variant in labels:
            mine = seeds[variant]
            areas = [hypervolume(p, (budget, level), task.higher_is_better) / budget for p in mine.values()]
            both = sorted(mine.keys() & base.keys())
            chance = "-"
            if both and variant != manifest.reference:
                won = dominance([mine[s] for s in both], [base[s] for s in both], task.higher_is_better)
                chance = f"{won.probability:.2f} (n = {won.n})"
            row = {"task": label, "variant": variant, "metric": metric_name(task.metric)}
            area = bca_interval(areas)
            row |= {"hypervolume": plain(area.mean), "95 % interval": _ends(area)}
            row |= {"seeds": f"{len(mine)}/{len(cells(manifest, results, variant, label))}"}
            row |= {"reference point": f"{human(budget)} FLOPs/token, {level:.3f}", "P(dominates reference)": chance}
            rows.append(row)
    return rows


def aggregates(manifest: Manifest, results: dict[str, Outcome]) -> list[Row]:
    """Interquartile mean over tasks and probability of improvement over the reference; none for fewer than two tasks.

    Scores are put on one scale: 0 is a task's level (chance, unigram), 1 is perfect (accuracy 1, loss or bits 0). A
    task without a level, or where a variant has no finished cell, is left out for that variant and shown as left out.
    """
    tasks, rows = comparable(manifest), []
    if not tasks:
        return []
    base = [_normalised(manifest, results, manifest.reference or "", task) for task in tasks]
    for variant in manifest.variants:
        label = variant.label
        runs = [_normalised(manifest, results, label, task) for task in tasks]
        planned = sum(len(cells(manifest, results, label, task.label)) for task in tasks)
        have = [run for run in runs if len(run)]
        middle = interquartile_mean(have) if have else Interval(math.nan, math.nan, math.nan, 0)
        pairs = [(a, b) for a, b in zip(runs, base, strict=True) if len(a) and len(b)]
        better = Interval(math.nan, math.nan, math.nan, 0)
        if pairs and label != manifest.reference:
            better = probability_of_improvement([a for a, _ in pairs], [b for _, b in pairs])
        rows.append(
            {
                "variant": label,
                "interquartile mean": plain(middle.mean),
                "95 % interval": _ends(middle),
                "P(better than reference)": plain(better.mean, 2),
                "its 95 % interval": _ends(better),
                "runs": f"{middle.n}/{planned}",
                "tasks": f"{len(have)}/{len(manifest.tasks)}",
            }
        )
    return rows


def profiles(manifest: Manifest, results: dict[str, Outcome]) -> dict[int, Profile]:
    """By the variant's place in the manifest, its performance profile over the tasks of ``aggregates``; none for a
    variant that has no finished cell on one of them.
    """
    tasks = comparable(manifest)
    found = {
        index: [_normalised(manifest, results, variant.label, task) for task in tasks]
        for index, variant in enumerate(manifest.variants)
    }
    whole = {index: runs for index, runs in found.items() if runs and all(runs)}
    lowest = min((value for runs in whole.values() for run in runs for value in run), default=0.0)
    tau = np.linspace(min(lowest, 0.0), 1.0, STEPS + 1)
    return {index: performance_profile(runs, tau) for index, runs in whole.items()}


def comparable(manifest: Manifest) -> list[TaskRow]:
    """The tasks that have a level, so that their scores can be put together; none if there are fewer than two."""
    tasks = [task for task in manifest.tasks if _level(task) is not None]
    return tasks if len(tasks) > 1 else []


def points_by_seed(manifest: Manifest, results: dict[str, Outcome], variant: str, task: TaskRow) -> dict[int, Points]:
    """(FLOPs/token, score) [P, 2] by seed of everything a finished cell was tested at."""
    found = {}
    for seed, record in cells(manifest, results, variant, task.label):
        if record and record.status == "done":
            points = [(record.costs.forward_flops_per_token, score(record, task.metric))]
            if record.exits:
                points = [(point.flops_per_token, point.score(task.metric)) for point in record.exits.points]
                points += zero_attention_curve(record, task.metric)
            found[seed] = np.array(points, dtype=float)
    return found


def zero_attention_curve(record: Record, metric: str) -> list[tuple[float, float]]:
    """(FLOPs/token, score) of the points of the zero attention's exit curve, from the cheapest on; none where there is
    no such signal.
    """
    rule = record.exits.rules.get("zero_attention") if record.exits else None
    return list(zip(rule.curve["flops_per_token"], rule.curve[metric], strict=True)) if rule else []


def _level(task: TaskRow) -> float | None:
    """The task's trivial level: the worst of its reference levels."""
    levels = task.levels.values()
    return float((min if task.higher_is_better else max)(levels)) if levels else None


def _normalised(manifest: Manifest, results: dict[str, Outcome], variant: str, task: TaskRow) -> list[float]:
    level, perfect = _level(task), 1.0 if task.higher_is_better else 0.0
    assert level is not None
    finished = done(manifest, results, variant, task.label)
    return [(score(record, task.metric) - level) / (perfect - level) for record in finished]


def _ends(interval: Interval) -> str:
    return "-" if math.isnan(interval.low) else f"[{plain(interval.low)}, {plain(interval.high)}]"
