"""What a store holds that nothing needs: cells, prepared data, checkpoints, and what killed processes have left.

A study needs every cell that its manifest names; a sweep, every cell of its trials; a cell, the one that it starts from
and its data. What a living process may be at is never touched, and what is not sure is kept.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench.run.lease import Lease, LeaseWatch, read_lease
from bench.store.files import is_partial
from bench.store.store import TRIALS, Store
from bench.store.versions import MANIFESTS, ROOM, cell_folders, manifests, read

OLD = 3600.0  # seconds without a change after which half a file is nobody's
BIN = ".clean"  # where a cell's folder is moved to before it is emptied: it is never half there
NAMED = re.compile("(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")  # a cell's id, or the fingerprint of data

Kind = Literal["cell", "data", "checkpoints", "half"]


@dataclass(frozen=True)
class Waste:
    """What may go. about: in words; size: bytes."""

    kind: Kind
    path: Path
    about: str
    size: int


def waste(store: Store, trials: Collection[str] = ()) -> tuple[list[Waste], str]:
    """What nothing needs, and why cells or prepared data are all kept, '' if they are not.

    trials: ids of the cells that sweeps need, from their database.
    """
    needed = _needed(store, trials)
    cells = {folder.name: folder for folder in cell_folders(store.root)}
    idle = {id: folder for id, folder in cells.items() if read_lease(folder) is None}
    found: list[Waste] = []
    if unsure := _damaged(store):
        gone = set[str]()
    else:
        gone = idle.keys() - needed
        found += [Waste("cell", cells[id], _told(store, id), _size(cells[id])) for id in sorted(gone)]
        data, unsure = _data_of(store, sorted(cells.keys() - gone))
        if not unsure:
            folders = [folder for folder in (store.root / "data").glob("*") if folder.name not in data]
            found += [Waste("data", folder, "prepared data of no cell", _size(folder)) for folder in folders]
    for id in sorted(idle.keys() & needed):
        if (checkpoints := cells[id] / "checkpoints").is_dir() and store.done(id):
            found.append(Waste("checkpoints", checkpoints, f"of finished cell {id[:12]}", _size(checkpoints)))
    half = [*_half(store.root), *(path for id in idle.keys() - gone for path in _half_of_cell(cells[id]))]
    found += [Waste("half", path, "half written, by a process that has died", _size(path)) for path in half]
    return found, unsure


def clean(store: Store, found: Iterable[Waste], trials: Collection[str] = ()) -> Iterator[Waste]:
    """Remove what ``waste`` has found; yields what is gone. A cell that a process has taken in the meantime, or a study
    has come to need, stays.
    """
    needed, watch = _needed(store, trials), LeaseWatch()
    for one in found:
        if one.kind == "cell":
            number = watch.free(one.path)
            if one.path.name in needed or number is None or Lease.take(one.path, number) is None:
                continue
            aside = store.root / BIN / one.path.name
            aside.parent.mkdir(exist_ok=True)
            one.path.rename(aside)  # with the lease that is ours
            shutil.rmtree(aside.parent, ignore_errors=True)
        elif one.path.is_dir():
            shutil.rmtree(one.path, ignore_errors=True)
        else:
            one.path.unlink(missing_ok=True)
        yield one


def _needed(store: Store, trials: Collection[str]) -> set[str]:
    """The ids of all cells that a study or a sweep names, in whatever place of its file, and of those that these start
    from.
    """
    texts = [_text(path) for path in manifests(store.root)]
    named = {store.current(id) for id in [*trials, *(id for text in texts for id in NAMED.findall(text))]}
    starts = (NAMED.findall(_text(store.folder(id) / "cell.json")) for id in named)
    return named | {store.current(id) for found in starts for id in found}


def _damaged(store: Store) -> str:
    """Which file, of those that tell what cells are needed, is damaged or was set aside as that; '' if none is."""
    aside = [path for kind in MANIFESTS for path in (store.root / kind).glob("*.corrupt")]
    aside += store.root.glob(f"{TRIALS}.damaged-*")
    bad = next(iter([*aside, *(path for path in manifests(store.root) if read(path) is None)]), None)
    return "" if bad is None else f"cells: {bad} is damaged, and which of them it needs is not known"


def _data_of(store: Store, cells: Iterable[str]) -> tuple[set[str], str]:
    """The fingerprints of the data of cells, and of which cell or task they are not known, '' if of none."""
    known = {id: told["fingerprint"] for id in cells if (told := _configuration(store, id))}
    listed: set[str] = set()
    for name in store.studies():
        manifest = store.manifest(name)
        if manifest is None:
            return set(), f"prepared data: the study {name} cannot be read"
        listed |= {cell.id for cell in manifest.cells}
        for task in manifest.tasks:
            ids = [cell.id for cell in manifest.cells if cell.task == task.label]
            if ids and not any(id in known for id in ids):
                return set(), f"prepared data: of {name}, no cell has ended on {task.label} yet"
    others = [id for id in cells if id not in known and id not in listed]
    return set(known.values()), f"prepared data: cell {others[0][:12]} has not ended yet" if others else ""


def _configuration(store: Store, id: str) -> dict[str, Any]:
    """What a cell is, by its smallest file that tells; empty if none does."""
    folder = store.folder(id)
    if (told := read(folder / "cell.json")) is not None and "fingerprint" in told:
        return told
    record = store.record(id)
    return {} if record is None else record.cell.dump()


def _half(root: Path) -> Iterator[Path]:
    """What was left half written outside of cells."""
    folders = [
        root,
        root / "data",
        *(root / kind for kind in MANIFESTS),
        root / "reports",
        *(root / "reports").glob("*"),
    ]
    paths = [path for folder in folders if folder.is_dir() for path in folder.iterdir() if is_partial(path)]
    yield from (path for path in (*paths, root / ROOM, root / BIN) if path.exists() and _old(path))


def _half_of_cell(folder: Path) -> Iterator[Path]:
    paths = [*folder.glob(".*"), *folder.glob("checkpoints/.*")]
    yield from (path for path in paths if is_partial(path) and _old(path))


def _old(path: Path) -> bool:
    """Whether nobody has written to a file, or into a folder, for long."""
    with suppress(FileNotFoundError):
        newest = max(inner.stat().st_mtime for inner in (path, *path.rglob("*")))
        return time.time() - newest > OLD
    return False


def _told(store: Store, id: str) -> str:
    """A cell that no study needs, in words."""
    record = store.record(id)
    if record is None:
        return "not finished, of no study"
    cell = f"{record.cell.variant} on {record.cell.task} seed {record.cell.seed}"
    if record.status == "failed":
        return f"{cell}, failed, of no study"
    return f"{cell}, trained in {record.timing.train_seconds:.0f} s, of no study"


def _size(path: Path) -> int:
    inner = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in inner if file.is_file())


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""
