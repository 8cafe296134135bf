"""The cell store: results by the SHA-256 of what made them, written so that nothing is ever half there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from bench.errors import UserError
from bench.store.files import atomic_write

# What others rely on in a file that the store hands out. A kind of value; in [] of each entry, in {} of each key.
NUMBER = int | float
RESULT: dict[str, Any] = {
    "id": str,
    "cell": {"fingerprint": str, "seed": int},
    "metrics": dict,
    "slices": dict,
    "costs": {"forward_flops_per_token": NUMBER, "train_flops": NUMBER},
    "additions": dict,
    "history": [dict],
    "exits": dict | None,
    "cycles": [dict],
    "zero_attention": list | None,
    "timing": {"started": NUMBER, "train_seconds": NUMBER, "seconds": NUMBER},
    "environment": dict,
}
FAILURE: dict[str, Any] = {"id": str, "cell": RESULT["cell"], "reason": str, "at": NUMBER, "environment": dict}
MANIFEST: dict[str, Any] = {
    "study": str,
    "question": str,
    "reference": str | None,
    "seeds": [int],
    "variants": [{"label": str, "variant": str, "match": str | None, "chosen": str}],
    "tasks": [{"label": str, "task": str, "metric": str, "higher_is_better": bool, "levels": dict}],
    "cells": [{"variant": str, "task": str, "seed": int, "id": str}],
    "command": str,
    "git": str | None,
    "config": dict,
}


def _fits(value: Any, shape: Any) -> bool:
    """Whether a value that was read has the parts that a shape names, of the kinds that it names."""
    if isinstance(shape, dict):
        parts = isinstance(value, dict) and shape.keys() <= value.keys()
        return parts and all(_fits(value[name], part) for name, part in shape.items())
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(part, shape[0]) for part in value)
    return isinstance(value, shape)


class Records(Mapping[str, dict[str, Any]]):
    """Records of cells by id, read from the store whenever one is asked for: thousands need not fit in memory."""

    def __init__(self, store: Store, ids: Iterable[str], held: dict[str, dict[str, Any]]) -> None:
        """ids: of cells that have a record; held: records that may not be in the store, as the disk refused them."""
        self.store, self.ids, self.held = store, dict.fromkeys([*ids, *held]), held

    def __getitem__(self, id: str) -> dict[str, Any]:
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
    """Results under one folder: ``<id>/cell.json``, ``result.json`` (written last: it says that a cell is done),
    ``failure.json``, and what else a cell leaves; ``studies/<name>.json`` names the cells of a study's last run;
    ``data/<fingerprint>/`` holds what cells are trained and tested on, which is made again where it is missing.
    """

    def __init__(self, root: Path) -> None:
        """root: created when something is written. Raises UserError if it is a file."""
        self.root = Path(root)
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"--runs: {str(root)!r} is a file, not a folder")

    def folder(self, id: str) -> Path:
        """The folder of a cell."""
        return self.root / id

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

    def record(self, id: str) -> dict[str, Any] | None:
        """The cell's result, else its failure, else None. A result that cannot be read is set aside, not deleted.
        ``execution`` in a result is what has been measured of executed exits, by rule, if anything has.
        """
        for name, status, shape in (("result.json", "done", RESULT), ("failure.json", "failed", FAILURE)):
            value = self._load(self.folder(id) / name, {"status": str, **shape})
            if value is not None and value["status"] == status:
                execution = self._load(self.folder(id) / "execution.json") if status == "done" else None
                return value if execution is None else {**value, "execution": execution}
            if value is not None:
                self._set_aside(self.folder(id) / name)
        return None

    def results(self, ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The records of the given cells, those without one left out."""
        found = {id: self.record(id) for id in ids}
        return {id: record for id, record in found.items() if record is not None}

    def failures(self, ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The records of those of the given cells that have failed; of the others nothing is read."""
        return self.results(id for id in ids if not self.done(id))

    def write_cell(self, id: str, cell: dict[str, Any]) -> None:
        """Store what the cell is."""
        self._dump(self.folder(id) / "cell.json", cell)

    def tidy(self, id: str) -> None:
        """Remove from a finished cell what only serves an unfinished one: its process may have died in between."""
        with os.scandir(self.folder(id)) as entries:
            left = [entry for entry in entries if entry.name.startswith("lease.") or entry.name == "checkpoints"]
        for entry in left:
            if entry.is_dir():
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                Path(entry.path).unlink(missing_ok=True)

    def write_result(self, id: str, record: dict[str, Any]) -> None:
        """Store a result. Raises UserError if the cell has one: results are never overwritten."""
        if self.done(id):
            raise UserError(f"cell {id[:12]} has a result already; it is not overwritten")
        self._dump(self.folder(id) / "result.json", record)
        (self.folder(id) / "failure.json").unlink(missing_ok=True)

    def write_failure(self, id: str, record: dict[str, Any]) -> None:
        """Store why a cell failed."""
        self._dump(self.folder(id) / "failure.json", record)

    def write_execution(self, id: str, rule: str, rows: list[dict[str, Any]]) -> None:
        """Store what was measured of a finished cell's exits, in place of what was measured of the rule before. rule:
        its key, followed by `` by token`` where tokens leave on their own.
        """
        path = self.folder(id) / "execution.json"
        self._dump(path, {**(self._load(path) or {}), rule: rows})

    def write_usage(self, id: str, samples: list[dict[str, float]]) -> None:
        """Store what the cell took of the machine (see ``bench.run.usage``)."""
        self._dump(self.folder(id) / "usage.json", {"samples": samples})

    def usage(self, id: str) -> list[dict[str, float]]:
        """What the cell took of the machine; empty if that is not known."""
        value = self._load(self.folder(id) / "usage.json")
        samples = value.get("samples") if value else None
        return samples if isinstance(samples, list) else []

    def write_manifest(self, study: str, manifest: dict[str, Any]) -> None:
        """Store which cells a study consists of."""
        self._dump(self.root / "studies" / f"{study}.json", manifest)

    def manifest(self, study: str) -> dict[str, Any] | None:
        """The cells of a study's last run, None if it has not been run or this cannot be read."""
        return self._load(self.root / "studies" / f"{study}.json", MANIFEST)

    def _dump(self, path: Path, value: dict[str, Any]) -> None:
        atomic_write(path, json.dumps(value, indent=1, allow_nan=False).encode())

    def _load(self, path: Path, shape: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """What a file holds, None if it is missing. A damaged one, or one that lacks what the shape names, is set
        aside.
        """
        try:
            value = orjson.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            value = None
        if not _fits(value, shape or {}):
            self._set_aside(path)
            return None
        return value

    def _set_aside(self, path: Path) -> None:
        with suppress(FileNotFoundError):  # another process was faster
            os.replace(path, path.with_name(f"{path.name}.corrupt"))
