"""A flipped bit, wherever it is, is found, told in one line and never reported.

``CYCLEBENCH_FLIPS`` sets how many bits of a file are flipped, one at a time (20 by default); ``make torture``: 200.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_runner import RAW, numbers, plan

from bench.api import load_results
from bench.errors import UserError
from bench.exits.stream import Checkpoint
from bench.run.runner import Running, run_study
from bench.run.status import status
from bench.run.upgrade import open_store
from bench.run.verify import check_stored
from bench.store.digests import read_sealed, write_sealed
from bench.store.records import Record
from bench.store.store import Store
from bench.store.versions import ABOUT, FORMER, former_of, move_cell, write_former
from bench.study.plan import Plan
from bench.sweep.thresholds import traces
from reports.read import read

FLIPS = int(os.environ.get("CYCLEBENCH_FLIPS", "20"))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    root = tmp_path_factory.mktemp("ran")
    made = plan(variants=["htc"], reference=None)
    run_study(made, open_store(root / "runs", begin=True), Running(1), lambda *_: None)
    (root / "tiny.yaml").write_text(json.dumps({**RAW, "variants": ["htc"], "reference": None}))
    return made, root


@pytest.fixture
def there(ran: tuple[Plan, Path], tmp_path: Path) -> tuple[Plan, Store]:
    shutil.copytree(ran[1], tmp_path, dirs_exist_ok=True)
    return ran[0], Store(tmp_path / "runs")


def flipped(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def bits(path: Path, wanted: int = FLIPS) -> list[int]:
    """Which to flip: the first and the last of the file, and as many as wanted of all."""
    size = 8 * path.stat().st_size
    return [0, size - 1, *random.Random(path.name).sample(range(size), min(size, wanted))]


@contextmanager
def restored(folder: Path) -> Iterator[None]:
    """What is in a folder is put back afterwards."""
    kept = folder.parent / f"{folder.name} kept"
    shutil.copytree(folder, kept)
    yield
    shutil.rmtree(folder)
    os.rename(kept, folder)


Finder = Callable[[Store, Plan], bool]
"""Whether a command finds that the first cell is damaged, and the second is not."""


def by_status(store: Store, made: Plan) -> bool:
    found = status(store, made.manifest)
    return (found.done, found.waiting) == (1, 1)


def by_report(store: Store, made: Plan) -> bool:
    first, second = made.manifest.cells
    return set(read(store, made.manifest)) == {second.id} != {first.id}


def by_verify(store: Store, made: Plan) -> bool:
    problems = [finding.problem for finding in check_stored(store, made.manifest.cells)]
    return "it is damaged" in problems[0] and problems[1] == ""


def by_the_sweep(store: Store, made: Plan) -> bool:
    with pytest.raises(UserError, match=r"\.npz was damaged"):
        [traces(store, (made.manifest.cells[0].id,), split) for split in ("valid", "test")]  # type: ignore[arg-type]
    return True


def by_whoever_loads(store: Store, made: Plan) -> bool:
    id = made.manifest.cells[0].id
    with pytest.raises(UserError, match="damaged"):
        Checkpoint(str(store.folder(id)))
    with pytest.raises(UserError, match="damaged"):
        store.model(id)
    return True


@pytest.mark.parametrize(
    ("name", "finders"),
    [
        ("result.json", (by_status, by_report, by_verify)),
        ("trace.npz", (by_status, by_report, by_verify, by_the_sweep)),
        ("trace_valid.npz", (by_status, by_report, by_verify, by_the_sweep)),
        ("model/model.safetensors", (by_verify, by_status, by_report, by_whoever_loads)),
        ("model/config.json", (by_verify, by_status, by_report, by_whoever_loads)),
        ("model/tokenizer.json", (by_verify, by_status, by_report, by_whoever_loads)),
    ],
)
def test_every_bit_counts(
    there: tuple[Plan, Store], name: str, finders: tuple[Finder, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    made, store = there
    folder = store.folder(made.manifest.cells[0].id)
    for number, bit in enumerate(bits(folder / name)):
        for finder in finders if number < 4 else finders[number % len(finders) :][:1]:
            with restored(folder):
                flipped(folder / name, bit)
                assert finder(store, made), (finder, bit)
                told = capsys.readouterr().err.splitlines()
                assert len(told) == 1 and f"{folder.name}/{name} is damaged" in told[0], told
                part = folder / name.split("/")[0]
                assert not store.done(folder.name) and part.with_name(f"{part.name}.corrupt").exists()
                assert finder is not by_verify or finder(store, made), "what was set aside is not forgotten"
                assert capsys.readouterr().err == ""
    assert all(store.sound(cell.id, weights=True) for cell in made.manifest.cells)


@pytest.mark.parametrize("name", ["result.json", "trace.npz", "model/model.safetensors"])
def test_what_was_damaged_is_run_again_to_the_bit(there: tuple[Plan, Store], name: str) -> None:
    made, store = there
    first, second = (planned.cell.id for planned in made.cells)
    before, kept = store.record(first), (store.folder(second) / "result.json").stat().st_mtime_ns
    flipped(store.folder(first) / name, 999)
    assert not store.sound(first, weights=True)
    run_study(made, store, Running(1), lambda *_: None)
    after = store.record(first)
    assert isinstance(before, Record) and isinstance(after, Record) and store.sound(first, weights=True)
    assert numbers(after) == numbers(before) and after.files == before.files
    assert (store.folder(second) / "result.json").stat().st_mtime_ns == kept


def test_what_was_measured_beside_a_result_counts_no_more_when_it_is_damaged(
    there: tuple[Plan, Store], capsys: pytest.CaptureFixture[str]
) -> None:
    made, store = there
    id = made.manifest.cells[0].id
    store.write_execution(id, "kl", [])
    for name in ("execution.json", "usage.json", "cell.json"):
        path = store.folder(id) / name
        for bit in bits(path, 8):
            with restored(path.parent):
                flipped(path, bit)
                record = store.record(id)
                assert record is not None and record.status == "done"
                assert record.execution == ({} if name == "execution.json" else {"kl": []})
                assert bool(store.usage(id)) == (name != "usage.json")
    capsys.readouterr()


def test_a_damaged_manifest_is_no_study(there: tuple[Plan, Store], capsys: pytest.CaptureFixture[str]) -> None:
    made, store = there
    path = store.root / "studies" / "tiny.json"
    data = path.read_bytes()
    for bit in bits(path):
        path.write_bytes(data)
        flipped(path, bit)
        assert store.manifest("tiny") is None
        assert len(capsys.readouterr().err.splitlines()) == 1
    path.write_bytes(data)
    flipped(path, 4000)
    with pytest.raises(UserError, match="has not been run"):
        load_results(str(store.root.parent / "tiny.yaml"), store.root)
    run_study(made, store, Running(1), lambda *_: pytest.fail("a cell was run"))
    assert store.manifest("tiny") == made.manifest


def test_a_damaged_version_is_found_out_again(there: tuple[Plan, Store]) -> None:
    made, store = there
    path = store.root / ABOUT
    data = path.read_bytes()
    for bit in range(0, 8 * len(data), 40):
        path.write_bytes(data)
        flipped(path, bit)
        assert open_store(store.root).manifest("tiny") is not None and path.read_bytes() == data
    assert all(store.sound(cell.id, weights=True) for cell in made.manifest.cells)


def test_damaged_former_ids_are_asked_of_the_cells(there: tuple[Plan, Store]) -> None:
    made, store = there
    id = made.manifest.cells[0].id
    assert move_cell(store.root, id, "e" * 64, {}, False)
    write_former(store.root, {})
    for bit in bits(store.root / FORMER):
        with restored(store.root):
            flipped(store.root / FORMER, bit)
            assert former_of(store.root).ids == {id: "e" * 64} and Store(store.root).done(id)


def test_a_sealed_file_is_json_as_any_other(tmp_path: Path) -> None:
    for value in ({}, {"a": [1.5, None, "é"], "b": {"c": 1}}):
        write_sealed(tmp_path / "x.json", value)
        told = json.loads((tmp_path / "x.json").read_text())
        assert len(told.pop("digest")) == 64 and told == value == read_sealed(tmp_path / "x.json")
