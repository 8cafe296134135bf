"""Downstream scores against the FLOPs they took, from stored rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import seaborn as sns

from reports.look import in_letters
from reports.render import file_names


def plot_scores(rows: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """One PNG for each task and metric: a line a checkpoint, a point for each number of cycles, bars of one stderr."""
    paths = []
    pairs = list(dict.fromkeys((row["task"], row["metric"]) for row in rows))
    for (task, metric), stem in zip(pairs, file_names(pairs), strict=True):
        chosen = [row for row in rows if (row["task"], row["metric"]) == (task, metric)]
        with sns.axes_style("whitegrid"), sns.color_palette("colorblind"):
            figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
            for checkpoint in dict.fromkeys(row["checkpoint"] for row in chosen):
                line = sorted(
                    (row for row in chosen if row["checkpoint"] == checkpoint), key=lambda row: row["flops_per_token"]
                )
                axes.errorbar(
                    [row["flops_per_token"] for row in line],
                    [row["value"] for row in line],
                    [row["stderr"] or 0.0 for row in line],
                    marker="o",
                    capsize=3,
                    label=in_letters(checkpoint),
                )
                for row in line:
                    axes.annotate(
                        f"{row['cycles']}", (row["flops_per_token"], row["value"]), (4, 4), textcoords="offset points"
                    )
            axes.set(ylabel=in_letters(metric), title=in_letters(task))
            axes.set(xlabel="executed FLOPs per token (numbers: cycles)")
            axes.legend()
            paths.append(out / f"{stem}.png")
            figure.savefig(paths[-1], dpi=150)
            plt.close(figure)
    return paths
