"""Worker processes on this machine. If one dies, hangs or prints without end, only the cells it was training suffer."""

from __future__ import annotations

import faulthandler
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from bench.plugins import pack
from bench.processes import (
    become_worker,
    cause_of_death,
    end_children,
    end_orphans,
    end_worker,
    on_pulse,
    worker_context,
)
from bench.run.cells import Job, TellOf, run_jobs
from bench.run.executors import HANG, POLL, Event, silence

GRACE = 10.0  # seconds a worker has to give its lease back when the study is interrupted
SPOKEN = 1 << 16  # bytes of what is printed for one piece of work that are kept
TAIL = 1 << 14  # bytes of its end, which tell of a death: Python alone writes five thousand then
AT_ONCE = 1 << 18  # bytes read at a time: who prints without end waits for his turn

Work = Callable[[TellOf], Iterator[tuple[str, Any]]]
"""What a worker is given, in a form that pickle takes. It yields keys and what came out of each."""


class _Worker:
    """A worker process, as seen by its parent."""

    def __init__(self, process: BaseProcess, connection: Connection, output: Connection, slot: int) -> None:
        self.process, self.connection, self.output, self.slot = process, connection, output, slot
        self.busy: list[str] = []  # the keys that have not ended
        self.leaving = False  # it takes no more work
        self.heard, self.spoken, self.tail = 0.0, 0, b""
        os.set_blocking(output.fileno(), False)

    def give(self, keys: Sequence[str], work: Work) -> None:
        self.busy, self.heard, self.spoken, self.tail = list(keys), time.monotonic(), 0, b""
        with suppress(OSError):  # if it died idle, poll will see it
            self.connection.send((len(keys), work))

    def events(self) -> Iterator[Event]:
        """What it has told. Raises an exception of any kind if it has died, or tells what nobody understands."""
        while self.connection.poll():
            event = Event(*self.connection.recv())
            self.heard = time.monotonic()
            if event.kind == "leaves":
                self.leaving = True
            elif event.kind != "alive":
                if event.kind == "end":
                    self.busy.remove(event.id)
                yield event

    def printed(self) -> Iterator[Event]:
        """What it has printed, up to a limit for each piece of work."""
        text = b""
        with suppress(OSError):
            while len(text) < AT_ONCE and (part := os.read(self.output.fileno(), AT_ONCE)):
                text += part
        if text and self.busy:
            kept = text[: max(0, SPOKEN - self.spoken)]
            if kept and self.spoken + len(text) > SPOKEN:
                kept += b"\n(what else it prints is left out)\n"
            self.spoken, self.tail = self.spoken + len(text), (self.tail + text)[-TAIL:]
            if kept:
                yield Event(self.busy[0], "output", (kept.decode(errors="replace"),))


class LocalExecutor:
    """Up to ``slots`` worker processes. Each is started when it is needed.

    With several GPUs, each process sees ``each`` of them. hang: seconds without a sign of life after which one is
    ended.
    """

    def __init__(self, slots: int, gpus: int = 0, each: int = 1, hang: float = HANG) -> None:
        self.slots, self.gpus, self.each, self.hang = slots, gpus, min(each, gpus), hang
        self._context, self._packed = worker_context(), pack()
        self._workers: list[_Worker] = []

    def __enter__(self) -> LocalExecutor:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        for worker in self._workers:
            with suppress(OSError):
                worker.connection.send(None)
            worker.connection.close()
            worker.output.close()  # who prints without end does not wait for a listener any more
            if error is not None:
                worker.process.terminate()
        for worker in self._workers:
            worker.process.join(GRACE)
            if worker.process.is_alive():
                end_worker(worker.process)

    def submit(self, pack: Sequence[Job]) -> None:
        self.give([job.cell.id for job in pack], partial(run_jobs, tuple(pack)))

    def give(self, keys: Sequence[str], work: Work) -> None:
        """Start a piece of work; there is an ``end`` for each of the keys, or a ``died``. At most ``slots`` pieces are
        out at a time.
        """
        idle = [worker for worker in self._workers if not worker.busy]
        for worker in [worker for worker in idle if worker.leaving]:
            idle.remove(worker)
            list(self._bury(worker))
        (idle[0] if idle else self._start()).give(keys, work)

    def _start(self) -> _Worker:
        slot = min(set(range(self.slots)) - {worker.slot for worker in self._workers})
        (ours, theirs), (output, printed) = self._context.Pipe(), self._context.Pipe(False)
        seen = ",".join(str((slot * self.each + number) % self.gpus) for number in range(self.each))
        arguments = theirs, printed, seen if self.gpus > 1 else None, self._packed
        process = self._context.Process(target=_serve, args=arguments)
        process.start()
        theirs.close()  # so that the worker's death is the end of the connection
        printed.close()
        self._workers.append(_Worker(process, ours, output, slot))
        return self._workers[-1]

    def poll(self) -> list[Event]:
        events = list[Event]()
        wait([worker.connection for worker in self._workers], POLL)
        for worker in list(self._workers):
            dead = not worker.process.is_alive()  # asked first: what it has told before is still there to be read
            events += worker.printed()
            try:
                events += worker.events()
            except Exception:  # whatever half a message makes pickle say
                dead = True
            if dead:
                events += self._bury(worker)
            elif worker.busy and time.monotonic() - worker.heard > self.hang:
                events += self._bury(worker, silence(self.hang))
        return events

    def _bury(self, worker: _Worker, cause: str = "") -> Iterator[Event]:
        """cause: why it is ended here; it has ended by itself if there is none."""
        self._workers.remove(worker)
        if not cause:
            worker.process.join(GRACE)
        if worker.process.is_alive():
            end_worker(worker.process)
        else:
            end_orphans()
        yield from worker.printed()
        worker.connection.close()
        worker.output.close()
        tail = worker.tail.decode(errors="replace") or None
        for key in worker.busy:
            yield Event(key, "died", (cause or cause_of_death(worker.process.exitcode or 0), tail))


def _serve(connection: Connection, printed: Connection, gpus: str | None, packed: bytes) -> None:
    """What a worker does: the work that it is sent, until it is told that there is no more.

    Args:
        connection: to the parent.
        printed: where everything goes that is printed here.
        gpus: numbers of the GPUs that it may see; None: all.
        packed: what the user has registered by hand.
    """
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    _print_to(printed)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # raises SystemExit, so that the lease is given back
    become_worker(packed)
    tell = partial(_send, connection, os.getpid())
    on_pulse(partial(tell, "", "alive", ()))
    while True:
        try:
            given: tuple[int, Work] | None = connection.recv()
        except EOFError:
            return
        if given is None:
            # There is no more work. The parent sends this message because closing the connection may not be enough:
            # this worker and others may hold copies of the parent's end, and as long as one is open, no end is seen.
            return
        left, work = given
        for key, outcome in work(tell):
            left -= 1
            if left:
                tell(key, "end", (outcome,))
        leaves = end_children()  # a library may have counted on what it has started: nothing more is done here
        if leaves:
            tell("", "leaves", ())
        tell(key, "end", (outcome,))
        if leaves:
            return


def _print_to(printed: Connection) -> None:
    """Send there what Python and all libraries print from here on, and where the process is if it crashes."""
    for number in (1, 2):
        os.dup2(printed.fileno(), number)
    printed.close()
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(
            io.BufferedWriter(Unheard(number, "w", closefd=False)), "utf-8", "backslashreplace", line_buffering=True
        )
        for number in (1, 2)
    )
    faulthandler.enable(sys.stderr)


class Unheard(io.FileIO):
    """A pipe that may be written to even if nobody listens: a cell does not fail because its parent was killed."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            return len(data)


def _send(connection: Connection, worker: int, id: str, kind: str, arguments: tuple[Any, ...]) -> None:
    """Tell the parent something. If the parent is gone, end: nobody needs the work. So does a copy of the worker.

    Others may then take the cells, because their leases belong to a dead process.
    """
    if os.getpid() != worker:
        os._exit(1)
    try:
        connection.send((id, kind, arguments))
    except OSError:
        os._exit(1)
