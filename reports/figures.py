"""The figures of a task. Each takes the manifest, the results and a task, and returns a figure, or None if it has
nothing to show; what its docstring says stands below it on the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from bench.stats import Interval, interval, median_front
from bench.store.manifest import Manifest, TaskRow
from bench.store.records import Outcome, Record
from reports.aggregates import comparable, profiles
from reports.fronts import points_by_seed, shared_rule
from reports.look import (
    FAINT,
    Panel,
    axis_name,
    by_groups,
    colour,
    dash,
    fitting,
    legend,
    levels,
    marker,
    multiples,
    orient,
    title,
    with_units,
)
from reports.policy import band, can_rank
from reports.table import done, exits_of, score
from reports.units import bounds

GREY = "#444444"
STRIP = 0.36  # of the panel's width: beside it stand the seeds of each variant, which may all cost the same


def accuracy_vs_flops(manifest: Manifest, results: dict[str, Outcome], task: TaskRow) -> Figure | None:
    """Means at full depth; hollow: all leave after cycle 1, 2, ...; lines: the study's exit rule, if it declares one
    for all variants; dashes: the median over seeds of what the point that validation data choose at each cost gives,
    over all variants. Every mark stands at its cost. Right: the seeds (dots) and the mean of each variant.
    """
    finished = _finished(manifest, results, task)
    if not finished:
        return None
    measured = {i: found for i, records in finished.items() if (found := [r for r in records if r.exits])}
    early = {i: _mean_over_seeds([_exit_points(r, task) for r in records]) for i, records in measured.items()}
    rule = shared_rule(manifest, results, task)
    curves = {
        index: _mean_over_seeds([_curve(record, rule, task) for record in records])
        for index, records in measured.items()
        if rule
    }
    extra = np.concatenate([np.empty((0, 2)), *early.values(), *curves.values()])
    figure, panels = by_groups(manifest, 2.1, list(finished), (1, STRIP))
    _scatter(panels, manifest, finished, task, "forward_flops_per_token", extra)
    for panel in panels:
        axes = panel.axes[0]
        for index, points in early.items():
            shade = colour(manifest, index) if index in panel.group else FAINT
            look: dict[str, Any] = {"mfc": "none", "mec": shade, "mew": 0.8, "ms": 3.5, "ls": ""}
            axes.plot(*points.T, marker=marker(manifest, index), zorder=1 + (index in panel.group), **look)
        for index, curve in curves.items():
            if index in panel.group:
                axes.plot(*curve.T, ls="-", color=colour(manifest, index), lw=1, alpha=0.8, zorder=1)
    handles: list[Any] = []
    if early:
        hollow: dict[str, Any] = {"ls": "", "marker": "o", "mfc": "none", "mec": GREY, "ms": 3.5}
        handles.append(Line2D([], [], label="leave after cycle 1, 2, ...", **hollow))
    if curves:
        handles.append(Line2D([], [], color=GREY, lw=1, label=f"{rule} threshold"))
    handles += _front([panel.axes[0] for panel in panels], manifest, results, task)
    _finish(figure, panels, manifest, results, task, "executed forward FLOPs/token", handles)
    return figure


def accuracy_vs_params(manifest: Manifest, results: dict[str, Outcome], task: TaskRow) -> Figure | None:
    """Means, each where its size is. Right: the seeds (dots) and the mean of each variant."""
    finished = _finished(manifest, results, task)
    if not finished:
        return None
    figure, panels = by_groups(manifest, 1.9, list(finished), (1, STRIP))
    _scatter(panels, manifest, finished, task, "params_non_embedding", np.empty((0, 2)))
    _finish(figure, panels, manifest, results, task, "non-embedding parameters", [])
    return figure


def learning_curves(manifest: Manifest, results: dict[str, Outcome], task: TaskRow) -> Figure | None:
    """Validation score by training tokens and by training FLOPs: means over seeds. Thin: the seeds, where they are too
    few for a band.
    """
    finished = _finished(manifest, results, task)
    if not finished:
        return None
    figure, panels = by_groups(manifest, 1.9, list(finished), (1, 1))
    seen: list[float] = []
    for panel in panels:
        for index in panel.group:
            records = finished.get(index, [])
            if not records:
                continue
            look: dict[str, Any] = {"color": colour(manifest, index), "ls": dash(manifest, index)}
            mark: dict[str, Any] = {"marker": marker(manifest, index), "ms": 3, "lw": 1.1, "alpha": 0.9}
            for axes, x in zip(panel.axes, ("tokens", "flops"), strict=True):
                at, values = _histories(records, x, task.metric)
                seen += [float(values.min()), float(values.max())]
                axes.plot(at, values.mean(0), label=manifest.variants[index].label, **look, **mark)
                over_seeds(axes, at, values, look, task)
    for panel in panels:
        for axes in panel.axes:
            with_units(axes, 3)
    _finish(figure, panels, manifest, results, task, "training tokens", [], "validation", seen)
    for panel in panels:
        panel.axes[1].set_xlabel("training FLOPs")
    return figure


def _histories(records: list[Record], x: str, metric: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where runs were validated [P] and their scores there [n, P]. Runs that were validated at other places, since they
    draw their numbers of cycles, are read between those, over what all of them have.
    """
    of = [np.array([(getattr(entry, x), entry.valid(metric)) for entry in record.history]).T for record in records]
    at = of[0][0]
    if not all(np.array_equal(at, one) for one, _ in of):
        at = np.linspace(max(one[0] for one, _ in of), min(one[-1] for one, _ in of), min(len(one) for one, _ in of))
    return at, np.array([np.interp(at, *one) for one in of])


def over_seeds(axes: Axes, at: Any, values: NDArray[np.float64], look: dict[str, Any], task: TaskRow) -> None:
    """Around a mean curve: the band of its interval, or each seed as a thin line where seeds are too few.

    values: of the task's metric, [n, P], a row a seed; look: of the curve.
    """
    if can_rank(len(values)):
        axes.fill_between(at, *band(values, bounds(task.metric)), color=look["color"], alpha=0.13, lw=0)
    elif len(values) > 1:
        axes.plot(at, values.T, lw=0.5, alpha=0.45, **look)


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
    tall = 0.75 + 0.2 * max(len(panel[2]) for panel in panels)
    columns = 1 if max(len(panel[3]) for panel in panels) > 4 else 2
    figure, all_axes, across = multiples(len(panels), min(tall, 3.0), columns)
    top = max(float(np.nanmax(panel[1])) for panel in panels) or 1.0
    annotated = all(panel[1].size <= 64 for panel in panels)
    for axes, (label, grid, blocks, cycles) in zip(all_axes, panels, strict=True):
        look = {"cmap": "cividis", "vmin": 0, "vmax": top, "annot": annotated, "fmt": ".2f", "cbar": False}
        sns.heatmap(grid, ax=axes, xticklabels=cycles, yticklabels=blocks, annot_kws={"size": 6.5}, **look)
        axes.set(xlabel="cycle", ylabel="block")
        axes.tick_params(axis="y", labelrotation=0)
        axes.set_title(fitting(label, figure, across), fontsize=7.5)
    if not annotated:
        figure.colorbar(all_axes[0].collections[0], ax=all_axes, label="probability").outline.set_visible(False)
    figure.suptitle(f"{task.label}: zero attention (probability)")
    return figure


def performance_profile(manifest: Manifest, results: dict[str, Outcome]) -> Figure | None:
    """Share of the runs whose normalised score is above tau, tasks weighing alike. n: seeds that have every task. A
    variant that has no run on one of the tasks is left out.
    """
    found = profiles(manifest, results)
    if not found:
        return None
    figure, panels = by_groups(manifest, 2.1, list(found))
    for panel in panels:
        [axes] = panel.axes
        for index, profile in ((index, found[index]) for index in panel.group if index in found):
            look: dict[str, Any] = {"color": colour(manifest, index), "ls": dash(manifest, index), "lw": 1.2, "ms": 3}
            look |= {"marker": marker(manifest, index), "markevery": (3 * index % 20, 20)}  # also where lines coincide
            label = f"{manifest.variants[index].label} (n = {profile.n})"
            axes.plot(profile.tau, profile.share, label=label, **look)
            axes.fill_between(profile.tau, profile.low, profile.high, color=look["color"], alpha=0.13, lw=0)
        axes.set(xlabel="normalised score tau (0: level, 1: perfect)", ylim=(-0.03, 1.03))
        axes.set_ylabel("share of runs above tau")
        panel.name()
    figure.suptitle(f"{len(comparable(manifest))} tasks")
    return figure


def _finished(manifest: Manifest, results: dict[str, Outcome], task: TaskRow) -> dict[int, list[Record]]:
    """The finished records of a task by the variant's place in the manifest; variants without one left out."""
    found = {i: done(manifest, results, variant.label, task.label) for i, variant in enumerate(manifest.variants)}
    return {index: records for index, records in found.items() if records}


def _scatter(
    panels: list[Panel],
    manifest: Manifest,
    finished: dict[int, list[Record]],
    task: TaskRow,
    cost: str,
    others: NDArray[np.float64],
) -> None:
    """Draw the means over a logarithmic cost axis that holds the other (cost, score) too, and beside it the seeds, with
    bars where they are enough; set the limits.
    """
    at = {index: float(np.mean([getattr(r.costs, cost) for r in records])) for index, records in finished.items()}
    scores = {index: [score(record, task.metric) for record in records] for index, records in finished.items()}
    over = {index: interval(some, bounds(task.metric)) for index, some in scores.items()}
    values = [*(value for some in scores.values() for value in some), *others[:, 1]]
    values += [end for one in over.values() if one.kind == "interval" for end in (one.low, one.high)]
    everything = np.log([*at.values(), *others[:, 0]])
    middle, span = (everything.min() + everything.max()) / 2, max(float(np.ptp(everything)), 0.3)
    for panel in panels:
        axes, strip = panel.axes
        for index, x in at.items():
            mine = index in panel.group
            look: dict[str, Any] = {"color": colour(manifest, index) if mine else FAINT, "ms": 6 if mine else 4}
            look |= {"ls": "", "marker": marker(manifest, index), "mec": "white", "mew": 0.6, "alpha": 0.85}
            label = manifest.variants[index].label if mine else None
            axes.plot(x, over[index].mean, label=label, zorder=4 if mine else 1, **look)
            if mine:
                _in_strip(strip, index - panel.group[0], scores[index], over[index], look)
        axes.set_xscale("log")
        axes.set_xlim(*np.exp([middle - 0.62 * span, middle + 0.62 * span]))
        with_units(axes)
        strip.set(xlim=(-0.6, len(panel.group) - 0.4), xticks=[], xlabel="seeds")
        levels(axes, task, values)


def _in_strip(strip: Axes, place: int, scores: list[float], over: Interval, look: dict[str, Any]) -> None:
    """A variant's seeds, its mean and, of enough seeds, its interval, at a place of an axis without a unit."""
    strip.scatter([place] * len(scores), scores, s=6, color=look["color"], alpha=0.6, lw=0, zorder=3)
    bars = [[over.mean - over.low], [over.high - over.mean]] if over.kind == "interval" else None
    options = {key: value for key, value in look.items() if key != "alpha"} | {"ms": 4.5, "ls": "", "mew": 0.5}
    strip.errorbar(place, over.mean, yerr=bars, capsize=1.8, elinewidth=0.9, zorder=4, **options)


def _front(panels: list[Axes], manifest: Manifest, results: dict[str, Outcome], task: TaskRow) -> list[Line2D]:
    """Draw the median front over all variants, of the seeds that all of those shown have finished."""
    found = [points_by_seed(manifest, results, variant.label, task) for variant in manifest.variants]
    shown = [seeds for seeds in found if seeds]
    common = sorted(set.intersection(*map(set, shown))) if shown else []
    if not can_rank(len(common)):
        return []
    band = median_front([np.concatenate([seeds[s] for seeds in shown]) for s in common], task.higher_is_better)
    for axes in panels:
        axes.step(band.cost, band.median, where="post", ls="--", color=GREY, lw=1, zorder=1)
        axes.fill_between(band.cost, band.low, band.high, step="post", color=GREY, alpha=0.12, lw=0, zorder=0)
    return [Line2D([], [], ls="--", color=GREY, lw=1, label=f"median front (n = {band.n})")]


def _finish(
    figure: Figure,
    panels: list[Panel],
    manifest: Manifest,
    results: dict[str, Outcome],
    task: TaskRow,
    xlabel: str,
    extra: list[Any],
    split: str = "test",
    values: Sequence[float] = (),
) -> None:
    """Axes, legends and title; levels too where values are given."""
    for panel in panels:
        for axes in panel.axes if values else ():
            levels(axes, task, values)
        panel.axes[0].set_xlabel(xlabel)
        panel.name()
    orient(panels[0].axes[0], task)
    figure.supylabel(f"{split} {axis_name(task)}", fontsize=8)
    figure.suptitle(title(manifest, results, task))
    if extra:
        legend(figure, extra, [str(line.get_label()) for line in extra])


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
