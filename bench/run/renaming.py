"""Cells of an earlier version of the store under the ids of this one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bench.config import CELL_SOURCE, RESULTS_SCHEMA, Cell, ModelConfig, TrainConfig, parse
from bench.data.prepared import prepared_shape
from bench.data.task import get_task, task_data
from bench.errors import UserError, first_line
from bench.model.variant import get_variant
from bench.plugins import import_files
from bench.run.settings import settings_of
from bench.store.manifest import TuningRow
from bench.store.versions import RECORDS, cell_folders, first_id, former_of, former_of_cell, manifests, move_cell, read
from bench.study.plan import make_plan, tuned_by
from bench.study.schema import Study
from bench.tables import counted
from bench.train.device import device_of
from bench.train.modes import Kind, resolved

SCHEMAS = (2, 1)  # of ids that told every field


@dataclass(frozen=True)
class Found:
    """What the folder of a cell says.

    told: its configuration; kind: of the device it ran on, None if that is not told; schema: of its results.
    """

    told: dict[str, Any]
    kind: Kind | None
    schema: int | None
    done: bool


class Renaming:
    """All cells of a store. ids: new ones by former ones, as far as they are known."""

    def __init__(self, root: Path, tell: Callable[[str], None]) -> None:
        """root: of the store; tell: called with a line for whatever the user should know."""
        self.root, self.tell = root, tell
        self.ids = dict(former_of(root).ids)
        self.found: dict[str, Found] = {}
        self.unknown: set[str] = set()  # without a record, which would tell the configuration
        for folder in cell_folders(root):
            self.ids |= dict.fromkeys(former_of_cell(folder).ids, folder.name)
            found = described(folder)
            if found is None:
                self.unknown.add(folder.name)
            elif found.schema is None or found.schema < RESULTS_SCHEMA:
                self.found[folder.name] = found

    def move_all(self) -> None:
        """Give every cell its new id: first those that others start from, finished ones before others."""
        if self.found:
            self.tell(
                f"{self.root}: brought up to date: {counted(len(self.found), 'cell')} of an earlier version; "
                "nothing is trained again"
            )
        for id in sorted(self.found, key=lambda id: (bool(_source(self.found[id])), not self.found[id].done, id)):
            try:
                self._move(id, self.found[id])
            except (UserError, ValidationError, KeyError, TypeError) as error:
                self.tell(f"{self.root}: cell {id[:12]} is left as it is: {first_line(error)}")
        if self.unknown:
            for id, cell in self._planned():
                self._to(id, cell, {}, False)

    def _move(self, id: str, found: Found) -> None:
        schemas = SCHEMAS if found.schema is None else (found.schema,)
        if id not in {first_id(found.told, schema) for schema in schemas}:
            if found.schema is None and Cell.model_validate(found.told).id == id:
                return
            raise UserError(f"its configuration has another id, {first_id(found.told, schemas[0])[:12]}")
        cell = self._cell(found)
        told, folder = cell.model_dump(mode="json"), self.root / id
        common = {"schema": RESULTS_SCHEMA, "id": cell.id, "cell": told, "settings": settings_of(cell)}
        changed: dict[str, dict[str, Any]] = {}
        other_mode = False
        for name in RECORDS:
            if (record := read(folder / name)) is not None and "cell" in record:
                changed[name] = {**record, **common, "former": [*record.get("former", []), id]}
                other_mode |= name == "result.json" and record.get("stacked", False) is not cell.train.stacked
        if (folder / "cell.json").exists():
            changed["cell.json"] = told
        self._to(id, cell, changed, other_mode)

    def _to(self, id: str, cell: Cell, changed: Mapping[str, dict[str, Any]], other_mode: bool) -> None:
        self.ids[id] = cell.id
        if id != cell.id and not move_cell(self.root, id, cell.id, changed, other_mode):
            self.tell(f"{self.root}: cell {id[:12]} is now the same as another; its files stay where they are")

    def _cell(self, found: Found) -> Cell:
        """The cell as this version plans it. Raises UserError if its variant or its task is not known here."""
        told = found.told
        variant, task = get_variant(told["variant"], told["options"]), get_task(told["task"], told["task_options"])
        model, train = parse(ModelConfig, told["model"], "model"), parse(TrainConfig, told["train"], "train")
        init = told.get("init")
        if source := _source(found):
            init = {**told["init"], "source": CELL_SOURCE + self.ids.get(source, source)}
        shape = prepared_shape(self.root / "data" / told["fingerprint"])
        if shape is None:
            data = task_data(told["task"], told["task_options"])
            shape = data.vocab_size, data.length
        outside = init is not None and not source
        return Cell(
            variant=told["variant"],
            options=variant.options.model_dump(mode="json", exclude_defaults=True),
            model=model,
            train=resolved(train, found.kind or _kind_here(train), variant, model, *shape, outside),
            task=told["task"],
            task_options=task.options.model_dump(mode="json", exclude_defaults=True),
            seed=told["seed"],
            evaluation=told["evaluation"],
            init=init,
            fingerprint=told["fingerprint"],
        )

    def _planned(self) -> Iterator[tuple[str, Cell]]:
        """Cells that have left no record, as the studies of the store plan them: by their former ids."""
        before = {new: old for old, new in self.ids.items()}
        for path in manifests(self.root):
            manifest = read(path) or {}
            rows = manifest.get("cells", [])
            if not self.unknown & {row.get("id") for row in rows if isinstance(row, dict)}:
                continue
            try:
                study = Study.model_validate(manifest["config"])
                import_files(study.imports, f"{path.name}: imports")
                rows = [TuningRow.model_validate(row) for row in manifest.get("tuning", [])]
                plan = make_plan(study, "", None, tuned_by(study, rows))
            except (UserError, ValidationError, KeyError, TypeError) as error:
                self.tell(f"{path}: what is unfinished of it is begun anew: {first_line(error)}")
                continue
            for planned in plan.cells:
                for id in self.unknown & former_ids(planned.cell, before):
                    before[planned.cell.id] = id
                    yield id, planned.cell


def described(folder: Path) -> Found | None:
    """What the folder of a cell says of it, None if nothing does."""
    for name in RECORDS:
        record = read(folder / name)
        if record is not None and isinstance(record.get("cell"), dict):
            with suppress(KeyError, TypeError):
                kind: Kind = "cpu" if record["environment"]["device"] == "cpu" else "cuda"
                return Found(record["cell"], kind, int(record["schema"]), name == "result.json")
    told = read(folder / "cell.json")
    return None if told is None else Found(told, None, None, False)


def former_ids(cell: Cell, before: Mapping[str, str]) -> set[str]:
    """The ids that version 2 may have given to a cell, which did not resolve its device and its precision.

    Args:
        cell: as it is now.
        before: former ids by those of now.
    """
    known = json.loads((files("bench.store") / "version2.json").read_text())
    told = {**cell.model_dump(mode="json"), **settings_of(cell)}
    named = {"options": cell.variant, "task_options": cell.task}
    for key in ("model", "train", "evaluation", *named):
        fields = known[key].get(named[key]) if key in named else known[key]
        told[key] = {field: value for field, value in told[key].items() if fields is None or field in fields}
    if told["init"] is not None and told["init"]["source"].startswith(CELL_SOURCE):
        id = told["init"]["source"].removeprefix(CELL_SOURCE)
        told["init"]["source"] = CELL_SOURCE + before.get(id, id)
    unresolved = [
        {"device": device, "precision": precision}
        for device in ("auto", cell.train.device)
        for precision in ("auto", cell.train.precision)
    ]
    return {first_id({**told, "train": {**told["train"], **changes}}, 2) for changes in unresolved}


def _source(found: Found) -> str:
    """The id of the cell that a cell starts from, '' if it starts from none."""
    source = str((found.told.get("init") or {}).get("source", ""))
    return source.removeprefix(CELL_SOURCE) if source.startswith(CELL_SOURCE) else ""


def _kind_here(train: TrainConfig) -> Kind:
    return "cuda" if device_of(train).type == "cuda" else "cpu"
