"""The cell store: results by the SHA-256 of what made them, written so that nothing is ever half there."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from bench.errors import UserError


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, whenever the process or the machine dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


class Store:
    """Results under one folder: ``<id>/cell.json``, ``result.json`` (written last: it says that a cell is done),
    ``failure.json``, and what else a cell leaves; ``studies/<name>.json`` names the cells of a study's last run.
    """

    def __init__(self, root: Path) -> None:
        """root: created when something is written. Raises UserError if it is a file."""
        self.root = Path(root)
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"--runs: {str(root)!r} is a file, not a folder")

    def folder(self, id: str) -> Path:
        """The folder of a cell."""
        return self.root / id

    def done(self, id: str) -> bool:
        """Whether the cell has a result."""
        return self._load(self.folder(id) / "result.json") is not None

    def record(self, id: str) -> dict[str, Any] | None:
        """The cell's result, else its failure, else None. A result that cannot be read is set aside, not deleted.
        ``execution`` in it, where there is any, is what has been measured of executed exits, by rule.
        """
        result = self._load(self.folder(id) / "result.json")
        if result is not None:
            execution = self._load(self.folder(id) / "execution.json")
            return result if execution is None else {**result, "execution": execution}
        return self._load(self.folder(id) / "failure.json")

    def results(self, ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The records of the given cells, those without one left out."""
        found = {id: self.record(id) for id in ids}
        return {id: record for id, record in found.items() if record is not None}

    def write_cell(self, id: str, cell: dict[str, Any]) -> None:
        """Store what the cell is."""
        self._dump(self.folder(id) / "cell.json", cell)

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
        """Store what was measured of a finished cell's exits, in place of what was measured of the rule before."""
        path = self.folder(id) / "execution.json"
        self._dump(path, {**(self._load(path) or {}), rule: rows})

    def write_manifest(self, study: str, manifest: dict[str, Any]) -> None:
        """Store which cells a study consists of."""
        self._dump(self.root / "studies" / f"{study}.json", manifest)

    def manifest(self, study: str) -> dict[str, Any] | None:
        """The cells of a study's last run, None if it has not been run."""
        return self._load(self.root / "studies" / f"{study}.json")

    def _dump(self, path: Path, value: dict[str, Any]) -> None:
        atomic_write(path, json.dumps(value, indent=1, allow_nan=False).encode())

    def _load(self, path: Path) -> dict[str, Any] | None:
        try:
            value = from_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            value = None
        if not isinstance(value, dict):
            os.replace(path, path.with_name(f"{path.name}.corrupt"))
            return None
        return value
