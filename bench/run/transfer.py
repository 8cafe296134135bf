"""A study from one store into another, in a file: ``cyclebench export`` and ``import``.

What is imported is verified cell by cell: every file by its digest, every id by the configuration that it stands for.
Nothing that the store has is overwritten; where both have something and it differs, that is told.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from bench.config import CELL_SOURCE
from bench.errors import UserError, first_line
from bench.run.lease import EXPIRY, Lease, LeaseWatch
from bench.run.upgrade import open_store
from bench.store.archive import Index, unpack, write_archive
from bench.store.files import is_partial
from bench.store.manifest import CellRow, Manifest
from bench.store.records import Outcome, dotted
from bench.store.store import Store
from bench.store.versions import ABOUT, FORMER, RECORDS, cell_folders, write_former
from bench.study.naming import changes_between
from bench.study.schema import Study

OF_A_FAILURE = ("failure.json", "log.txt", FORMER)
ROOM = ".import"  # what begins the name of the folder that an archive is unpacked to

Fate = Literal["imported", "known", "conflict", "refused"]
"""Of a cell of an archive. Known: the store has the same; conflict: it has another result, which is kept."""


@dataclass(frozen=True)
class Taken:
    """What became of a cell of an archive. note: why, where that is to be told."""

    id: str
    name: str
    fate: Fate
    note: str = ""


def export_study(store: Store, manifest: Manifest, file: Path) -> tuple[Index, int]:
    """Write a study's manifest and all that its cells have left into an archive.

    Cells that its tuning has tried belong to it; one that is damaged is told, set aside and left out. Checkpoints,
    prepared data and sweeps stay behind.

    Returns:
        The archive's index, and how many cells it holds.

    Raises:
        UserError: if there is such a file, or no cell has a record.
    """
    if file.exists():
        raise UserError(f"{file}: there is such a file already (allowed: a new one)")
    read = {id: record for id in cells_of(manifest) if (record := store.record(id)) is not None}
    found = {id: record for id, record in read.items() if record.status == "failed" or store.whole(record)}
    if not found:
        raise UserError(f"study {manifest.study!r}: no cell has run yet, there is nothing to export")
    paths = [store.root / ABOUT, store.root / "studies" / f"{manifest.study}.json"]
    for id, record in found.items():
        paths += sorted(_left_by(store.folder(id), record))
    return write_archive(file, manifest.study, store.root, paths), len(found)


def cells_of(manifest: Manifest) -> list[str]:
    """The ids of a study's cells, and of those that its tuning has tried."""
    trials = (trial.id for row in manifest.tuning for trial in row.trials)
    return list(dict.fromkeys([*(cell.id for cell in manifest.cells), *trials]))


def _left_by(folder: Path, record: Outcome) -> Iterator[Path]:
    """The files of a cell that others may want."""
    if record.status == "failed":
        yield from (path for name in OF_A_FAILURE if (path := folder / name).is_file())
        return
    for path in folder.iterdir():
        if path.name.startswith((".", "lease.")) or path.name == "checkpoints" or path.suffix == ".corrupt":
            continue
        if path.is_dir():
            yield from (inner for inner in path.rglob("*") if inner.is_file() and not is_partial(inner))
        elif path.name != "failure.json":
            yield path


def import_archive(file: Path, store: Store) -> tuple[Manifest, list[Taken], str]:
    """Take what an archive holds into a store.

    Returns:
        The study's manifest as the store has it now, what became of each cell, and why the archive's own manifest was
        not taken, '' if it was.

    Raises:
        UserError: in one line, if it is no archive of a study.
    """
    room = store.root / f"{ROOM}.{os.getpid()}"
    shutil.rmtree(room, ignore_errors=True)
    try:
        index, damaged = unpack(file, room)
        if not (room / ABOUT).is_file():
            raise UserError(f"{file}: {ABOUT} is missing or damaged, which tells the version of its cells")
        staged = open_store(room)
        theirs = staged.manifest(index.study)
        if theirs is None:
            raise UserError(f"{file}: its study {index.study!r} is missing or damaged")
        store = open_store(store.root, begin=True)  # not before: what is no archive leaves no store behind
        taken = _take_all(staged, store, theirs, {name.partition("/")[0]: why for name, why in damaged.items()})
        if any((store.folder(one.id) / FORMER).exists() for one in taken):
            write_former(store.root, {})
        manifest, why = _joined(store, theirs)
        if not why:
            store.write_manifest(manifest.study, manifest)
        return manifest, taken, why
    finally:
        shutil.rmtree(room, ignore_errors=True)
        with suppress(OSError):
            store.root.rmdir()  # if there is nothing in it


def _take_all(staged: Store, store: Store, manifest: Manifest, damaged: dict[str, str]) -> list[Taken]:
    """Take every cell; one that a process is at is waited for as long as a dead process's lease lasts."""
    names = {staged.current(cell.id): cell.name for cell in manifest.cells}
    waiting = {*(folder.name for folder in cell_folders(staged.root)), *damaged.keys() & names.keys()}
    watch, until, found = LeaseWatch(EXPIRY), time.monotonic() + EXPIRY + 1, list[Taken]()
    while waiting:
        for id in sorted(waiting):
            name = names.get(id, f"cell {id[:12]}")
            wrong = damaged.get(id) or _wrong(staged, id)
            one = Taken(id, name, "refused", wrong) if wrong else _take(staged, store, id, name, watch)
            if one is None and time.monotonic() > until:
                one = Taken(id, name, "refused", "a process is running it here: import again when that has ended")
            if one is not None:
                found.append(one)
                waiting.discard(id)
        if waiting:
            time.sleep(1)
    order = {id: place for place, id in enumerate(names)}
    return sorted(found, key=lambda one: order.get(one.id, len(order)))


def _wrong(staged: Store, id: str) -> str:
    """Why a cell is not to be taken, '' if it may be."""
    record = staged.record(id)
    if record is None:
        return "its record is missing or damaged"
    if record.status == "done" and not staged.sound(id, weights=True):
        return "its traces or its model are damaged"
    try:
        said = record.cell.cell().id
    except ValidationError as error:
        return f"this version has no such cell: {first_line(error)}"
    return "" if said == id == record.id else f"its configuration has the id {said[:12]}"


def _take(staged: Store, store: Store, id: str, name: str, watch: LeaseWatch) -> Taken | None:
    """Take a cell, unless the store has a record of it; None if another process is at it."""
    theirs = staged.record(id)
    assert theirs is not None
    if (known := _known(store, theirs, name)) is not None:
        return known
    folder = store.folder(id)
    number = watch.free(folder)
    lease = None if number is None else Lease.take(folder, number)
    if lease is None:
        return None
    with lease:
        if (known := _known(store, theirs, name)) is not None:
            return known
        _move(staged.folder(id), folder, lease)
    if theirs.status == "done":
        (folder / "failure.json").unlink(missing_ok=True)
        store.tidy(id)
    return Taken(id, name, "imported")


def _known(store: Store, theirs: Outcome, name: str) -> Taken | None:
    """What is told of a cell that the store has a record of; None if theirs is to be taken."""
    ours = store.record(theirs.id)
    if ours is None or (ours.status == "failed" and theirs.status == "done"):
        return None
    if ours.status == "failed" or theirs.status == "failed":
        return Taken(theirs.id, name, "known")
    from bench.run.verify import record_difference  # start-up

    if gap := record_difference(ours, theirs):
        return Taken(theirs.id, name, "conflict", f"this store has a result, which is kept; theirs differs in {gap}")
    return Taken(theirs.id, name, "known")


def _move(source: Path, target: Path, lease: Lease) -> None:
    """Move a cell's files by way of the holder's room, its record last: it says that the others are there. Killed, it
    may be done again; stopped until another process has the cell, it moves nothing any more.
    """
    for path in sorted(source.iterdir(), key=lambda path: path.name in RECORDS):
        ready = path.rename(lease.room / path.name)
        if ready.is_dir():
            with suppress(FileNotFoundError):
                os.rename(target / path.name, lease.room / f"before.{path.name}")
        os.replace(ready, target / path.name)


def _joined(store: Store, theirs: Manifest) -> tuple[Manifest, str]:
    """The manifest of a study that the store may have run itself, with the seeds of both; or the store's own, and why
    theirs is another study.
    """
    ours = store.manifest(theirs.study)
    if ours is None:
        return theirs.but(config={**theirs.config, "imports": []}), ""  # code of another machine is not run here
    told = _difference(ours, theirs) or _unlike(store, ours, theirs)
    if told:
        return ours, f"the study {ours.study} of this store is another: {told}"
    have = {(cell.variant, cell.task, cell.seed) for cell in ours.cells}
    more = [cell for cell in theirs.cells if (cell.variant, cell.task, cell.seed) not in have]
    groups = {(cell.variant, cell.task): place for place, cell in reversed([*enumerate([*ours.cells, *more])])}
    cells = sorted([*ours.cells, *more], key=lambda cell: (groups[cell.variant, cell.task], cell.seed))
    joined = ours.but(cells=cells, seeds=sorted({*ours.seeds, *theirs.seeds}))
    if theirs.verdicts_at:
        joined = joined.but(verdicts_at=sorted({*ours.verdicts_at, *theirs.verdicts_at}))
    if ours.decide is None or theirs.decide is None:
        return joined.but(config={**ours.config, "seeds": joined.seeds}), ""
    return joined.but(decide=ours.decide.but(changed=ours.decide.changed or theirs.decide.changed)), ""


def _difference(ours: Manifest, theirs: Manifest) -> str:
    """In what two studies of one name differ, but for their seeds; '' if in nothing."""
    try:
        changes = changes_between(*(Study.model_validate(one.config) for one in (ours, theirs)))
    except (ValidationError, UserError) as error:  # of a version or with plug-ins that are not here
        same = {**ours.config, "seeds": 0, "imports": 0} == {**theirs.config, "seeds": 0, "imports": 0}
        return "" if same else first_line(error)
    return "; ".join(f"{change.key} is {change.written} here, {change.now} there" for change in changes)


def _unlike(store: Store, ours: Manifest, theirs: Manifest) -> str:
    """Which cells were made in another way here than there, on other data or another kind of device, say; '' if none
    were.
    """
    known: dict[tuple[str, str], dict[str, Any]] = {}
    for manifest in (ours, theirs):
        for cell, record in _first_of_each(store, manifest):
            told = dict(dotted(record.cell.dump()))
            if told.get("init.source", "").startswith(CELL_SOURCE):  # of the same seed
                told["init.source"] = CELL_SOURCE
            first = known.setdefault((cell.variant, cell.task), told)
            differing = sorted(key for key in {*first, *told} - {"seed"} if first.get(key) != told.get(key))
            if differing:
                return f"cells of {cell.variant} on {cell.task} differ in {', '.join(differing)}"
    return ""


def _first_of_each(store: Store, manifest: Manifest) -> Iterator[tuple[CellRow, Outcome]]:
    """A cell with its record for every variant and task that has one."""
    seen: set[tuple[str, str]] = set()
    for cell in manifest.cells:
        group = cell.variant, cell.task
        if group not in seen and (record := store.record(cell.id)) is not None:
            seen.add(group)
            yield cell, record
