"""Leases: of all processes on all machines that share a store, one at a time runs a cell.

A cell's leases are numbered files, ``lease.1``, ``lease.2``, ...; the highest is the one that counts. Whoever creates
the next number holds the cell: creating a file that must not exist succeeds for one process only, on a shared file
system too. A number may be taken when the one before it has been given back, when its holder is known to be dead (it
ran on this machine), or when it has not been renewed for a while *by the watch of whoever looks at it*: clocks of
different machines are never compared.

A holder may be stopped at any moment, and go on when another has the cell. So it writes nothing into the cell's folder
but by way of a room of its own, from which whole files are moved to their places; the next holder takes the rooms of
those before away, by one renaming each, before it looks at the cell. From then on nothing of theirs can appear.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from bench.processes import gone, me, pulse
from bench.store.files import atomic_write

BEAT = 5.0  # seconds between renewals
EXPIRY = 60.0  # seconds without one after which a holder on another machine counts as dead


class LeaseLostError(Exception):
    """The holder did not renew in time (it was suspended, say) and another process has taken the cell."""


def _parse(content: bytes) -> dict[str, Any] | None:
    """What a lease says, None if it is being written or damaged."""
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        value = json.loads(content)
        owner = value["owner"]
        if isinstance(owner["pid"], int) and 0 < owner["pid"] < 1 << 31 and "born" in owner and "host" in owner:
            float(value["since"])
            return {**value, "released": value["released"] is True, "owner": {"machine": None, **owner}}
    return None


def _latest(folder: Path) -> tuple[int, Path] | None:
    with contextlib.suppress(FileNotFoundError):
        names = (name for name in os.listdir(folder) if name.startswith("lease."))
        numbers = [int(name[6:]) for name in names if name[6:].isdigit()]
        return (max(numbers), folder / f"lease.{max(numbers)}") if numbers else None
    return None


def read_lease(folder: Path) -> dict[str, Any] | None:
    """What the holder of a cell says of itself and its progress; None if nobody that may be alive holds it."""
    latest = _latest(folder)
    with contextlib.suppress(OSError):
        value = _parse(latest[1].read_bytes()) if latest else None
        if latest and value and not value["released"] and not gone(value["owner"]):
            return {**value, "renewed": latest[1].stat().st_mtime}
    return None


class LeaseWatch:
    """Sees which cells are free; remembers since when a lease has not been renewed."""

    def __init__(self, expiry: float = EXPIRY) -> None:
        self.expiry = expiry
        self._seen: dict[Path, tuple[int, float]] = {}

    def free(self, folder: Path) -> int | None:
        """The number that the next lease of a free cell must have, None while somebody holds the cell."""
        latest = _latest(folder)
        if latest is None:
            return 1
        number, path = latest
        try:
            stamp = path.stat().st_mtime_ns
            value = _parse(path.read_bytes())
        except FileNotFoundError:  # given back this moment
            return None
        if value is not None and (value["released"] or gone(value["owner"])):
            return number + 1
        known, now = self._seen.get(path), time.monotonic()
        if known is None or known[0] != stamp:
            self._seen[path] = (stamp, now)
            return None
        return number + 1 if now - known[1] > self.expiry else None


def hold(folder: Path) -> Lease:
    """The lease of a cell, as soon as no other process holds it."""
    watch = LeaseWatch()
    while True:
        number = watch.free(folder)
        lease = None if number is None else Lease.take(folder, number)
        if lease is not None:
            return lease
        pulse()
        time.sleep(1)


class Lease:
    """A cell held by this process; a context manager that renews it and gives it back.

    room: where the holder fills what it moves into the cell's folder when it is whole.
    """

    def __init__(self, folder: Path, number: int, beat: float = BEAT) -> None:
        """Use ``take``."""
        self.folder, self.number, self.beat = folder, number, beat
        self.room = folder / f".work.{number}.{os.getpid()}"
        self._value: dict[str, Any] = {"owner": me(), "since": time.time(), "released": False}
        self._stop, self._lost = threading.Event(), False
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    @classmethod
    def take(cls, folder: Path, number: int, beat: float = BEAT) -> Lease | None:
        """The lease of that number, None if another process has it. Raises OSError if the disk refuses the file."""
        lease = cls(folder, number, beat)
        folder.mkdir(parents=True, exist_ok=True)
        latest = _latest(folder)
        if latest is not None and latest[0] >= number:
            return None
        try:
            handle = os.open(lease.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return None
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(json.dumps(lease._value).encode())
            lease._sweep()
            lease.room.mkdir()
        except OSError:
            lease.path.unlink(missing_ok=True)
            raise
        return lease

    @property
    def path(self) -> Path:
        return self.folder / f"lease.{self.number}"

    def _sweep(self) -> None:
        """Take away what former holders have left half written, before their eyes if they are still there."""
        for path in (*self.folder.glob(".*"), *self.folder.glob("checkpoints/.*")):
            with contextlib.suppress(FileNotFoundError):
                if not path.is_dir():
                    path.unlink()
                    continue
                if not path.name.startswith(".swept."):
                    path = path.rename(self.folder / f".swept.{self.number}{path.name}")
                shutil.rmtree(path, ignore_errors=True)

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Give the cell back. The file stays, as the next number depends on it, until the cell has a result."""
        self._stop.set()
        self._thread.join()
        shutil.rmtree(self.room, ignore_errors=True)
        with contextlib.suppress(OSError):
            if (self.folder / "result.json").exists():
                for path in self.folder.glob("lease.*"):
                    path.unlink(missing_ok=True)
            elif not self._lost:
                self._value["released"] = True
                self._write()

    def check(self) -> None:
        """Raises LeaseLostError if another process has taken the cell: what it is doing must not be done twice."""
        with contextlib.suppress(OSError):  # of a disk that does not answer: then it is not known
            latest = _latest(self.folder)
            self._lost |= latest is None or latest[0] != self.number
        if self._lost:
            raise LeaseLostError(f"lease {self.number} of {self.folder.name[:12]} was taken over")

    def note(self, **progress: Any) -> None:
        """What the next renewal tells others of the cell's progress."""
        self._value = {**self._value, **progress}

    def _renew(self) -> None:
        while not self._stop.wait(self.beat):
            try:
                self.check()
                self._write()
            except LeaseLostError:
                return
            except OSError:  # a full disk: the time stamp alone may still be had
                with contextlib.suppress(OSError):
                    os.utime(self.path)

    def _write(self) -> None:
        atomic_write(self.path, json.dumps(self._value).encode())
