"""Downstream scores against the FLOPs they took, from stored rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from bench.store.files import atomic_write
from reports.look import COLOURS, DASHES, MARKERS, MOST, STYLE, fitting, in_letters, multiples, with_units
from reports.render import file_names, render

SURE = 1.96  # standard errors on either side of a mean: 95 % of a normal distribution


def plot_scores(rows: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """One PNG for each task, as it was asked, and metric: a line a checkpoint, a mark for each number of cycles at the
    FLOPs it took, and 95 % intervals over the documents.
    """
    paths = []
    pairs = list(dict.fromkeys((_asked(row), row["metric"]) for row in rows))
    for (task, metric), stem in zip(pairs, file_names(pairs), strict=True):
        chosen = [row for row in rows if (_asked(row), row["metric"]) == (task, metric)]
        with mpl.rc_context(STYLE):
            data = render(_figure(chosen, task, metric), f"scores of {task}", ("png",))["png"]
        paths.append(out / f"{stem}.png")
        atomic_write(paths[-1], data)
    return paths


def _asked(row: dict[str, Any]) -> str:
    """The task, with how it was asked where that is not as usual: other questions have a plot of their own."""
    return f"{row['task']}[{row['asked']}]" if row.get("asked") else row["task"]


def _figure(rows: Sequence[dict[str, Any]], task: str, metric: str) -> Figure:
    """Panels of at most ``MOST`` checkpoints."""
    checkpoints = list(dict.fromkeys(row["checkpoint"] for row in rows))
    groups = [checkpoints[start : start + MOST] for start in range(0, len(checkpoints), MOST)]
    figure, panels, across = multiples(len(groups), 2.2 + 0.15 * min(len(checkpoints), MOST), 1, sharey=True)
    for axes, group in zip(panels, groups, strict=True):
        for place, checkpoint in enumerate(group):
            line = sorted(
                (row for row in rows if row["checkpoint"] == checkpoint), key=lambda row: row["flops_per_token"]
            )
            at, values = [row["flops_per_token"] for row in line], [row["value"] for row in line]
            errors = [SURE * (row["stderr"] or 0.0) for row in line]
            look: dict[str, Any] = {"color": COLOURS[place], "ls": DASHES[place], "marker": MARKERS[place], "ms": 4}
            axes.errorbar(at, values, errors, capsize=2, lw=1, label=in_letters(checkpoint[-60:]), **look)
            for row in line:
                where = (row["flops_per_token"], row["value"])
                axes.annotate(f"{row['cycles']}", where, (4, 4), textcoords="offset points", fontsize=6.5)
        axes.set(ylabel=in_letters(metric), xlabel="executed FLOPs/token (numbers: cycles)")
        axes.margins(0.12)
        with_units(axes)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.3), frameon=False)
    figure.suptitle(fitting(in_letters(task), figure, across))
    return figure
