"""The figures of a task. Each takes the manifest, the results and a task, and returns a figure, or None if it has
nothing to show.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from bench.stats import mean_interval, pareto_front
from reports import exit_figures
from reports.look import MARKERS, axis_name, colour, orient, title
from reports.table import Manifest, Record, done, score
from reports.units import human

Draw = Callable[[Manifest, dict[str, Record], dict[str, Any]], Figure | None]

DODGE = 0.012  # variants of equal cost stand side by side by this share of it, or they would hide each other


def accuracy_vs_flops(manifest: Manifest, results: dict[str, Record], task: dict[str, Any]) -> Figure | None:
    """The task's metric against executed forward FLOPs per token: seeds, means, intervals, exits and the front."""
    figure, axes = _new(5.6, 4.6)
    drawn = _scatter(axes, manifest, results, task, "forward_flops_per_token")
    if not drawn:
        return None
    thresholds = False
    values = [value for row in drawn for value in row[1:4]]
    for index, variant in enumerate(manifest["variants"]):
        records = [r for r in done(manifest, results, variant["label"], task["label"]) if r["exits"]]
        if not records:
            continue
        shade = colour(manifest, index)
        points = _mean_over_seeds([r["exits"]["points"] for r in records], task["metric"])[:-1]  # the last is the mean
        axes.plot(*points.T, MARKERS[index % len(MARKERS)], mfc="none", mec=shade, ms=4, mew=0.9, zorder=2)
        values += points[:, 1].tolist()
        curves = [_zero_attention_curve(record) for record in records]
        if all(curves):
            curve = _mean_over_seeds(curves, task["metric"])
            axes.plot(*curve.T, "-", color=shade, lw=1.1, alpha=0.8, zorder=1)
            values += curve[:, 1].tolist()
            thresholds = True
    cost, value, _, _, place = np.array(drawn).T
    front = pareto_front(cost, value, task["higher_is_better"])
    axes.plot(place[front], value[front], "--", color="#444444", lw=1.2, zorder=1)
    extra = [Line2D([], [], ls="--", color="#444444", lw=1.2, label="Pareto front of the means")]
    if any(r["exits"] for r in results.values() if r["status"] == "done"):
        extra.append(
            Line2D(
                [], [], ls="", marker="o", mfc="none", mec="#444444", ms=4, label="leaving always after cycle 1, 2, ..."
            )
        )
    if thresholds:
        extra.append(Line2D([], [], ls="-", color="#444444", lw=1.1, label="zero-attention threshold"))
    _finish(axes, manifest, results, task, "executed forward FLOPs per token", values, extra)
    return figure


def accuracy_vs_params(manifest: Manifest, results: dict[str, Record], task: dict[str, Any]) -> Figure | None:
    """The task's metric against non-embedding parameters."""
    figure, axes = _new(5.6, 4.2)
    drawn = _scatter(axes, manifest, results, task, "params_non_embedding")
    if not drawn:
        return None
    values = [value for row in drawn for value in row[1:4]]
    _finish(axes, manifest, results, task, "non-embedding parameters", values, [])
    return figure


def learning_curves(manifest: Manifest, results: dict[str, Record], task: dict[str, Any]) -> Figure | None:
    """The validation metric by training tokens and by training FLOPs, mean and range over seeds."""
    figure, (left, right) = _new(7.2, 3.4, 2)
    key = f"valid_{task['metric']}"
    shown = False
    for index, variant in enumerate(manifest["variants"]):
        records = done(manifest, results, variant["label"], task["label"])
        if not records:
            continue
        shown = True
        values = np.array([[entry[key] for entry in record["history"]] for record in records])
        for axes, x in ((left, "tokens"), (right, "flops")):
            at = [entry[x] for entry in records[0]["history"]]
            shade = colour(manifest, index)
            axes.plot(
                at,
                values.mean(0),
                color=shade,
                marker=MARKERS[index % len(MARKERS)],
                ms=3,
                lw=1.2,
                label=variant["label"],
            )
            axes.fill_between(at, values.min(0), values.max(0), color=shade, alpha=0.15, lw=0)
    if not shown:
        return None
    for axes, label in ((left, "training tokens"), (right, "training FLOPs")):
        axes.set_xlabel(label)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human(value)))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        orient(axes, task)
    left.set_ylabel(f"validation {axis_name(task)}")
    figure.suptitle(title(manifest, results, task), fontsize=10)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False)
    return figure


def zero_attention(manifest: Manifest, results: dict[str, Record], task: dict[str, Any]) -> Figure | None:
    """Mean attention to the zero tokens by block and cycle, one panel for each variant that has them."""
    panels = []
    for variant in manifest["variants"]:
        records = [r for r in done(manifest, results, variant["label"], task["label"]) if r["zero_attention"]]
        if records:
            steps = records[0]["zero_attention"]
            blocks, cycles = (sorted({step[key] for step in steps}) for key in ("block", "cycle"))
            grid = np.full((len(blocks), len(cycles)), np.nan)
            for number, step in enumerate(steps):
                mean = np.mean([record["zero_attention"][number]["mean"] for record in records])
                grid[blocks.index(step["block"]), cycles.index(step["cycle"])] = mean
            panels.append((variant["label"], grid, blocks, [cycle + 1 for cycle in cycles]))
    if not panels:
        return None
    width = max(3.2, 0.9 + 2.6 * len(panels))
    figure, grid_axes = _new(width, 1.3 + 0.35 * max(len(panel[2]) for panel in panels), len(panels))
    for axes, (label, grid, blocks, cycles) in zip(
        np.atleast_1d(np.asarray(grid_axes, dtype=object)), panels, strict=True
    ):
        colour_bar = {"label": "zero attention"}
        look = {"cmap": "cividis", "vmin": 0, "annot": grid.size <= 64, "fmt": ".2f", "cbar_kws": colour_bar}
        sns.heatmap(grid, ax=axes, xticklabels=cycles, yticklabels=blocks, **look)
        axes.set(xlabel="cycle", ylabel="block", title=f"{label} on {task['label']}")
    return figure


FIGURES: dict[str, tuple[Draw, str]] = {
    "accuracy_vs_flops": (accuracy_vs_flops, "Quality against executed compute"),
    "accuracy_vs_params": (accuracy_vs_params, "Quality against parameters"),
    "learning_curves": (learning_curves, "Learning curves"),
    "zero_attention": (zero_attention, "Attention to the zero tokens"),
    "exit_curves": (exit_figures.exit_curves, "Exit rules: quality against executed compute"),
    "exit_area": (exit_figures.exit_area, "What each exit rule is worth"),
    "exit_signal": (exit_figures.exit_signal, "Do the signals know whether more cycles help?"),
    "exit_depth": (exit_figures.exit_depth, "Where sequences leave"),
    "exit_calibration": (exit_figures.exit_calibration, "Is the confidence at an exit point to be trusted?"),
    "cycles": (exit_figures.cycles_at_test, "Quality against the number of cycles at test time"),
}


def _new(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def _scatter(
    axes: Axes, manifest: Manifest, results: dict[str, Record], task: dict[str, Any], cost: str
) -> list[tuple[float, ...]]:
    """Seeds as dots, means with 95 % intervals; returns (cost, mean, lowest and highest seed, place on the axis)."""
    drawn: list[tuple[float, ...]] = []
    for index, variant in enumerate(manifest["variants"]):
        records = done(manifest, results, variant["label"], task["label"])
        if not records:
            continue
        values = [score(record, task["metric"]) for record in records]
        interval, shade = mean_interval(values), colour(manifest, index)
        true = records[0]["costs"][cost]
        x = true * (1 + DODGE * sum(abs(true / other[0] - 1) < 0.02 for other in drawn))
        axes.scatter([x] * len(values), values, s=9, color=shade, alpha=0.7, lw=0, zorder=3)
        bars = None if math.isnan(interval.low) else [[interval.mean - interval.low], [interval.high - interval.mean]]
        look = {"color": shade, "ms": 7, "mec": "white", "mew": 0.8, "capsize": 2, "lw": 0.9, "zorder": 4}
        axes.errorbar(x, interval.mean, yerr=bars, fmt=MARKERS[index % len(MARKERS)], label=variant["label"], **look)
        drawn.append((true, interval.mean, min(values), max(values), x))
    return drawn


def _finish(
    axes: Axes,
    manifest: Manifest,
    results: dict[str, Record],
    task: dict[str, Any],
    xlabel: str,
    values: list[float],
    extra: list[Line2D],
) -> None:
    """Axes, levels, legend and title; the limits follow ``values``, since an interval at n = 2 may be enormous."""
    low, high = min(values), max(values)
    span = high - low or 1.0
    for name, level in task["levels"].items():
        if not low - span < level < high + span:  # a level far off would squash what is to be compared
            extra.append(Line2D([], [], ls="", label=f"{name} {level:.3g} (off the scale)"))
            continue
        axes.axhline(level, ls=":", color="#888888", lw=1)
        place: Any = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
        axes.annotate(f"{name} {level:.3g}", (0.995, level), color="#666666", fontsize=7.5, **place)
    near = [level for level in task["levels"].values() if low - span < level < high + span]
    low, high = min([low, *near]), max([high, *near])
    axes.set_ylim(low - 0.07 * span, high + 0.07 * span)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human(value)))
    axes.set(xlabel=xlabel, ylabel=f"test {axis_name(task)}", title=title(manifest, results, task))
    orient(axes, task)
    handles, labels = axes.get_legend_handles_labels()
    handles += extra
    labels += [str(line.get_label()) for line in extra]
    axes.figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)


def _zero_attention_curve(record: Record) -> list[dict[str, Any]]:
    """The points of the zero attention's exit curve, from the cheapest on; none where there is no such signal."""
    rule = record["exits"]["rules"].get("zero_attention") if record["exits"] else None
    return (
        [dict(zip(rule["curve"], point, strict=True)) for point in zip(*rule["curve"].values(), strict=True)]
        if rule
        else []
    )


def _mean_over_seeds(curves: list[list[dict[str, Any]]], metric: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Mean (FLOPs, metric) of the seeds' points, one by one: grids of equal length are at equal quantiles."""
    length = min(map(len, curves))
    picks = [np.linspace(0, len(curve) - 1, length).round().astype(int) for curve in curves]
    return np.mean(
        [
            [(curve[i]["flops_per_token"], curve[i][metric]) for i in pick]
            for curve, pick in zip(curves, picks, strict=True)
        ],
        0,
    )
