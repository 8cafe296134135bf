"""Long rows of numbers that are made piece by piece: in memory, or in files, so that they may be longer than it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray

PIECE = 1 << 20  # numbers, or characters of text, to work on at a time


class Column:
    """Numbers in a row, to be added to and then read as a whole."""

    def __init__(self, kind: Any, room: Path | None) -> None:
        """kind: of the numbers. room: a folder; they are in a file there, without a name, and mapped into memory when
        they are read; what they take goes with the last of what reads them. None: they are in memory.
        """
        self.kind = np.dtype(kind)
        self._parts: list[NDArray[Any]] = []
        self._file = None if room is None else TemporaryFile(dir=room)  # noqa: SIM115 (open as long as the column)

    def add(self, values: NDArray[Any]) -> None:
        """Put values behind those there are."""
        values = values.astype(self.kind, copy=False)
        if self._file is None:
            self._parts.append(values)
        else:
            self._file.write(np.ascontiguousarray(values).data)

    def whole(self) -> NDArray[Any]:
        """All of them; nothing is added afterwards."""
        if self._file is None:
            return np.concatenate([np.empty(0, self.kind), *self._parts])
        self._file.flush()
        if not self._file.tell():  # nothing cannot be mapped
            return np.empty(0, self.kind)
        return np.memmap(self._file, self.kind, mode="r")


def pieces(rows: int, width: int = 1) -> Iterator[slice]:
    """Rows of so many numbers, cut into pieces of about PIECE numbers."""
    size = max(1, PIECE // width)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def rows_of(
    values: NDArray[Any], wanted: NDArray[np.bool_], keep: int | None = None, room: Path | None = None
) -> NDArray[Any]:
    """The wanted rows [N] of values [N, T], or so many of them, evenly spaced; all of them: the values as they are."""
    n = int(wanted.sum())
    if n == len(values) and (keep is None or keep >= n):
        return values
    ranks = np.arange(keep) * n // keep if keep is not None and keep < n else None
    found, done = Column(values.dtype, room), 0
    for part in pieces(*values.shape):
        at = part.start + np.flatnonzero(wanted[part])
        done += len(at)
        if ranks is not None:
            first, last = np.searchsorted(ranks, [done - len(at), done])
            at = at[ranks[first:last] - (done - len(at))]
        found.add(values[at].ravel())
    return found.whole().reshape(-1, values.shape[1])


def batches(documents: Iterable[str]) -> Iterator[Sequence[str]]:
    """The documents, so many at a time that they have about PIECE characters."""
    batch, size = list[str](), 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= PIECE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
