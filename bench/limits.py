"""What one machine can hold and do: sizes are held against it before anything is made."""

from __future__ import annotations

import math
import os
from pathlib import Path

from bench.errors import UserError

MEMORY = "CYCLEBENCH_MEMORY"  # GiB of the machine that runs the cells, where that is another one
LONGEST = 1200.0  # seconds that data may take to make: every command that plans the study makes them again
CGROUP = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of version 2, of version 1


def machine_memory() -> float:
    """Bytes of memory that this machine has, or its container may use; what the variable says if it is set.

    Raises UserError if the variable is no number above 0.
    """
    if (said := os.environ.get(MEMORY)) is not None:
        try:
            given = float(said)
        except ValueError:
            given = math.nan
        if not 0 < given < math.inf:
            raise UserError(f"{MEMORY} = {said!r} must be a number of GiB above 0")
        return given * (1 << 30)
    import psutil  # start-up

    room = float(psutil.virtual_memory().total)
    for path in map(Path, CGROUP):
        try:
            room = min(room, float(path.read_text()))
        except (OSError, ValueError):  # there is none, or it says "max"
            continue
    return room


def check_memory(needed: float, room: float, what: str, relief: str) -> None:
    """Raises UserError if something takes more memory than there is.

    Args:
        needed: bytes that it takes at least: what is known to fail is refused, nothing else.
        room: bytes there are.
        what: takes them, the subject of the line.
        relief: what helps.
    """
    if needed > room:
        raise UserError(
            f"{what} would take at least {_bytes(needed)} of memory, of {_bytes(room)} here (allowed: {relief}, or "
            f"{MEMORY}=GIB where the cells run on a larger machine)"
        )


def check_time(needed: float, what: str, relief: str) -> None:
    """Raises UserError if something takes more seconds to make than it may. The arguments are as ``check_memory``'s."""
    if needed > LONGEST:
        raise UserError(
            f"{what} would take about {_duration(needed)} to make (allowed: up to {_duration(LONGEST)}, by {relief})"
        )


def _bytes(number: float) -> str:
    power = min(max(0, int(math.log2(max(number, 1)) // 10)), 6)
    return f"{number / (1 << 10 * power):.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB', 'EiB')[power]}"


def _duration(seconds: float) -> str:
    for unit, size in (("years", 365 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"
