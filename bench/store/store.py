"""The cell store: results by the SHA-256 of what made them, written so that nothing is ever half there."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel

from bench.config import Cell
from bench.errors import UserError
from bench.store.digests import END, DamagedError, digest_of, is_sealed, read_sealed, without_card, write_sealed
from bench.store.files import locked, sweep
from bench.store.manifest import SWEPT, TUNING, Manifest, SearchRow, SweepResult
from bench.store.records import ExecutionRow, Executions, Failure, HarnessFile, HarnessScores, Outcome, Record
from bench.store.versions import (
    MODEL,
    TRACES,
    Former,
    cell_folders,
    former_of,
    holds_something,
    stored_version,
    write_version,
)

LIGHT = 16 << 20  # bytes of a file that is read whenever its cell is looked at closely; of larger ones `verify` does
TRAINED_FOR = "searches.json"  # in the folder of a cell

Kind = TypeVar("Kind", bound=BaseModel)

ASIDE = ".corrupt"
UNFINISHED = ("lease.", ".lease.", ".work.", "checkpoints")
"""What the names of files begin with that only serve an unfinished cell."""

Split = Literal["test", "valid"]
"""Of the data that a trace is of."""

TRIALS = "optuna.db"  # beside the results: the trials of tunings and sweeps, where no other database is named

Trim = Callable[[dict[str, Any]], dict[str, Any]]
"""Makes less of what a result's file holds, before it becomes a record."""


class _Samples(BaseModel):
    samples: list[dict[str, float]] = []


class _Searches(BaseModel):
    searches: list[str] = []


class Records(Mapping[str, Outcome]):
    """Records of cells by id, read from the store whenever one is asked for: thousands need not fit in memory."""

    def __init__(self, store: Store, ids: Iterable[str], held: dict[str, Failure]) -> None:
        """ids: of cells that have a record; held: failures that may not be in the store, as the disk refused them."""
        self.store, self.ids, self.held = store, dict.fromkeys([*ids, *held]), held

    def __getitem__(self, id: str) -> Outcome:
        """Raises UserError if a record that should be there cannot be read: a damaged one is set aside."""
        if id not in self.ids:
            raise KeyError(id)
        record = self.held.get(id) or self.store.record(id)
        if record is None:
            where = self.store.folder(id) / "result.json"
            raise UserError(f"{where} could not be read and is set aside; the same command runs that cell again")
        return record

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __len__(self) -> int:
        return len(self.ids)


class Store:
    """Results under one folder, which is opened by ``bench.run.upgrade.open_store`` where it may be of an earlier
    version: ``<id>/cell.json``, ``result.json`` (written last: it says that a cell is done),
    ``failure.json``, and what else a cell leaves; ``studies/<name>.json`` names the cells of a study's last run;
    ``data/<fingerprint>/`` holds what cells are trained and tested on, which is made again where it is missing;
    ``former.json`` tells former ids of cells, which are as good as those of now.

    Every JSON file tells its digest, and a result those of its cell's traces and model. They are checked whenever a
    file is read. What is damaged is told in one line and set aside under another name, not deleted; its cell is not
    done any more.
    """

    def __init__(self, root: Path) -> None:
        """root: created when something is written. Raises UserError if it is a file."""
        self.root = Path(root)
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"--runs: {str(root)!r} is a file, not a folder")

    @cached_property
    def former(self) -> Former:
        """What the store remembers of earlier versions."""
        return former_of(self.root)

    def current(self, id: str) -> str:
        """The id that a cell has now, by that or by a former one."""
        return self.former.ids.get(id, id)

    def folder(self, id: str) -> Path:
        """The folder of a cell."""
        return self.root / self.current(id)

    def data(self, fingerprint: str) -> Path:
        """The folder of prepared data."""
        return self.root / "data" / fingerprint

    def done(self, id: str) -> bool:
        """Whether the cell has a result, judged by its ends alone: it was written whole, but a disk may have cut it."""
        path = self.folder(id) / "result.json"
        try:
            with path.open("rb") as file:
                first, size = file.read(END), file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 1))
                whole = size > END and is_sealed(first) and file.read(1) == b"}"
        except FileNotFoundError:
            return False
        if not whole:
            self._set_aside(path)
        return whole

    def sound(self, id: str, weights: bool = False) -> bool:
        """Whether the cell has a result of which every byte is as it was written, that of its traces, too, and of the
        files of its model that are not large.

        weights: of the large ones as well.
        """
        path = self.folder(id) / "result.json"
        try:
            files = read_sealed(path).get("files", {})
        except FileNotFoundError:
            return False
        except DamagedError:
            self._set_aside(path)
            return False
        return self._as_written(id, files, weights)

    def record(self, id: str, trim: Trim | None = None, traces: bool = False) -> Outcome | None:
        """The cell's result, else its failure, else None.

        Args:
            id: of the cell.
            trim: what of the result is wanted, None for all of it; what it takes away is not validated.
            traces: a result whose traces, or whose model's files that are not large, are damaged is none, either.
        """
        record = self._load(self.folder(id) / "result.json", Record, trim)
        if record is None or (traces and not self._as_written(id, record.files, False)):
            return self._load(self.folder(id) / "failure.json", Failure)
        path = self.folder(id) / "execution.json"
        if path.exists() and (execution := self._load(path, Executions)) is not None:
            record.execution = execution.root
        if scores := self.harness(id):
            record.harness = scores
        return record

    def trace(self, id: str, split: Split = "test", record: Outcome | None = None) -> bytes:
        """The trace of a finished cell. record: its own, if it is read already. Raises UserError if the trace is not as
        it was written.
        """
        name = TRACES[split == "valid"]
        record, path = record or self.record(id, _files_alone), self.folder(id) / name
        if record is None or record.status != "done":
            raise UserError(f"{path.parent / 'result.json'} is not there any more; the `run` command makes it again")
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise UserError(f"{path} is missing") from None
        if hashlib.sha256(data).hexdigest() != record.files.get(name):
            self._set_aside(path)
            raise UserError(f"{path} was damaged; the `run` command makes it again")
        return data

    def model(self, id: str) -> Path:
        """The folder of a finished cell's model. Raises UserError if it is not as it was written."""
        folder = self.folder(id) / MODEL
        if not self.sound(id, weights=True) or not folder.is_dir():
            raise UserError(f"{folder} is damaged or missing (the `run` command makes what was damaged again)")
        return folder

    def whole(self, record: Record) -> bool:
        """Whether every byte of the finished cell with this result is as it was written, that of its weights too."""
        return self._as_written(record.id, record.files, True)

    def _as_written(self, id: str, files: Mapping[str, str], weights: bool) -> bool:
        """Whether the files of a cell have their digests. Those that are missing are somebody's own doing."""
        folder = self.folder(id)
        for name, digest in without_card(files).items():
            with suppress(FileNotFoundError):
                read = weights or name in TRACES or (folder / name).stat().st_size <= LIGHT
                if read and digest_of(folder / name) != digest:
                    self._set_aside(folder / name)
                    return False
        return True

    def results(self, ids: Iterable[str]) -> dict[str, Outcome]:
        """The records of the given cells, those without one left out."""
        found = {id: self.record(id) for id in ids}
        return {id: record for id, record in found.items() if record is not None}

    def failures(self, ids: Iterable[str]) -> dict[str, Failure]:
        """The records of those of the given cells that have failed; none of them may be done."""
        found = self.results(ids)
        return {id: record for id, record in found.items() if record.status == "failed"}

    def write_cell(self, id: str, cell: Cell, room: Path | None = None) -> None:
        """Store what the cell is. room: of the cell's holder, see ``bench.run.lease``; so below."""
        write_sealed(self.folder(id) / "cell.json", cell.model_dump(mode="json"), room)

    def tidy(self, id: str) -> None:
        """Remove from a finished cell what only serves an unfinished one: its process may have died in between."""
        with os.scandir(self.folder(id)) as entries:
            left = [entry for entry in entries if entry.name.startswith(UNFINISHED)]
        for entry in left:
            if entry.is_dir():
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                Path(entry.path).unlink(missing_ok=True)

    def write_result(self, id: str, record: Record, room: Path | None = None) -> None:
        """Store a result. Raises UserError if the cell has one: results are never overwritten."""
        if self.done(id):
            raise UserError(f"cell {id[:12]} has a result already; it is not overwritten")
        write_sealed(self.folder(id) / "result.json", record.dump(), room)
        (self.folder(id) / "failure.json").unlink(missing_ok=True)

    def write_failure(self, id: str, record: Failure, room: Path | None = None) -> None:
        """Store why a cell failed. Raises UserError if it has a result."""
        if self.done(id):
            raise UserError(f"cell {id[:12]} has a result already; it has not failed")
        write_sealed(self.folder(id) / "failure.json", record.dump(), room)

    def write_execution(self, id: str, rule: str, rows: list[ExecutionRow]) -> None:
        """Store what was measured of a finished cell's exits beside what is known of the rule, in place of what was
        measured at the same thresholds before.

        Args:
            id: of the cell.
            rule: its key, followed by `` by token`` where tokens leave on their own.
            rows: one for each threshold.
        """
        path = self.folder(id) / "execution.json"
        with locked(self.root):
            before = self._load(path, Executions)
            known, at = before.root if before else {}, {row.threshold for row in rows}
            kept = [row for row in known.get(rule, []) if row.threshold not in at]
            self._dump(path, Executions({**known, rule: [*kept, *rows]}).dump())

    def harness(self, id: str) -> dict[str, HarnessScores]:
        """What the cell's model scores on tasks of lm-evaluation-harness, by key."""
        found = self._load(self.folder(id) / "harness.json", HarnessFile)
        return found.root if found is not None else {}

    def write_harness(self, id: str, scores: dict[str, HarnessScores]) -> None:
        """Store scores of a finished cell beside those of other keys."""
        with locked(self.root):
            self._dump(self.folder(id) / "harness.json", HarnessFile({**self.harness(id), **scores}).dump())

    def write_usage(self, id: str, samples: list[dict[str, float]], room: Path) -> None:
        """Store what the cell took of the machine (see ``bench.run.usage``)."""
        write_sealed(self.folder(id) / "usage.json", {"samples": samples}, room)

    def usage(self, id: str) -> list[dict[str, float]]:
        """What the cell took of the machine; empty if that is not known."""
        found = self._load(self.folder(id) / "usage.json", _Samples)
        return found.samples if found else []

    def note_trained_for(self, id: str, search: str) -> None:
        """Note that a search has had a cell trained: its database may be lost."""
        with locked(self.root):
            known = self._load(self.folder(id) / TRAINED_FOR, _Searches) or _Searches()
            if search not in known.searches:
                self._dump(self.folder(id) / TRAINED_FOR, {"searches": [*known.searches, search]})

    def trained_for(self, search: str) -> list[str]:
        """The cells that a search has had trained."""
        found = {folder.name: self._load(folder / TRAINED_FOR, _Searches) for folder in cell_folders(self.root)}
        return sorted(id for id, noted in found.items() if noted is not None and search in noted.searches)

    def write_manifest(self, study: str, manifest: Manifest) -> None:
        """Store which cells a study consists of; with the first study of a store, which version it has."""
        with locked(self.root):
            if stored_version(self.root) is None and not holds_something(self.root):
                write_version(self.root)
            self._dump(self.root / "studies" / f"{study}.json", manifest.dump())

    def manifest(self, study: str) -> Manifest | None:
        """The cells of a study's last run, None if it has not been run or this cannot be read."""
        return self._load(self.root / "studies" / f"{study}.json", Manifest)

    def studies(self) -> list[str]:
        """The names of all runs that have a manifest: of studies, of their tunings and of their sweeps."""
        return sorted(path.stem for path in (self.root / "studies").glob("*.json") if not path.name.startswith("."))

    def parts(self, study: str) -> list[str]:
        """Those of a study: its tuning, its sweep, itself."""
        return [name for name in self.studies() if name in (study + TUNING, study + SWEPT, study)]

    def searches(self, study: str) -> list[SearchRow]:
        """What a study's sweeps have found: the searches of thresholds are the study's, those of budgets its sweep's.
        Of a search that was taken further there is the later state alone.
        """
        of = study.removesuffix(SWEPT)
        found: dict[str, SearchRow] = {}
        for result in self.sweeps():
            if of == (result.of or result.study):
                for row in result.thresholds if of == study else result.budgets:
                    if row.study not in found or row.trials > found[row.study].trials:
                        found[row.study] = row
        return [*found.values()]

    def write_sweep(self, result: SweepResult) -> Path:
        """Store what a study's sweep has found; the file."""
        path = self.root / "sweeps" / f"{result.study}.json"
        with locked(self.root):
            self._dump(path, result.dump())
        return path

    def sweeps(self) -> list[SweepResult]:
        """What the sweeps of all studies have found."""
        paths = sorted(path for path in (self.root / "sweeps").glob("*.json") if not path.name.startswith("."))
        return [found for path in paths if (found := self._load(path, SweepResult)) is not None]

    def _dump(self, path: Path, value: dict[str, Any]) -> None:
        """Write a file that no cell's holder guards, under the store's lock: what is half written there is of the
        dead.
        """
        sweep(path.parent)
        write_sealed(path, value)

    def _load(self, path: Path, kind: type[Kind], trim: Trim | None = None) -> Kind | None:
        """What a file holds, None if it is missing. A damaged one, or one that lacks what is required, is set aside."""
        try:
            value = read_sealed(path)
            if trim is not None:
                with suppress(AttributeError, KeyError, TypeError):  # of one that lacks something, which is told below
                    value = trim(value)
            return kind.model_validate(value)
        except FileNotFoundError:
            return None
        except ValueError:
            self._set_aside(path)
            return None

    def _set_aside(self, path: Path) -> None:
        """Put what is damaged under another name, and say so. Without its traces and its model, a result is none."""
        above = (folder for folder in path.parents if folder.name == MODEL and folder.parent.parent == self.root)
        part = next(above, path)
        if not _renamed(part):
            return
        again = ""
        if part.name in (*TRACES, MODEL):
            _renamed(part.with_name("result.json"))
        if part.name in ("result.json", *TRACES, MODEL):
            again = "; its cell is not done any more: the `run` command runs it again"
        print(f"{path} is damaged and kept as {part.name}{ASIDE}{again}", file=sys.stderr)


def _renamed(path: Path) -> bool:
    """Whether a file or folder was put aside: not if another process was faster."""
    aside = path.with_name(path.name + ASIDE)
    if aside.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
    try:
        os.replace(path, aside)
    except FileNotFoundError:
        return False
    return True


def _files_alone(value: dict[str, Any]) -> dict[str, Any]:
    """A result with little else than the digests of its files."""
    return {**value, "exits": None, "slices": {}, "cycles": [], "zero_attention": None, "history": []}
