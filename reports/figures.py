"""The figures of a task. Each takes the manifest, the results and a task, and returns a figure, or None if it has
nothing to show; what its docstring says stands below it on the page.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from bench.stats import FEWEST_FOR_INTERVAL, interval, median_front
from bench.store.manifest import Manifest, TaskRow
from bench.store.records import Outcome, Record
from reports.aggregates import comparable, profiles
from reports.fronts import points_by_seed, shared_rule
from reports.look import DASHES, MARKERS, axis_name, colour, legend, levels, new, orient, title, with_units
from reports.policy import band
from reports.table import done, exits_of, score
from reports.units import bounds

STEP = 0.035  # variants of equal cost stand this share of the axis apart, or they would hide each other
GREY = "#444444"


def accuracy_vs_flops(manifest: Manifest, results: dict[str, Outcome], task: TaskRow) -> Figure | None:
    """Means at full depth; dots are seeds; hollow: all leave after cycle 1, 2, ...; lines: the study's exit rule, if it
    declares one for all variants; dashes: the median over seeds of what the point that validation data choose at each
    cost gives, over all variants. Variants of equal cost stand side by side.
    """
    measured = [
        (index, [r for r in done(manifest, results, v.label, task.label) if r.exits])
        for index, v in enumerate(manifest.variants)
    ]
    early = {
        index: _mean_over_seeds([_exit_points(r, task) for r in records])[:-1]  # the last is the mean
        for index, records in measured
        if records
    }
    rule = shared_rule(manifest, results, task)
    moved = {
        index: _mean_over_seeds([_curve(record, rule, task) for record in records])
        for index, records in measured
        if records and rule
    }
    figure, [[axes]] = new(2.7)
    extra = np.concatenate([np.empty((0, 2)), *early.values(), *moved.values()])
    values = _scatter(axes, manifest, results, task, "forward_flops_per_token", extra[:, 0])
    if not values:
        return None
    handles: list[Any] = []
    for index, points in early.items():
        look = {"mfc": "none", "mec": colour(manifest, index), "mew": 0.8, "ms": 3.5, "zorder": 2}
        axes.plot(*points.T, MARKERS[index], ls="", **look)
    for index, curve in moved.items():
        axes.plot(*curve.T, "-", color=colour(manifest, index), lw=1, alpha=0.8, zorder=1)
    if early:
        hollow: dict[str, Any] = {"ls": "", "marker": "o", "mfc": "none", "mec": GREY, "ms": 3.5}
        handles.append(Line2D([], [], label="leave after cycle 1, 2, ...", **hollow))
    if moved:
        handles.append(Line2D([], [], color=GREY, lw=1, label=f"{rule} threshold"))
    handles += _front(axes, manifest, results, task)
    xlabel = "executed forward FLOPs per token"
    _finish(figure, axes, manifest, results, task, xlabel, [*values, *extra[:, 1]], handles)
    return figure


def accuracy_vs_params(manifest: Manifest, results: dict[str, Outcome], task: TaskRow) -> Figure | None:
    """Means; dots are seeds. Variants of equal size stand side by side."""
    figure, [[axes]] = new(2.4)
    values = _scatter(axes, manifest, results, task, "params_non_embedding", np.empty(0))
    if not values:
        return None
    _finish(figure, axes, manifest, results, task, "non-embedding parameters", values, [])
    return figure


def learning_curves(manifest: Manifest, results: dict[str, Outcome], task: TaskRow) -> Figure | None:
    """Validation score by training tokens and by training FLOPs: means over seeds with bands."""
    figure, panels = new(3.9, rows=2)
    upper, lower = panels[:, 0]
    seen: list[float] = []
    for index, variant in enumerate(manifest.variants):
        records = done(manifest, results, variant.label, task.label)
        if not records:
            continue
        values = np.array([[entry.valid(task.metric) for entry in record.history] for record in records])
        seen += [float(values.min()), float(values.max())]
        shade = colour(manifest, index)
        for axes, x in ((upper, "tokens"), (lower, "flops")):
            at = [getattr(entry, x) for entry in records[0].history]
            look: dict[str, Any] = {"ls": DASHES[index % len(DASHES)], "lw": 1.1, "marker": MARKERS[index], "ms": 3}
            axes.plot(at, values.mean(0), color=shade, label=variant.label, **look)
            axes.fill_between(at, *band(values, bounds(task.metric)), color=shade, alpha=0.13, lw=0)
    if not seen:
        return None
    for axes, label in ((upper, "training tokens"), (lower, "training FLOPs")):
        levels(axes, task, seen)
        axes.set_xlabel(label)
        with_units(axes)
        orient(axes, task)
    figure.supylabel(f"validation {axis_name(task)}", fontsize=8)
    figure.suptitle(title(manifest, results, task))
    legend(figure, *upper.get_legend_handles_labels())
    return figure


def zero_attention(manifest: Manifest, results: dict[str, Outcome], task: TaskRow) -> Figure | None:
    """Mean probability that a query gives to the zero tokens, by block and cycle: over heads, queries and seeds."""
    panels = []
    for variant in manifest.variants:
        records = [r for r in done(manifest, results, variant.label, task.label) if r.zero_attention]
        if records:
            by_record = [record.zero_attention or [] for record in records]
            blocks, cycles = (sorted({getattr(step, key) for step in by_record[0]}) for key in ("block", "cycle"))
            grid = np.full((len(blocks), len(cycles)), np.nan)
            for number, step in enumerate(by_record[0]):
                mean = np.mean([steps[number].mean for steps in by_record])
                grid[blocks.index(step.block), cycles.index(step.cycle)] = mean
            panels.append((f"{variant.label} (n = {len(records)})", grid, blocks, [cycle + 1 for cycle in cycles]))
    if not panels:
        return None
    columns = 1 if len(panels) == 1 or max(len(panel[3]) for panel in panels) > 4 else 2
    rows = math.ceil(len(panels) / columns)
    figure, all_axes = new(rows * (0.6 + 0.24 * max(len(panel[2]) for panel in panels)) + 0.5, rows, columns)
    top = max(float(np.nanmax(panel[1])) for panel in panels) or 1.0
    annotated = all(panel[1].size <= 64 for panel in panels)
    for axes, (label, grid, blocks, cycles) in zip(all_axes.flat, panels, strict=False):
        look = {"cmap": "cividis", "vmin": 0, "vmax": top, "annot": annotated, "fmt": ".2f", "cbar": False}
        sns.heatmap(grid, ax=axes, xticklabels=cycles, yticklabels=blocks, annot_kws={"size": 6.5}, **look)
        axes.set(xlabel="cycle", ylabel="block")
        axes.tick_params(axis="y", labelrotation=0)
        axes.set_title(label, fontsize=7.5)
    for axes in all_axes.flat[len(panels) :]:
        axes.set_axis_off()
    if not annotated:
        figure.colorbar(all_axes.flat[0].collections[0], ax=all_axes, label="probability").outline.set_visible(False)
    figure.suptitle(f"{task.label}: zero attention (probability)")
    return figure


def performance_profile(manifest: Manifest, results: dict[str, Outcome]) -> Figure | None:
    """Share of the runs whose normalised score is above tau, tasks weighing alike. n: seeds. A variant that has no run
    on one of the tasks is left out.
    """
    found = profiles(manifest, results)
    if not found:
        return None
    figure, [[axes]] = new(2.4)
    for index, profile in found.items():
        shade, label = colour(manifest, index), manifest.variants[index].label
        look: dict[str, Any] = {"color": shade, "ls": DASHES[index % len(DASHES)], "lw": 1.2, "ms": 3}
        look |= {"marker": MARKERS[index], "markevery": (3 * index % 20, 20)}  # where lines lie on each other, too
        axes.plot(profile.tau, profile.share, label=f"{label} (n = {profile.n})", **look)
        axes.fill_between(profile.tau, profile.low, profile.high, color=shade, alpha=0.13, lw=0)
    axes.set(xlabel="normalised score tau (0: level, 1: perfect)", ylabel="share of runs above tau", ylim=(-0.03, 1.03))
    axes.set_title(f"{len(comparable(manifest))} tasks")
    legend(figure, *axes.get_legend_handles_labels())
    return figure


def _scatter(
    axes: Axes,
    manifest: Manifest,
    results: dict[str, Outcome],
    task: TaskRow,
    cost: str,
    others: NDArray[np.float64],
) -> list[float]:
    """Seeds as dots and means, with bars where seeds are enough, on a logarithmic axis that holds the other costs too;
    the values, ends of bars among them.
    """
    found = [
        (index, records)
        for index, variant in enumerate(manifest.variants)
        if (records := done(manifest, results, variant.label, task.label))
    ]
    if not found:
        return []
    at = np.log([getattr(records[0].costs, cost) for _, records in found])
    everything = np.concatenate([at, np.log(others)])
    span = max(float(np.ptp(everything)), 0.3)
    values: list[float] = []
    for (index, records), centre in zip(found, at, strict=True):
        scores = [score(record, task.metric) for record in records]
        values += scores
        alike = np.abs(at - centre) < 0.02
        place = np.flatnonzero(alike & (np.arange(len(at)) < found.index((index, records)))).size
        x = math.exp(centre + span * min(STEP, 0.6 / alike.sum()) * (place - (alike.sum() - 1) / 2))
        over, shade = interval(scores, bounds(task.metric)), colour(manifest, index)
        axes.scatter([x] * len(scores), scores, s=6, color=shade, alpha=0.7, lw=0, zorder=3)
        low, high = over.mean - over.low, over.high - over.mean
        bars = [[low], [high]] if over.kind == "interval" else None
        values += [over.low, over.high] if bars else []
        look: dict[str, Any] = {"color": shade, "ms": 6, "mec": "white", "mew": 0.7, "capsize": 1.8, "lw": 0.9}
        label = manifest.variants[index].label
        axes.errorbar(x, over.mean, yerr=bars, fmt=MARKERS[index], label=label, zorder=4, **look)
    middle = (everything.min() + everything.max()) / 2
    axes.set_xscale("log")
    axes.set_xlim(*np.exp([middle - 0.62 * span, middle + 0.62 * span]))
    with_units(axes)
    return values


def _front(axes: Axes, manifest: Manifest, results: dict[str, Outcome], task: TaskRow) -> list[Line2D]:
    """Draw the median front over all variants, of the seeds that all of those shown have finished."""
    found = [points_by_seed(manifest, results, variant.label, task) for variant in manifest.variants]
    shown = [seeds for seeds in found if seeds]
    common = sorted(set.intersection(*map(set, shown))) if shown else []
    if len(common) < FEWEST_FOR_INTERVAL:
        return []
    band = median_front([np.concatenate([seeds[s] for seeds in shown]) for s in common], task.higher_is_better)
    axes.step(band.cost, band.median, where="post", ls="--", color=GREY, lw=1, zorder=1)
    axes.fill_between(band.cost, band.low, band.high, step="post", color=GREY, alpha=0.12, lw=0, zorder=0)
    return [Line2D([], [], ls="--", color=GREY, lw=1, label=f"median front (n = {band.n})")]


def _finish(
    figure: Figure,
    axes: Axes,
    manifest: Manifest,
    results: dict[str, Outcome],
    task: TaskRow,
    xlabel: str,
    values: list[float],
    extra: list[Any],
) -> None:
    """Axes, levels, legend and title."""
    levels(axes, task, values)
    axes.set(xlabel=xlabel, ylabel=f"test {axis_name(task)}", title=title(manifest, results, task))
    orient(axes, task)
    handles, labels = axes.get_legend_handles_labels()
    legend(figure, [*handles, *extra], [*labels, *(str(line.get_label()) for line in extra)])


def _exit_points(record: Record, task: TaskRow) -> list[tuple[float, float]]:
    """(FLOPs, metric) at the exit points."""
    return [(point.flops_per_token, point.score(task.metric)) for point in exits_of(record).points]


def _curve(record: Record, rule: str, task: TaskRow) -> list[tuple[float, float]]:
    """(FLOPs, metric) of a rule's stored curve."""
    curve = exits_of(record).rules[rule].curve
    return list(zip(curve["flops_per_token"], curve[task.metric], strict=True))


def _mean_over_seeds(curves: list[list[tuple[float, float]]]) -> NDArray[np.float64]:
    """Mean (FLOPs, metric) of the seeds' points, one by one: grids of equal length are at equal quantiles."""
    length = min(map(len, curves))
    picks = [np.linspace(0, len(curve) - 1, length).round().astype(int) for curve in curves]
    return np.mean([[curve[i] for i in pick] for curve, pick in zip(curves, picks, strict=True)], 0)
