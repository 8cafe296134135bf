"""The page's chart of accuracy against cost: what it shows, and the specification that Vega-Lite draws."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from markupsafe import Markup

from bench.store.manifest import Manifest
from bench.store.records import Outcome, Record
from bench.tables import counted
from reports.exit_figures import BOUNDS, exits_of
from reports.fronts import RANDOM, shared_rule
from reports.table import digest, score
from reports.units import metric_name

SCRIPTS = ("vega", "vega-lite", "vega-embed")  # see vendor/README.md
POINTS, CURVE, LEAST = 40_000, 25, 4  # on the page at most; of a rule's curve at most, and else none
FULL, FIXED = "full depth", "fixed cycles"
COLOURS = ["#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#7a5130", "#ece133", "#56b4e9", "#949494", "#000000"]
SHAPES = ["circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "triangle-right", "triangle-left"]
AXES = {
    "flops": "executed FLOPs/token",
    "train_flops": "training FLOPs",
    "params": "non-embedding parameters",
    "seconds": "measured training time, seconds",
}


def chart(manifest: Manifest, results: dict[str, Outcome]) -> dict[str, Any] | None:
    """What the page's script needs, to be told as JSON; None where no cell is done.

    Of every finished cell: the full depth, leaving all after the same number of cycles, and the curve of every exit
    rule at its usual aggregate, thinned to what a screen shows. Where a study has too many cells for that, curves are
    left out, those of the declared rule last.
    """
    placed = [
        (cell, record)
        for cell in manifest.cells
        if (record := results.get(cell.id)) is not None and record.status == "done"
    ]
    if not placed:
        return None
    keys = list(dict.fromkeys(key for _, r in placed if r.exits for key in r.exits.rules if _shown(key)))
    keys.sort(key=lambda key: key != manifest.exit_rule)
    per_curve = min(CURVE, POINTS // max(1, len(placed) * len(keys)))
    if per_curve < LEAST:
        keys = [key for key in keys if key == manifest.exit_rule]
        per_curve = min(CURVE, POINTS // max(1, len(placed) * len(keys)))
    rules = [FULL, FIXED, *(keys if per_curve >= LEAST else [])]
    tasks = {task.label: task for task in manifest.tasks}
    cells, points = [], []
    for number, (cell, record) in enumerate(placed):
        costs = [record.costs.train_flops, record.costs.params_non_embedding, round(record.timing.train_seconds, 2)]
        cells.append([cell.variant, cell.task, cell.seed, cell.id[:12], *costs])
        points += [[number, *point] for point in _points(record, tasks[cell.task].metric, rules, per_curve)]
    declared = [rule for task in manifest.tasks if (rule := shared_rule(manifest, results, task)) in rules]
    return {
        "cells": cells,
        "points": points,
        "rules": rules,
        "rule": declared[0] if declared else FIXED,
        "variants": [variant.label for variant in manifest.variants],
        "tasks": [
            {
                "label": task.label,
                "metric": metric_name(task.metric),
                "up": task.higher_is_better,
                "levels": [[name, level] for name, level in task.levels.items() if math.isfinite(level)],
            }
            for task in manifest.tasks
        ],
        "seeds": manifest.seeds,
        "axes": AXES,
        "colours": COLOURS,
        "shapes": SHAPES,
        "made": f"{counted(len(placed), 'cell')} ({digest(cell.id for cell, _ in placed)})",
    }


def as_json(value: Any) -> Markup:
    """JSON within a page: nothing in it ends the script that holds it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


@cache
def scripts() -> Markup:
    """Vega, Vega-Lite and Vega-Embed, as they are: the page works without a network."""
    folder = Path(__file__).parent / "vendor"
    return Markup("\n").join(Markup((folder / f"{name}.min.js").read_text()) for name in SCRIPTS)


def _shown(key: str) -> bool:
    """A rule at its usual aggregate, or leaving at random."""
    return "." not in key and (key not in BOUNDS or key == RANDOM)


def _points(record: Record, metric: str, rules: list[str], most: int) -> Iterator[list[Any]]:
    """(Rule, threshold, FLOPs, score) of a record."""
    yield [0, None, *_rounded(record.costs.forward_flops_per_token, score(record, metric))]
    if record.exits is None:
        return
    for point in exits_of(record).points:
        yield [1, point.cycles, *_rounded(point.flops_per_token, point.score(metric))]
    for place, key in enumerate(rules):
        if (rule := record.exits.rules.get(key)) is None or place < 2 or metric not in rule.curve:
            continue
        n = len(rule.curve["flops_per_token"])
        told = rule.curve.get("threshold", [None] * n)
        for at in sorted({round(step * (n - 1) / max(1, most - 1)) for step in range(most)}):
            known = told[at] is not None and math.isfinite(told[at])
            threshold = float(f"{told[at]:.4g}") if known else None
            yield [place, threshold, *_rounded(rule.curve["flops_per_token"][at], rule.curve[metric][at])]


def _rounded(flops: float, value: float) -> list[float | None]:
    """As many digits as a screen can show, which keeps the page small."""
    return [float(f"{flops:.5g}"), float(f"{value:.5g}") if math.isfinite(value) else None]
