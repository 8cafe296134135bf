"""Where cells run: processes on this machine, or a Ray cluster."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from bench.errors import UserError
from bench.run.cells import Job

POLL = 0.2  # seconds an executor waits for something to happen
HANG = 3600.0  # seconds without a sign of life after which what is at work is ended


class Event(NamedTuple):
    """Something that happened to a job.

    kind: ``start`` (label, steps), ``update`` (step, loss or None, tokens per second), ``phase`` (what it is at after
    its steps), ``began`` (seconds since 1970), ``entry`` (of its history), ``found``: the record that is coming is
    another process's work, ``output`` (text): something was printed, ``end`` (record, or None if another process holds
    the cell), ``died`` (reason, the end of what was printed or None): its worker is gone, and the job may be given out
    again.
    """

    id: str
    kind: str
    arguments: tuple[Any, ...]


class Executor(Protocol):
    """Runs packs of jobs somewhere; a context manager that ends its workers when it is left.

    One that shows no sign of life for a while (``bench.processes.pulse``) is ended, too, as if it had died.
    """

    slots: int  # packs at a time

    def __enter__(self) -> Executor: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None: ...

    def submit(self, pack: Sequence[Job]) -> None:
        """Start jobs that are to be run together; at most ``slots`` packs are out at a time."""

    def poll(self) -> list[Event]:
        """What has happened since the last call; waits for a moment if nothing has."""


def hang_seconds(minutes: float) -> float:
    """What ``--hang`` says, in seconds. Raises UserError if it is no number of minutes."""
    if isinstance(minutes, bool) or not isinstance(minutes, int | float) or not 0 < minutes < math.inf:
        raise UserError(f"--hang: {minutes!r} (allowed: a number of minutes above 0)")
    return 60 * minutes


def silence(seconds: float) -> str:
    """Why something was ended, in words. seconds: without a sign of life."""
    return f"no sign of life for {seconds / 60:g} minutes (--hang)"
