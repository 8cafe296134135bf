"""What cycles do to the state, drawn, and which loops do not hold beyond the cycles they were trained with."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from bench.store.loops import record_divergence
from bench.store.manifest import Manifest, TaskRow
from bench.store.records import Outcome, Record
from reports.look import by_groups, colour, dash, legend, marker, title
from reports.table import done

MEASURED = {
    "state_norm": "norm of a\ntoken's state",
    "relative_change": "relative change",
    "spectral_radius": "spectral radius",
}


def state_by_cycle(manifest: Manifest, results: dict[str, Outcome], task: TaskRow) -> Figure | None:
    """Over the cycles of the test: the norm of a token's state after each, how much the cycle has changed it relative
    to that, and the spectral radius of the cycle's map, estimated by power iteration: below the line at 1 small changes
    of the state fade. Means over seeds; thin: the seeds; a line ends where a number is not finite.
    """
    found = _looped(manifest, results, task)
    if not found:
        return None
    figure, panels = by_groups(manifest, 3.9, list(found), stacked=len(MEASURED))
    for panel in panels:
        for axes, (name, label) in zip(panel.axes, MEASURED.items(), strict=True):
            for index in (index for index in panel.group if index in found):
                table = _table(found[index], name)
                cycles, mean = np.arange(1, table.shape[1] + 1), table.mean(0)
                look: dict[str, Any] = {"color": colour(manifest, index), "ls": dash(manifest, index)}
                mark: dict[str, Any] = {"marker": marker(manifest, index), "ms": 3.5, "lw": 1.2}
                axes.plot(cycles, mean, label=manifest.variants[index].label, **look, **mark)
                if len(table) > 1:
                    axes.plot(cycles, table.T, lw=0.4, alpha=0.35, **look)
                at = cycles == found[index][0].cell.model["n_cycles"]
                ring: dict[str, Any] = {"ls": "", "marker": "o", "ms": 8, "mfc": "none", "mec": look["color"]}
                axes.plot(cycles[at], mean[at], mew=1.2, **ring)
            axes.set_ylabel(label)
            if name != "spectral_radius":
                axes.set_yscale("log")
            else:
                axes.axhline(1, color="#444444", lw=0.9, zorder=1)
        panel.axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.axes[-1].set_xlabel("cycle")
        panel.name()
    figure.suptitle(title(manifest, results, task))
    trained = Line2D([], [], ls="", marker="o", ms=8, mfc="none", mec="#444444")
    legend(figure, [trained], ["cycles it was trained with"])
    return figure


def diverging(manifest: Manifest, results: dict[str, Outcome]) -> list[str]:
    """A line for each task and variant with loops that do not hold beyond their trained cycles."""
    lines = []
    for task in manifest.tasks:
        for index, records in _looped(manifest, results, task).items():
            told = [(record, line) for record in records if (line := record_divergence(record)) is not None]
            if told:
                record, line = told[0]
                where = f"{task.label}, {manifest.variants[index].label}, {len(told)} of {len(records)} seeds"
                lines.append(f"{where}: {line} (seed {record.cell.seed}).")
    return lines


def _looped(manifest: Manifest, results: dict[str, Outcome], task: TaskRow) -> dict[int, list[Record]]:
    """By the variant's place in the manifest, the finished records that tell of a loop."""
    of = {i: done(manifest, results, variant.label, task.label) for i, variant in enumerate(manifest.variants)}
    told = {index: [record for record in records if record.loops] for index, records in of.items()}
    return {index: records for index, records in told.items() if records}


def _table(records: list[Record], name: str) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """A measure [n, C] by seed and cycle, over the cycles that all of them have."""
    length = min(len(record.loops) for record in records)
    return np.array([[getattr(point, name) for point in record.loops[:length]] for record in records], dtype=float)
