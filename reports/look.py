"""How all figures look."""

from __future__ import annotations

from typing import Any

import seaborn as sns
from matplotlib.axes import Axes

from reports.table import Manifest, Record, done
from reports.units import metric_name

MARKERS = "osD^vP*Xp<>h"
STYLE = {
    **sns.axes_style("whitegrid"),
    **sns.plotting_context("paper"),
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "grid.color": "#e4e4e4",
    "axes.edgecolor": "#666666",
    "svg.hashsalt": "cyclebench",  # the same figure is the same file
}
DPI = 200


def orient(axes: Axes, task: dict[str, Any]) -> None:
    """Better is up."""
    if not task["higher_is_better"]:
        axes.invert_yaxis()


def axis_name(task: dict[str, Any]) -> str:
    """The metric, with a word where the axis is turned."""
    direction = "" if task["higher_is_better"] else " (lower is better, axis inverted)"
    return f"{metric_name(task['metric'])}{direction}"


def title(manifest: Manifest, results: dict[str, Record], task: dict[str, Any]) -> str:
    """The task and the number of seeds."""
    counts = [len(done(manifest, results, v["label"], task["label"])) for v in manifest["variants"]]
    n = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    return f"{task['label']}: {n} seed{'' if n == '1' else 's'}"


def colour(manifest: Manifest, index: int) -> Any:
    """Of the variant at this place of the manifest."""
    palette = sns.color_palette("colorblind" if len(manifest["variants"]) <= 10 else "husl", len(manifest["variants"]))
    return palette[index]
