"""What it costs each variant to reach the scores that a study's hypotheses name, and the areas they compare."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.evaluate.targets import AREA, Reading, read_metric, target_of
from bench.stats import interval
from bench.store.manifest import Manifest, Measure, TaskRow
from bench.store.records import Outcome
from reports.look import TALLEST, colour, marker, new, with_units
from reports.policy import ENDS, NOTHING, Rows, ends, titled
from reports.table import Row, done
from reports.units import bounds, human, metric_name, plain


def measures(manifest: Manifest, task: TaskRow) -> list[Measure]:
    """The metrics of the history that hypotheses name on a task, each once."""
    named = [one for entry in manifest.hypotheses for one in entry.measures if one.task == task.label]
    return list({one.metric: one for one in named if one.metric == AREA or target_of(one.metric)}.values())


def readings(manifest: Manifest, results: dict[str, Outcome], measure: Measure) -> dict[str, list[Reading]]:
    """The metric of every finished cell on its task, by variant; variants without one left out."""
    found = {
        variant.label: [read_metric(record, measure) for record in done(manifest, results, variant.label, measure.task)]
        for variant in manifest.variants
    }
    return {label: some for label, some in found.items() if some}


def targets(manifest: Manifest, results: dict[str, Outcome]) -> Rows:
    """A row for each metric of the history that a hypothesis names, and each variant."""
    rows: list[Row] = []
    shown = []
    for task in manifest.tasks:
        for measure in measures(manifest, task):
            for label, found in readings(manifest, results, measure).items():
                row = {"task": task.label, "variant": label, "metric": metric_name(measure.metric)}
                values = [reading.value for reading in found]
                missed = sum(reading.censored for reading in found)
                over = NOTHING
                if measure.metric == AREA and measure.of:
                    row["metric"] += f" ({metric_name(measure.of)})"
                    over = interval(values, bounds(measure.of))
                    row |= {"median": "-", "least to greatest": "-", "mean": plain(over.mean), ENDS: ends(over)}
                else:
                    row |= {"median": _median(found), "least to greatest": _range(found), "mean": "-", ENDS: "-"}
                row["runs that reach it"] = "-" if measure.metric == AREA else f"{len(found) - missed}/{len(found)}"
                shown.append(over)
                rows.append(row)
    if all(row["mean"] == "-" for row in rows):
        rows = [{key: value for key, value in row.items() if key not in ("mean", ENDS)} for row in rows]
    return titled(rows, {ENDS: shown})


def cost_to_score(manifest: Manifest, results: dict[str, Outcome], task: TaskRow) -> Figure | None:
    """Training cost of first reaching the scores that the study's hypotheses name, on validation data, a mark a seed.
    Hollow, at the whole training: not reached.
    """
    found = [one for one in measures(manifest, task) if target_of(one.metric)]
    by_measure = [(one, readings(manifest, results, one)) for one in found]
    by_measure = [(one, runs) for one, runs in by_measure if runs]
    if not by_measure:
        return None
    labels = [variant.label for variant in manifest.variants]
    most = max(len(runs) for _, runs in by_measure)
    height = min(len(by_measure) * (0.75 + 0.2 * most), TALLEST)
    figure, panels = new(height, rows=len(by_measure))
    for axes, (measure, runs) in zip(panels[:, 0], by_measure, strict=True):
        for row, (label, some) in enumerate(runs.items()):
            index = labels.index(label)
            shade = colour(manifest, index)
            look: dict[str, Any] = {"marker": marker(manifest, index), "s": 18, "lw": 0.8, "edgecolors": [shade]}
            for censored in (False, True):
                at = [reading.value for reading in some if reading.censored == censored]
                face = "none" if censored else [shade]
                axes.scatter(at, [row] * len(at), facecolors=face, alpha=0.8, clip_on=False, zorder=3, **look)
        axes.set_xscale("log")
        axes.set(yticks=range(len(runs)), yticklabels=list(runs), ylim=(len(runs) - 0.5, -0.5))
        axes.set_xlabel(metric_name(measure.metric))
        with_units(axes)
    figure.suptitle(f"{task.label}: cost of reaching a score")
    return figure


def _median(found: list[Reading]) -> str:
    """The median of the costs, or what it is above, where half of the runs or more have not reached the score."""
    if 2 * sum(reading.censored for reading in found) >= len(found):
        return f"> {human(float(np.median([reading.value for reading in found])))}"
    return human(float(np.median([math.inf if reading.censored else reading.value for reading in found])))


def _range(found: list[Reading]) -> str:
    reached = [reading.value for reading in found if not reading.censored]
    if not reached:
        return "-"
    most = "" if len(reached) == len(found) else "> "
    return f"{human(min(reached))} to {most}{human(max(reading.value for reading in found))}"
