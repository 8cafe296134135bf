"""Versions of the store: what tells them apart, the former ids of cells, and how a cell gets another id.

``store.json`` holds the version. A store of an earlier one is brought up to date in place (``bench.run.upgrade``):
whatever the moment of a kill, a cell's files lie whole under its former id or under its new one, and the next opening
goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from bench.store.digests import digest_of, digests_in, is_sealed, read_sealed, without_card, write_sealed
from bench.store.files import sweep

VERSION = 4  # of the store: raise it when ids or files change, and teach bench.run.upgrade the step
SEALED = 4  # the version from which on JSON files tell their digests
ABOUT, FORMER = "store.json", "former.json"
ROOM = ".upgrade"  # where a cell's new folder is filled and its old one is emptied: nothing in it is needed
MANIFESTS = ("studies", "sweeps")
RECORDS = ("result.json", "failure.json")
TRACES = ("trace.npz", "trace_valid.npz")
MODEL = "model"
LATE = ("residual_scale",)  # fields of a shape that version 2 got when it had ids already
ID = re.compile("[0-9a-f]{64}")


class Former(BaseModel):
    """What a store remembers of earlier versions.

    ids: of cells by their former ones; other_mode: cells that were computed in another mode (in a stack, or alone) than
    their configuration now says.
    """

    ids: dict[str, str] = {}
    other_mode: list[str] = []


class FormerCell(BaseModel):
    """The same of one cell, in its own folder. ids: all that it had."""

    ids: list[str] = []
    other_mode: bool = False


def stored_version(root: Path) -> int | None:
    """The version that a store says it has, None if it says none: it is new, of the first versions, or damaged."""
    path = root / ABOUT
    version = (read(path) or {}).get("version")
    if not isinstance(version, int) or (version >= SEALED and not is_sealed(path.read_bytes())):
        return None
    return version


def write_version(root: Path) -> None:
    """Say that a store is of this version."""
    write_sealed(root / ABOUT, {"version": VERSION})


def cell_folders(root: Path) -> Iterator[Path]:
    """The folders of cells, whatever is in them."""
    with suppress(FileNotFoundError), os.scandir(root) as entries:
        yield from (Path(entry.path) for entry in entries if ID.fullmatch(entry.name) and entry.is_dir())


def holds_something(root: Path) -> bool:
    """Whether there is a cell, a study or a sweep in a folder."""
    return bool(manifests(root)) or next(cell_folders(root), None) is not None


def manifests(root: Path) -> list[Path]:
    """The files of studies and sweeps."""
    return [path for kind in MANIFESTS for path in sorted((root / kind).glob("*.json"))]


def former_of(root: Path) -> Former:
    """What a store remembers of earlier versions. Where that is damaged, the cells themselves are asked."""
    with suppress(ValidationError):
        if (told := read(root / FORMER)) is not None:
            return Former.model_validate(told)
    return _gathered(root, Former()) if (root / FORMER).exists() else Former()


def former_of_cell(folder: Path) -> FormerCell:
    """What a cell's folder tells of its former ids."""
    with suppress(ValidationError):
        return FormerCell.model_validate(read(folder / FORMER) or {})
    return FormerCell()


def located(path: Path) -> Path:
    """A path as it is now, where it leads through the folder of a cell by a former id."""
    if path.exists():
        return path
    for part in (path, *path.parents):
        if ID.fullmatch(part.name) and (now := former_of(part.parent).ids.get(part.name)) is not None:
            return part.parent / now / path.relative_to(part)
    return path


def model_folder(path: Path) -> Path:
    """The folder of a model, which may be named by that of its cell (``located``)."""
    folder = located(path)
    of_cell = (folder / MODEL / "config.json").is_file() and not (folder / "config.json").is_file()
    return folder / MODEL if of_cell else folder


def first_id(cell: Mapping[str, Any], schema: int) -> str:
    """The id that versions before 3 gave to a configuration: it told every field but those that came later and were
    not used.
    """
    shape = {name: value for name, value in cell["model"].items() if name not in LATE or value is not None}
    payload = {"schema": schema, **cell, "model": shape}
    return hashlib.sha256(json.dumps(payload, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read(path: Path) -> dict[str, Any] | None:
    """What a JSON file of this version or of an earlier one holds, None if it is missing or damaged."""
    with suppress(FileNotFoundError, NotADirectoryError, ValueError):
        data = path.read_bytes()
        value = read_sealed(path) if is_sealed(data) else json.loads(data)
        return value if isinstance(value, dict) else None
    return None


def move_cell(root: Path, old: str, new: str, files: Mapping[str, dict[str, Any]], other_mode: bool) -> bool:
    """Give a cell another id. Its files are linked into a new folder, which appears when it is whole; then the old one
    goes. It may be killed at any moment and called again.

    Args:
        root: of the store.
        old: the id so far.
        new: the id from now on.
        files: those that say something else from now on, by name.
        other_mode: see ``Former``.

    Returns:
        Whether that was done: not if another cell has the new id already. Then all is left as it is.
    """
    source, target = root / old, root / new
    if not target.exists():
        partial = root / ROOM / new
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial, copy_function=_link, ignore=shutil.ignore_patterns("lease.*", ".*"))
        for name, value in files.items():
            write_sealed(partial / name, value)
        ids = [*former_of_cell(source).ids, old]
        write_sealed(partial / FORMER, FormerCell(ids=ids, other_mode=other_mode).model_dump())
        os.rename(partial, target)
    elif old not in former_of_cell(target).ids:
        return False
    aside = root / ROOM / f"{old}.old"
    aside.parent.mkdir(exist_ok=True)
    os.rename(source, aside)
    shutil.rmtree(aside)
    return True


def clear_room(root: Path) -> None:
    """Remove what a killed upgrade has left half done."""
    shutil.rmtree(root / ROOM, ignore_errors=True)
    for folder in (root, *(root / kind for kind in MANIFESTS)):
        sweep(folder)


def left_by(folder: Path) -> dict[str, str]:
    """SHA-256 of what a cell has left beside its result, by path in its folder: its traces and its model."""
    traces = {name: digest_of(folder / name) for name in TRACES if (folder / name).is_file()}
    model = without_card(digests_in(folder / MODEL))
    return traces | {f"{MODEL}/{name}": digest for name, digest in model.items()}


def seal_all(root: Path) -> None:
    """Give every JSON file of a store its digest, and every result those of what lies beside it, as they are now."""
    for folder in cell_folders(root):
        sweep(folder)  # of an upgrade that was killed
        for path in folder.glob("*.json"):
            value = read(path)
            if value is not None and path.name == "result.json" and "files" not in value:
                write_sealed(path, {**value, "files": left_by(folder)})
            else:
                _seal(path)
    for folder in root.glob("data/*"):
        sweep(folder)
    for path in (root / FORMER, *manifests(root), *root.glob("data/*/data.json")):
        _seal(path)


def _seal(path: Path) -> None:
    """Give a JSON file its digest, if it has none; a damaged one is left to whoever reads it."""
    value = read(path)
    if value is not None and not is_sealed(path.read_bytes()):
        write_sealed(path, value)


def write_former(root: Path, ids: Mapping[str, str]) -> None:
    """Write down former ids, with what the cells themselves tell, beside those that are known already."""
    known = former_of(root)
    merged = _gathered(root, known.model_copy(update={"ids": {**known.ids, **ids}}))
    write_sealed(root / FORMER, merged.model_dump())


def _gathered(root: Path, known: Former) -> Former:
    """What is known, with what the cells themselves tell."""
    found, other = dict[str, str](), set(known.other_mode)
    for folder in cell_folders(root):
        told = former_of_cell(folder)
        found |= dict.fromkeys(told.ids, folder.name)
        other |= {folder.name} if told.other_mode else set()
    merged = {**known.ids, **found}
    ids = {old: merged.get(new, new) for old, new in sorted(merged.items())}
    return Former(ids=ids, other_mode=sorted(other))


def rename_in_manifests(root: Path, ids: Mapping[str, str]) -> None:
    """Put new ids in the place of former ones, in every study and every sweep."""

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: renamed(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [renamed(inner) for inner in value]
        return ids.get(value, value) if isinstance(value, str) else value

    for path in manifests(root):
        before = read(path)
        if before is not None and (after := renamed(before)) != before:
            write_sealed(path, after)


def _link(source: str, target: str) -> None:
    """A second name for a file; a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
