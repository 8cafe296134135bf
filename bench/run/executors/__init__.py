"""Where cells run: processes on this machine, or a Ray cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from bench.run.cells import Job

POLL = 0.2  # seconds an executor waits for something to happen


class Event(NamedTuple):
    """Something that happened to a job.

    kind: ``start`` (label, steps), ``update`` (step, loss, tokens per second), ``found``: the record that is coming is
    another process's work, ``end`` (record, or None if another process holds the cell), ``died`` (reason): its worker
    is gone, and the job may be given out again.
    """

    id: str
    kind: str
    arguments: tuple[Any, ...]


class Executor(Protocol):
    """Runs packs of jobs somewhere; a context manager that ends its workers when it is left."""

    slots: int  # packs at a time

    def __enter__(self) -> Executor: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None: ...

    def submit(self, pack: Sequence[Job]) -> None:
        """Start jobs that are to be run together; at most ``slots`` packs are out at a time."""

    def poll(self) -> list[Event]:
        """What has happened since the last call; waits for a moment if nothing has."""
