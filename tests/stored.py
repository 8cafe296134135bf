"""A small study whose results are sample records under their real ids: stores of it, without any training."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from records import MANIFEST, RESULTS

from bench.run.transfer import export_study, import_archive
from bench.run.upgrade import open_store
from bench.store.manifest import Manifest
from bench.store.records import Configuration, Record
from bench.store.store import Store
from bench.study.load import study_from
from bench.study.plan import Plan, make_plan

RAW: dict[str, Any] = {
    "name": "stored",
    "question": "Is it there?",
    "reference": "htc",
    "model": {"d_model": 16, "n_heads": 2, "n_blocks": 3, "n_cycles": 2},
    "train": {"steps": 20, "batch_size": 4, "device": "cpu"},
    "tasks": [{"name": "p_hop", "options": {"hops": 1, "length": 12, "n_train": 50, "n_valid": 10, "n_test": 20}}],
    "variants": ["htc", "ztt"],
    "seeds": 2,
}
SAMPLES = {cell.variant: RESULTS[cell.id] for cell in MANIFEST.cells if cell.task == "p_hop" and cell.seed == 1}


def plan(overrides: Sequence[str] = (), **changes: Any) -> Plan:
    """The study's cells."""
    study = study_from(json.loads(json.dumps({**RAW, **changes})), overrides, "stored")
    return make_plan(study, "cyclebench run stored", None)


def record_of(planned: Any) -> Record:
    """The result of a planned cell: that of a sample, whatever its seed."""
    sample = SAMPLES[planned.cell.variant]
    assert sample.status == "done"
    return sample.but(id=planned.cell.id, cell=Configuration.of(planned.cell))


def stored(root: Path, made: Plan) -> Store:
    """A store in which the plan's cells are done, and whatever else a finished cell leaves is there."""
    store = Store(root)
    store.write_manifest(made.manifest.study, made.manifest)
    for planned in made.cells:
        folder = store.folder(planned.cell.id)
        (folder / "model").mkdir(parents=True)
        for name in ("trace.npz", "trace_valid.npz", "model/model.safetensors", "model/config.json", "log.txt"):
            (folder / name).write_bytes(f"{name} of {planned.cell.id}".encode() * 20)
        store.write_cell(planned.cell.id, planned.cell)
        store.write_result(planned.cell.id, record_of(planned))
    return store


def content(root: Path) -> dict[str, bytes]:
    """Every file of a folder by its path, but the store's lock."""
    files = [path for path in root.rglob("*") if path.is_file() and path.name != ".upgrade.lock"]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def packed(store: Store, file: Path, study: str = "stored") -> Path:
    manifest = store.manifest(study)
    assert manifest is not None
    export_study(store, manifest, file)
    return file


def taken(file: Path, store: Store) -> tuple[Manifest, Counter[str], list[str], str]:
    """What became of the cells, what was told of them, and of the manifest."""
    manifest, found, why = import_archive(file, store)
    assert not (store.root / f".import.{os.getpid()}").exists(), "nothing is left half done"
    return manifest, Counter(one.fate for one in found), [one.note for one in found if one.note], why


@pytest.fixture(scope="module")
def made() -> Plan:
    return plan()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, made: Plan) -> Path:
    """An archive of the study's four cells."""
    folder = tmp_path_factory.mktemp("sound")
    return packed(stored(folder / "runs", made), folder / "sound.zip")


@pytest.fixture
def here(tmp_path: Path) -> Store:
    """A store in which nothing is yet."""
    return open_store(tmp_path / "here", begin=True)
