"""Worker processes on this machine. If one dies, only the cells that it was training are lost."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from bench.plugins import pack
from bench.processes import become_worker, cause_of_death, worker_context
from bench.run.cells import Job, run_jobs
from bench.run.executors import POLL, Event

GRACE = 10.0  # seconds a worker has to give its lease back when the study is interrupted


class LocalExecutor:
    """Up to ``slots`` worker processes. Each is started when it is needed.

    With several GPUs, each process sees ``each`` of them.
    """

    def __init__(self, slots: int, gpus: int = 0, each: int = 1) -> None:
        self.slots, self.gpus, self.each = slots, gpus, min(each, gpus)
        self._context, self._packed = worker_context(), pack()
        self._workers: list[tuple[BaseProcess, Connection, int]] = []  # the last: its slot
        self._busy: dict[Connection, list[str]] = {}  # the ids of the cells it has not ended

    def __enter__(self) -> LocalExecutor:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        for process, connection, _ in self._workers:
            with suppress(OSError):
                connection.send(None)
            connection.close()
            if error is not None:
                process.terminate()
        for process, *_ in self._workers:
            process.join(GRACE)
            if process.is_alive():
                process.kill()
                process.join()

    def submit(self, pack: Sequence[Job]) -> None:
        connection = next((c for _, c, _ in self._workers if c not in self._busy), None) or self._start()
        self._busy[connection] = [job.cell.id for job in pack]
        with suppress(OSError):  # if it died idle, poll will see it
            connection.send(tuple(pack))

    def _start(self) -> Connection:
        slot = min(set(range(self.slots)) - {slot for *_, slot in self._workers})
        ours, theirs = self._context.Pipe()
        seen = ",".join(str((slot * self.each + number) % self.gpus) for number in range(self.each))
        process = self._context.Process(target=_serve, args=(theirs, seen if self.gpus > 1 else None, self._packed))
        process.start()
        theirs.close()  # so that the worker's death is the end of the connection
        self._workers.append((process, ours, slot))
        return ours

    def poll(self) -> list[Event]:
        events = []
        for connection in wait([c for _, c, _ in self._workers], POLL):
            assert isinstance(connection, Connection)
            try:
                event = Event(*connection.recv())
            except (EOFError, OSError):
                events += self._bury(connection)
                continue
            if event.kind == "end":
                self._busy[connection].remove(event.id)
                if not self._busy[connection]:
                    del self._busy[connection]
            events.append(event)
        return events

    def _bury(self, connection: Connection) -> list[Event]:
        worker = next(worker for worker in self._workers if worker[1] is connection)
        self._workers.remove(worker)
        connection.close()
        worker[0].join()
        cause = cause_of_death(worker[0].exitcode or 0)
        return [Event(id, "died", (cause,)) for id in self._busy.pop(connection, ())]


def _serve(connection: Connection, gpus: str | None, packed: bytes) -> None:
    """What a worker does: it trains the cells that it is sent, until it is told that there are no more.

    Args:
        connection: to the parent.
        gpus: numbers of the GPUs that it may see; None: all.
        packed: what the user has registered by hand.
    """
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # raises SystemExit, so that the lease is given back
    become_worker(packed)
    while True:
        try:
            pack: tuple[Job, ...] | None = connection.recv()
        except EOFError:
            return
        if pack is None:
            # There is no more work. The parent sends this message because closing the connection may not be enough:
            # this worker and others may hold copies of the parent's end, and as long as one is open, no end is seen.
            return
        tell = partial(_send, connection)
        for id, record in run_jobs(pack, tell):
            tell(id, "end", (record,))


def _send(connection: Connection, id: str, kind: str, arguments: tuple[Any, ...]) -> None:
    """Tell the parent something. If the parent is gone, end: nobody needs the work.

    Others may then take the cells, because their leases belong to a dead process.
    """
    try:
        connection.send((id, kind, arguments))
    except OSError:
        os._exit(1)
