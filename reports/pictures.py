"""The figure of pictures by the cycle that they leave after."""

from __future__ import annotations

import base64

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bench.store.manifest import Manifest, TaskRow
from bench.store.records import Example, Outcome
from reports.exit_figures import with_exits
from reports.look import in_letters, new
from reports.table import exits_of

SIDE, PITCH = 0.85, 1.55  # of a picture, and from one row to the next, in widths of a column
HEIGHT = 0.22  # inches of a row


def exit_examples(manifest: Manifest, results: dict[str, Outcome], task: TaskRow) -> Figure | None:
    """The first test pictures that leave after each cycle, of every variant's first seed, at the threshold tuned on
    validation data for 80 % of the FLOPs at full depth. A picture that is told wrong has its class in brackets.
    """
    panels = []
    for label, records in with_exits(manifest, results, task):
        exits = exits_of(records[0])
        if exits.examples:
            panels.append((label, exits.examples, len(exits.points)))
    if not panels:
        return None
    rows = [(label, cycle, found) for label, found, cycles in panels for cycle in range(1, cycles + 1)]
    wide = max(sum(one.cycle == cycle for one in found) for _, cycle, found in rows)
    figure, [[axes]] = new(0.6 + HEIGHT * len(rows))
    names = []
    for row, (label, cycle, found) in enumerate(rows):
        names.append(f"{label} ({found[0].rule}), {cycle}" if cycle == 1 else str(cycle))
        for place, one in enumerate(one for one in found if one.cycle == cycle):
            pixels, at = picture(one), (place, place + SIDE, -PITCH * row, SIDE - PITCH * row)
            axes.imshow(pixels, cmap="gray_r" if pixels.ndim == 2 else None, interpolation="nearest", extent=at)
            told = in_letters(one.label if one.right else f"({one.label})")
            axes.text(place + SIDE / 2, at[3] + 0.06, told, size=5, ha="center", va="bottom")
    axes.set(xlim=(-0.1, wide), ylim=(-PITCH * (len(rows) - 1) - 0.1, PITCH))
    axes.set_yticks([SIDE / 2 - PITCH * row for row in range(len(rows))], names, size=6)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(False)
    axes.figure.suptitle(f"{task.label}: first seed\nrows: variant (rule), leaves after cycle")
    return figure


def picture(example: Example) -> NDArray[np.uint8]:
    """Pixels [H, W, 3], or [H, W] of grey ones."""
    found = np.frombuffer(base64.b64decode(example.pixels), np.uint8).reshape(example.shape)
    return found[..., 0] if found.shape[-1] == 1 else found
