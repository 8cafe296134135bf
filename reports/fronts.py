"""Fronts of cost and score: of every variant the same kind of points, chosen on validation data, shown on test data."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bench.stats import FEWEST_FOR_INTERVAL, dominance, hypervolume, interval
from bench.store.manifest import Manifest, TaskRow
from bench.store.records import ExitsRecord, Outcome, Record
from reports.policy import ENDS, Rows, ends, titled
from reports.table import Row, cells, done, score
from reports.units import human, metric_name, plain

Points = NDArray[np.float64]
ROOM = 1.1  # the reference budget over the dearest variant's, so that this one counts too
FIXED, RANDOM = "fixed", "random"
DOMINATES = "P(dominates reference)"


def fronts(manifest: Manifest, results: dict[str, Outcome]) -> Rows:
    """Hypervolume of each variant's front, and the probability that it dominates the reference variant's.

    The hypervolume is divided by the reference budget: the mean, over all budgets up to it, of how far the score that
    is had for it lies beyond the level.
    """
    rows: list[Row] = []
    shown = []
    for task in manifest.tasks:
        label, labels = task.label, [variant.label for variant in manifest.variants]
        seeds = {variant: points_by_seed(manifest, results, variant, task) for variant in labels}
        everything = [points for found in seeds.values() for points in found.values()]
        if not everything:
            continue
        stacked = np.concatenate(everything)
        budget = ROOM * float(stacked[:, 0].max())
        level = trivial(task)
        if level is None:
            level = float((np.min if task.higher_is_better else np.max)(stacked[:, 1]))
        base = seeds.get(manifest.reference or "", {})
        for variant in labels:
            mine = seeds[variant]
            areas = [hypervolume(p, (budget, level), task.higher_is_better) / budget for p in mine.values()]
            both = sorted(mine.keys() & base.keys())
            chance = "-"
            if len(both) >= FEWEST_FOR_INTERVAL and variant != manifest.reference:
                won = dominance([mine[s] for s in both], [base[s] for s in both], task.higher_is_better)
                chance = f"{won.probability:.2f} (n = {won.n})"
            area = interval(areas, (0.0, np.inf))
            row = {"task": label, "variant": variant, "metric": metric_name(task.metric)}
            row |= {"hypervolume": plain(area.mean), ENDS: ends(area)}
            row |= {"seeds": f"{len(mine)}/{len(cells(manifest, results, variant, label))}"}
            row |= {"reference point": f"{human(budget)} FLOPs/token, {level:.3f}", DOMINATES: chance}
            rows.append(row)
            shown.append(area)
    if all(row[DOMINATES] == "-" for row in rows):
        rows = [{key: value for key, value in row.items() if key != DOMINATES} for row in rows]
    return titled(rows, {ENDS: shown})


def points_by_seed(manifest: Manifest, results: dict[str, Outcome], variant: str, task: TaskRow) -> dict[int, Points]:
    """(FLOPs/token, test score, validation score) [P, 3] by seed of what a finished cell can be used at.

    Its exit points, or the full depth where it has one; and the points of the study's exit rule (``shared_rule``).
    A cell without validation scores at its exit points is left out.
    """
    rule, found = shared_rule(manifest, results, task), {}
    for seed, record in cells(manifest, results, variant, task.label):
        if record and record.status == "done":
            points = [*_exit_points(record, task.metric), *(_rule_points(record, rule, task.metric) if rule else [])]
            if points:
                found[seed] = np.array(points, dtype=float)
    return found


def shared_rule(manifest: Manifest, results: dict[str, Outcome], task: TaskRow) -> str | None:
    """The exit rule that the study declares, where every finished cell that has exits has it too; else None."""
    rule = manifest.exit_rule
    if rule is None or rule == FIXED:  # whose points are the exit points
        return None
    exits = [r.exits for v in manifest.variants for r in done(manifest, results, v.label, task.label) if r.exits]
    return rule if exits and all(rule in found.rules for found in exits) else None


def trivial(task: TaskRow) -> float | None:
    """The task's trivial level: the worst of its reference levels."""
    levels = task.levels.values()
    return float((min if task.higher_is_better else max)(levels)) if levels else None


def _exit_points(record: Record, metric: str) -> list[tuple[float, float, float]]:
    if record.exits is None:
        valid = record.valid_metrics.get(f"valid_{metric}")
        return [] if valid is None else [(record.costs.forward_flops_per_token, score(record, metric), valid)]
    points = record.exits.points
    if not all(metric in point.valid for point in points):
        return []
    return [(point.flops_per_token, point.score(metric), point.valid[metric]) for point in points]


def _rule_points(record: Record, rule: str, metric: str) -> list[tuple[float, float, float]]:
    """The thresholds that were tuned on validation data for each budget; of leaving at random, its whole curve."""
    if record.exits is None or not all(metric in point.valid for point in record.exits.points):
        return []
    if rule == RANDOM:
        return _at_random(record.exits, metric)
    return [(t.test["flops_per_token"], t.test[metric], t.valid[metric]) for t in record.exits.rules[rule].tuned]


def _at_random(exits: ExitsRecord, metric: str) -> list[tuple[float, float, float]]:
    """What is to be expected of leaving at random: at a threshold t, a share of t^c goes on after cycle c. Every mean
    over sequences is then that of the exit points, so weighted.
    """
    curve = exits.rules[RANDOM].curve
    stay = np.array(curve["threshold"], dtype=float)[:, None] ** np.arange(len(exits.points))
    shares = np.append(stay[:, :-1] - stay[:, 1:], stay[:, -1:], 1)
    valid = shares @ np.array([point.valid[metric] for point in exits.points])
    return list(zip(curve["flops_per_token"], curve[metric], valid.tolist(), strict=True))
