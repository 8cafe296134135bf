"""Memory that this process holds, as the system tells it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")  # of Linux


def peak_bytes() -> int:
    """The most memory that the process has held. On Linux by its own pages: what ``getrusage`` tells there has the peak
    of the process that started this one in it.
    """
    if STATUS.is_file():
        return told("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def told(name: str) -> int:
    """Bytes that Linux tells of this process, under a name of its own."""
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
