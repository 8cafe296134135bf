"""Files and folders that are there whole or not at all, whenever a process or the machine dies."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to. It becomes ``path`` when all is on the disk, and vanishes if anything goes wrong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, whenever the process or the machine dies."""
    with whole_file(path) as partial:
        partial.write_bytes(data)


@contextmanager
def whole_folder(path: Path, room: Path) -> Iterator[Path]:
    """A folder to fill, in the folder ``room``. It becomes ``path`` when all is on the disk, and vanishes if anything
    goes wrong. Raises OSError if there is a ``path`` that is not empty.
    """
    partial = room / f".{path.name}.{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in filter(Path.is_file, partial.rglob("*")):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        path.parent.mkdir(exist_ok=True)
        os.rename(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
