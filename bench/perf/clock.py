"""Sections that share a fixed time: each in a process of its own, which is ended when its share is used up.

A section that hangs, dies or breaks the GPU for its process costs the others no more than its share. What it has told
until then counts.
"""

from __future__ import annotations

import math
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from bench.errors import typed_line
from bench.perf.timing import Row
from bench.processes import become_worker, cause_of_death, worker_context

GRACE = 5.0  # seconds that a section has to put things in order when its time is over
RESERVE = 2 * GRACE  # of all the time: for the last section's, and for what the caller does afterwards
Emit = Callable[[Row], None]
Take = Callable[[str, Row | None, str], None]
"""Called with a section's name and a row as soon as there is one; at its beginning and end with None and its state."""


@dataclass(frozen=True)
class Section:
    """A part of what is to be done.

    Attributes:
        name: of it.
        title: what its rows tell.
        run: called with the setting and what takes a row; it can be pickled.
        share: of the time that is left, beside the shares of the sections that follow: what one leaves over, the next
            ones divide.
        least: seconds of its share under which it is not begun.
    """

    name: str
    title: str
    run: Callable[[Any, Emit], None]
    share: float
    least: float


def run_sections(sections: Sequence[Section], setting: Any, end: float, take: Take) -> None:
    """Run the sections in their order until ``end`` (of ``time.monotonic``).

    A section's last state is ``done``, or says what became of it: skipped, cut off, failed and of what.
    """
    first = worker_context().Process(target=worker_context)  # the one that all are forked from imports a lot
    first.start()
    first.join()
    for place, section in enumerate(sections):
        shares = [each.share for each in sections[place:]]
        room = (end - RESERVE - time.monotonic()) * section.share / sum(shares)
        if room < section.least:
            take(section.name, None, f"skipped: {max(0.0, room):.0f} s are left for it, it needs {section.least:.0f} s")
            continue
        take(section.name, None, "running")
        take(section.name, None, _run(section, setting, room, take))


def _run(section: Section, setting: Any, room: float, take: Take) -> str:
    """Run a section for ``room`` seconds at most; its last state."""
    start = time.monotonic()
    ours, theirs = worker_context().Pipe()
    process = worker_context().Process(target=_serve, args=(theirs, section.run, setting))
    process.start()
    theirs.close()  # so that the process's death is the end of the connection
    state = ""
    try:
        while not state:
            left = start + room - time.monotonic()
            if left <= 0:
                state = f"cut off after {room:.0f} s"
            elif ours.poll(left):
                row, state = ours.recv()
                if row is not None:
                    take(section.name, _plain(row), "")
    except EOFError:
        process.join()
        state = f"failed: {cause_of_death(process.exitcode or 0)}"
    finally:
        process.terminate()  # what it had to tell is told
        process.join(GRACE)
        if process.is_alive():
            process.kill()
            process.join()
        ours.close()
    return state


def _serve(connection: Connection, run: Callable[[Any, Emit], None], setting: Any) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # raises SystemExit, so that workers are ended, too
    become_worker()
    state = "done"
    try:
        run(setting, lambda row: connection.send((row, "")))
    except Exception as error:
        traceback.print_exc()
        state = f"failed: {typed_line(error)}"
    with suppress(OSError):
        connection.send((None, state))


def _plain(row: Row) -> Row:
    """The row as JSON can hold it: a number that is none is left out."""
    return {key: value for key, value in row.items() if not (isinstance(value, float) and not math.isfinite(value))}
