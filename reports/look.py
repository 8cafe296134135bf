"""How all figures look: as wide as a column of text, told apart by marker and dash as well as by colour."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from bench.store.manifest import Manifest, TaskRow
from bench.store.records import Outcome
from reports.table import done
from reports.units import metric_name, tick

WIDTH = 3.4  # inches: a column of a two-column paper, so that a font's size is the size it is printed in
WIDE = 7.0  # both columns
LONG, TALLEST = (
    6.5,
    9.6,
)  # inches: higher than the first, a figure takes both columns; it is never higher than the second
MOST = 6  # variants in a panel: there are as many looks, told apart without their colour too
MARKERS = "osD^vP"
DASHES: tuple[Any, ...] = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (7, 2)))
COLOURS = [sns.color_palette("colorblind")[i] for i in (0, 1, 2, 3, 4, 7)]
FAINT = "#c4c4c4"  # what is there to compare with
STYLE = {
    **sns.axes_style("whitegrid"),
    **sns.plotting_context("paper"),
    "image.cmap": "viridis",  # seaborn's own is known only where seaborn is imported, and it is looked up for any PNG
    "font.size": 8,
    "figure.titlesize": 8.5,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
    "axes.linewidth": 0.7,
    "grid.linewidth": 0.6,
    "grid.color": "#e4e4e4",
    "axes.edgecolor": "#666666",
    "pdf.fonttype": 42,  # text stays text
    "svg.hashsalt": "cyclebench",  # the same figure is the same file
}
NAMES, NAME_HEIGHT = 4, 0.07  # of solvers' levels: how many at most, and a name's share of a small axis
_LINE, _LETTER, _HANDLE = 0.145, 0.048, 0.35  # inches: a legend's line, a letter of it, a handle with its space


def new(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of one column's width and its axes [rows, columns]. height: inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def multiples(count: int, height: float, columns: int = 2, **options: Any) -> tuple[Figure, list[Axes], int]:
    """Panels of the same size, one for each of ``count``, in ``columns`` (one panel alone has the whole width); twice
    as many over both columns of a paper where the figure would be long. height: of a panel, inches, less where many
    panels would be higher than a page. Returns also how many stand side by side.
    """
    columns = min(columns, count)
    width, rows = WIDTH, math.ceil(count / columns)
    if rows * height > LONG:
        width, columns = WIDE, 2 * columns
        rows = math.ceil(count / columns)
    figure = Figure(figsize=(width, min(rows * height, TALLEST - 1.2) + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for spare in axes.flat[count:]:
        spare.set_axis_off()
    for one in axes.flat[max(count - columns, 0) : count] if options.get("sharex") else ():
        one.tick_params(labelbottom=True)  # also above a place that is left free
    return figure, list(axes.flat[:count]), columns


def fitting(text: str, figure: Figure, columns: int) -> str:
    """A panel's title in lines no longer than a panel is wide, where ``columns`` of them stand side by side."""
    letters = int(figure.get_size_inches()[0] / columns / 0.066)
    return "\n".join(textwrap.wrap(text, letters)) or text


def groups(manifest: Manifest) -> list[range]:
    """The variants by their places in the manifest, in as few groups of nearly equal size as panels can show."""
    n = len(manifest.variants)
    size = math.ceil(n / math.ceil(n / MOST)) if n else 1
    return [range(start, min(start + size, n)) for start in range(0, n, size)]


@dataclass(frozen=True)
class Panel:
    """A group of variants with its axes, side by side or one above the other, and the place of its legend."""

    group: range
    axes: list[Axes]
    below: Axes

    def name(self) -> None:
        """Write the legend of what the first axes show; take the panel away if that is nothing."""
        handles, labels = self.axes[0].get_legend_handles_labels()
        if not handles:
            for axes in self.axes:
                axes.set_axis_off()
        look: dict[str, Any] = {"loc": "upper center", "borderaxespad": 0.0, "ncols": _columns(labels, WIDTH)}
        self.below.legend(handles, labels, **look, **LEGEND)


def by_groups(
    manifest: Manifest, height: float, shown: Sequence[int], widths: Sequence[float] = (1,), stacked: int = 1
) -> tuple[Figure, list[Panel]]:
    """A figure with a panel for each group of variants that has some to show, all with the same vertical axis, or axes.

    Args:
        manifest: of the study.
        height: of a panel, inches, without its legend.
        shown: the variants that have something to show, by their places.
        widths: of the axes of a panel, side by side, relative to each other.
        stacked: so many axes of a panel one above the other, each with a vertical axis of its own.
    """
    found = [group for group in groups(manifest) if any(index in group for index in shown)]
    labels = [[manifest.variants[index].label for index in group if index in shown] for group in found]
    lines = max(-(-len(some) // _columns(some, WIDTH)) for some in labels)
    room = _LINE * lines + 0.08
    width, columns = (WIDE, 2) if len(found) * (height + room) > LONG else (WIDTH, 1)
    rows = -(-len(found) // columns)
    height = min(height, (TALLEST - 1.0) / rows - room)
    figure = Figure(figsize=(width, rows * (height + room) + 0.25), layout="constrained")
    ratios: dict[str, Any] = {"height_ratios": [height, room] * rows, "width_ratios": [*widths] * columns}
    grid = figure.add_gridspec(2 * rows, columns * len(widths), **ratios)
    panels: list[Panel] = []
    for number, group in enumerate(found):
        row, left = 2 * (number // columns), number % columns * len(widths)
        axes: list[Axes] = []
        parts = grid[row, left].subgridspec(stacked, 1)
        for part in range(stacked if stacked > 1 else 0):
            like = panels[0].axes[part] if panels else None
            axes.append(figure.add_subplot(parts[part, 0], sharex=axes[0] if axes else None, sharey=like))
            axes[-1].tick_params(labelbottom=part == stacked - 1)
        for part in range(len(widths) if stacked == 1 else 0):
            first = axes[0] if axes else panels[0].axes[0] if panels else None
            axes.append(figure.add_subplot(grid[row, left + part], sharey=first))
            if part:
                axes[-1].tick_params(labelleft=False)
        below = figure.add_subplot(grid[row + 1, left : left + len(widths)])
        below.set_axis_off()
        panels.append(Panel(group, axes, below))
    return figure, panels


def in_letters(text: str) -> str:
    """A label that matplotlib shows as it is: not as a formula, and in a legend even if it begins with ``_``."""
    return f"{' ' * text.startswith('_')}{text}".replace("$", r"\$")


LEGEND: dict[str, Any] = {"frameon": False, "columnspacing": 1.0, "handletextpad": 0.4, "labelspacing": 0.25}


def legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str], **options: Any) -> None:
    """A legend below the figure, in as many columns as its labels leave room for; the figure grows by its height."""
    width, height = figure.get_size_inches()
    columns = _columns(labels, width)
    lines = -(-len(labels) // columns) + ("title" in options)
    figure.set_size_inches(width, height + _LINE * lines + 0.1)
    look: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "borderaxespad": 0.2}
    figure.legend(handles, labels, **look, **LEGEND, **options)


def _columns(labels: Sequence[str], width: float) -> int:
    """Of a legend with these labels, so wide."""
    room = width / (_HANDLE + _LETTER * max(map(len, labels), default=1))
    return max(1, min(len(labels), int(room)))


def with_units(axes: Axes, ticks: int = 4) -> None:
    """Ticks of the cost axis at round numbers with unit prefixes, on a linear or a logarithmic scale."""
    axes.xaxis.set_major_locator(MaxNLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(tick))


def orient(axes: Axes, task: TaskRow) -> None:
    """Better is up."""
    if not task.higher_is_better:
        axes.invert_yaxis()


def axis_name(task: TaskRow) -> str:
    """The metric, with a word where the axis is turned."""
    direction = "" if task.higher_is_better else " (axis inverted)"
    return f"{metric_name(task.metric)}{direction}"


def title(manifest: Manifest, results: dict[str, Outcome], task: TaskRow) -> str:
    """The task and the number of seeds."""
    counts = [len(done(manifest, results, v.label, task.label)) for v in manifest.variants]
    n = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    return f"{task.label}: {n} seed{'' if n == '1' else 's'}"


def colour(manifest: Manifest, index: int) -> Any:
    """Of the variant at this place of the manifest; no other of its group has it."""
    return COLOURS[index % len(groups(manifest)[0])]


def marker(manifest: Manifest, index: int) -> str:
    """Of the variant at this place of the manifest; no other of its group has it."""
    return MARKERS[index % len(groups(manifest)[0])]


def dash(manifest: Manifest, index: int) -> Any:
    """Of the variant at this place of the manifest; no other of its group has it."""
    return DASHES[index % len(groups(manifest)[0])]


def levels(axes: Axes, task: TaskRow, values: Sequence[float]) -> None:
    """Draw the task's trivial levels and set the limits to hold them and ``values``; a level so far off that it would
    squash what is to be compared is told in words. Levels of solvers that do a part of the task are drawn where they
    lie within these limits.
    """
    low, high = min(values), max(values)
    span = high - low or 1.0
    near = {name: level for name, level in task.levels.items() if low - span < level < high + span}
    look: dict[str, Any] = {"ha": "right", "color": "#555555", "size": 6.5, "textcoords": "offset points"}
    for name, level in near.items():
        axes.axhline(level, ls=":", color="#777777", lw=1, zorder=1)
        place: Any = {"xycoords": ("axes fraction", "data"), "xytext": (0, 1), "va": "bottom"}
        axes.annotate(f"{name} {level:.3g}", (0.99, level), **place, **look)
    for number, (name, level) in enumerate((n, v) for n, v in task.levels.items() if n not in near):
        below = (level < low) == task.higher_is_better
        place = {"xycoords": "axes fraction", "va": "bottom" if below else "top"}
        place["xytext"] = (-2, (2 + 8 * number) * (1 if below else -1))
        axes.annotate(f"{name} {level:.3g}, {'below' if below else 'above'}", (1, 0 if below else 1), **place, **look)
    low, high = min([low, *near.values()]), max([high, *near.values()])
    margin = 0.08 * ((high - low) or 1.0)
    axes.set_ylim(low - margin, high + margin)
    _solvers(axes, task)


def _solvers(axes: Axes, task: TaskRow) -> None:
    """Lines with names for the solvers' levels within the axes' limits: where there are many, a few of them that are
    evenly spread from the best down, and none that would run into another level's name.
    """
    low, high = axes.get_ylim()
    room = NAME_HEIGHT * (high - low)
    inside = [(level, name) for name, level in task.solvers.items() if low < level < high - room]
    inside.sort(reverse=task.higher_is_better)
    taken = list(task.levels.values())
    look: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "size": 6.5}
    for level, name in inside[:: -(-len(inside) // NAMES) or 1]:
        if all(abs(level - other) > room for other in taken):
            axes.axhline(level, ls=(0, (1, 3)), color="#999999", lw=0.8, zorder=0.9)
            axes.annotate(name, (0.01, level), xytext=(0, 1), va="bottom", ha="left", color="#777777", **look)
            taken.append(level)
