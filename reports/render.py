"""Figures as files, on several cores: that is what a report spends its time on."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from reports.look import DPI, STYLE

UNDATED: dict[str, dict[str, Any]] = {  # the same figure is the same file
    "png": {"Software": None},
    "svg": {"Date": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
KINDS = tuple(UNDATED)
WORTH = 40  # figures: for fewer, new processes take longer to start than they save
WORKERS = 8


def render(figure: Figure, kinds: tuple[str, ...]) -> dict[str, bytes]:
    """The figure's files by kind. It is laid out once, so that all of them are alike."""
    files = {}
    with mpl.rc_context(STYLE):
        figure.dpi = DPI
        if engine := figure.get_layout_engine():
            engine.execute(figure)
        figure.set_layout_engine("none")
        for kind in kinds:
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=DPI, metadata=UNDATED[kind])
            files[kind] = buffer.getvalue()
    return files


def render_all(figures: Iterable[Figure], kinds: tuple[str, ...]) -> list[dict[str, bytes]]:
    """``render`` of each, in their order."""
    drawn, one = list(figures), partial(render, kinds=kinds)
    workers = min(len(os.sched_getaffinity(0)), WORKERS)
    if workers == 1 or len(drawn) < WORTH:
        return [one(figure) for figure in drawn]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:  # a fork would copy a process that has threads
        return list(pool.map(one, drawn))
