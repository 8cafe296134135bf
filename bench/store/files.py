"""Files and folders that are there whole or not at all, whenever a process or the machine dies."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.errors import UserError

LOCK = ".upgrade.lock"  # of a store; its name is older than its other uses
PARTIAL = re.compile(r"\..+\.([a-z0-9_]{8}|\d+)")


def is_partial(path: Path) -> bool:
    """Whether a file or folder has the name of one that is not whole yet: what a killed process has left, or what a
    living one is writing.
    """
    return PARTIAL.fullmatch(path.name) is not None


@contextmanager
def whole_file(path: Path, room: Path | None = None) -> Iterator[Path]:
    """A path to write to. It becomes ``path`` when all is on the disk, and vanishes if anything goes wrong.

    room: the folder that it lies in meanwhile, by default that of ``path``. Raises FileNotFoundError if somebody has
    taken the room away: then ``path`` stays as it is.
    """
    if room is None:
        path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=room or path.parent, prefix=f".{path.name}.")
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        path.parent.mkdir(exist_ok=True)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def atomic_write(path: Path, data: bytes, room: Path | None = None) -> None:
    """Write a file so that it is there whole or not at all, whenever the process or the machine dies. room: as of
    ``whole_file``.
    """
    with whole_file(path, room) as partial:
        partial.write_bytes(data)


@contextmanager
def whole_folder(path: Path, room: Path) -> Iterator[Path]:
    """A folder to fill, in the folder ``room``. It becomes ``path`` when all is on the disk, and vanishes if anything
    goes wrong. Raises FileNotFoundError if there is no such room, or somebody has taken it away meanwhile, another
    OSError if there is a ``path`` that is not empty.
    """
    partial = room / f".{path.name}.{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for file in filter(Path.is_file, partial.rglob("*")):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        path.parent.mkdir(exist_ok=True)
        os.rename(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """A store's lock: of all processes on it, one at a time is within. It is given back when a process dies."""
    from filelock import FileLock  # start-up

    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / LOCK):
        yield


def sweep(folder: Path) -> None:
    """Remove files that killed writers have left half written. Nobody else may be writing to the folder."""
    for path in folder.glob(".*.json.*"):
        path.unlink(missing_ok=True)


def check_folder(out: str | Path | None) -> None:
    """Raises UserError, before the work that it is to hold, where ``--out`` is, or lies in, what is no folder."""
    place = None if out is None else next((path for path in (Path(out), *Path(out).parents) if path.exists()), None)
    if place is not None and not place.is_dir():
        where = "" if place == Path(str(out)) else f": {str(place)!r}"
        raise UserError(f"--out: {str(out)!r}{where} is no folder (allowed: a folder, there or to be made)")
