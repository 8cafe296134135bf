"""The cell store: results by the SHA-256 of what made them, written so that nothing is ever half there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel

from bench.config import Cell
from bench.errors import UserError
from bench.store.files import atomic_write
from bench.store.manifest import SWEPT, TUNING, Manifest, SearchRow, SweepResult
from bench.store.records import ExecutionRow, Executions, Failure, HarnessFile, HarnessScores, Outcome, Record
from bench.store.versions import Former, former_of, holds_something, stored_version, write_version

Kind = TypeVar("Kind", bound=BaseModel)

Trim = Callable[[dict[str, Any]], dict[str, Any]]
"""Makes less of what a result's file holds, before it becomes a record."""


class _Samples(BaseModel):
    samples: list[dict[str, float]] = []


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
                first, size = file.read(1), file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 1))
                whole = size > 1 and first + file.read(1) == b"{}"
        except FileNotFoundError:
            return False
        if not whole:
            self._set_aside(path)
        return whole

    def record(self, id: str, trim: Trim | None = None) -> Outcome | None:
        """The cell's result, else its failure, else None. A file that cannot be read is set aside, not deleted.

        Args:
            id: of the cell.
            trim: what of the result is wanted, None for all of it; what it takes away is not checked.
        """
        record = self._load(self.folder(id) / "result.json", Record, trim)
        if record is None:
            return self._load(self.folder(id) / "failure.json", Failure)
        path = self.folder(id) / "execution.json"
        if path.exists() and (execution := self._load(path, Executions)) is not None:
            record.execution = execution.root
        if scores := self.harness(id):
            record.harness = scores
        return record

    def results(self, ids: Iterable[str]) -> dict[str, Outcome]:
        """The records of the given cells, those without one left out."""
        found = {id: self.record(id) for id in ids}
        return {id: record for id, record in found.items() if record is not None}

    def failures(self, ids: Iterable[str]) -> dict[str, Failure]:
        """The records of those of the given cells that have failed; of the others nothing is read."""
        found = self.results(id for id in ids if not self.done(id))
        return {id: record for id, record in found.items() if record.status == "failed"}

    def write_cell(self, id: str, cell: Cell) -> None:
        """Store what the cell is."""
        self._dump(self.folder(id) / "cell.json", cell.model_dump(mode="json"))

    def tidy(self, id: str) -> None:
        """Remove from a finished cell what only serves an unfinished one: its process may have died in between."""
        with os.scandir(self.folder(id)) as entries:
            left = [entry for entry in entries if entry.name.startswith("lease.") or entry.name == "checkpoints"]
        for entry in left:
            if entry.is_dir():
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                Path(entry.path).unlink(missing_ok=True)

    def write_result(self, id: str, record: Record) -> None:
        """Store a result. Raises UserError if the cell has one: results are never overwritten."""
        if self.done(id):
            raise UserError(f"cell {id[:12]} has a result already; it is not overwritten")
        self._dump(self.folder(id) / "result.json", record.dump())
        (self.folder(id) / "failure.json").unlink(missing_ok=True)

    def write_failure(self, id: str, record: Failure) -> None:
        """Store why a cell failed."""
        self._dump(self.folder(id) / "failure.json", record.dump())

    def write_execution(self, id: str, rule: str, rows: list[ExecutionRow]) -> None:
        """Store what was measured of a finished cell's exits, in place of what was measured of the rule before.

        Args:
            id: of the cell.
            rule: its key, followed by `` by token`` where tokens leave on their own.
            rows: one for each threshold.
        """
        path = self.folder(id) / "execution.json"
        before = self._load(path, Executions)
        self._dump(path, Executions({**(before.root if before else {}), rule: rows}).dump())

    def harness(self, id: str) -> dict[str, HarnessScores]:
        """What the cell's model scores on tasks of lm-evaluation-harness, by key."""
        found = self._load(self.folder(id) / "harness.json", HarnessFile)
        return found.root if found is not None else {}

    def write_harness(self, id: str, scores: dict[str, HarnessScores]) -> None:
        """Store scores of a finished cell beside those of other keys."""
        self._dump(self.folder(id) / "harness.json", HarnessFile({**self.harness(id), **scores}).dump())

    def write_usage(self, id: str, samples: list[dict[str, float]]) -> None:
        """Store what the cell took of the machine (see ``bench.run.usage``)."""
        self._dump(self.folder(id) / "usage.json", {"samples": samples})

    def usage(self, id: str) -> list[dict[str, float]]:
        """What the cell took of the machine; empty if that is not known."""
        found = self._load(self.folder(id) / "usage.json", _Samples)
        return found.samples if found else []

    def write_manifest(self, study: str, manifest: Manifest) -> None:
        """Store which cells a study consists of; with the first study of a store, which version it has."""
        if stored_version(self.root) is None and not holds_something(self.root):
            write_version(self.root)
        self._dump(self.root / "studies" / f"{study}.json", manifest.dump())

    def manifest(self, study: str) -> Manifest | None:
        """The cells of a study's last run, None if it has not been run or this cannot be read."""
        return self._load(self.root / "studies" / f"{study}.json", Manifest)

    def studies(self) -> list[str]:
        """The names of all studies that were run, of their tunings and of their sweeps."""
        return sorted(path.stem for path in (self.root / "studies").glob("*.json") if not path.name.startswith("."))

    def parts(self, study: str) -> list[str]:
        """Those of a study: its tuning, its sweep, itself."""
        return [name for name in self.studies() if name in (study + TUNING, study + SWEPT, study)]

    def searches(self, study: str) -> list[SearchRow]:
        """What a study's sweep has found: the searches of thresholds are the study's, those of budgets its sweep's."""
        of = study.removesuffix(SWEPT)
        found = self._load(self.root / "sweeps" / f"{of}.json", SweepResult)
        if found is None:
            return []
        return [*found.thresholds] if of == study else [*found.budgets]

    def write_sweep(self, result: SweepResult) -> Path:
        """Store what a study's sweep has found; the file."""
        path = self.root / "sweeps" / f"{result.study}.json"
        self._dump(path, result.dump())
        return path

    def _dump(self, path: Path, value: dict[str, Any]) -> None:
        atomic_write(path, json.dumps(value, indent=1, allow_nan=False).encode())

    def _load(self, path: Path, kind: type[Kind], trim: Trim | None = None) -> Kind | None:
        """What a file holds, None if it is missing. A damaged one, or one that lacks what is required, is set aside."""
        try:
            value = orjson.loads(path.read_bytes())  # twice as fast as pydantic's own reader
            if trim is not None:
                with suppress(AttributeError, KeyError, TypeError):  # of a damaged one, which is told below
                    value = trim(value)
            return kind.model_validate(value)
        except FileNotFoundError:
            return None
        except ValueError:
            self._set_aside(path)
            return None

    def _set_aside(self, path: Path) -> None:
        with suppress(FileNotFoundError):  # another process was faster
            os.replace(path, path.with_name(f"{path.name}.corrupt"))
