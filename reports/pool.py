"""Processes that render figures. Small on purpose: they start while the rest of the report is being imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager

from bench.processes import follow_parent, light_context

MANY = 16  # cells: from here on it is worth the second that new processes take to start
WORKERS = 8


@contextmanager
def renderers(cells: int) -> Iterator[Executor | None]:
    """Processes to render the figures of a study of so many cells while the tables are made; None: do it here."""
    if cells < MANY:
        yield None
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ProcessPoolExecutor(min(cores, WORKERS), light_context(), _prepare) as pool:  # a fork would copy threads
        pool.submit(_nothing)  # the first task starts them all
        yield pool


def _prepare() -> None:
    follow_parent()
    import reports.render  # noqa: F401  # start-up


def _nothing() -> None:
    pass
