"""A store of an earlier version is brought up to date where it is: nothing lost, nothing trained again.

``CYCLEBENCH_UPGRADE_KILLS`` sets how often it is killed (8 by default); ``make torture`` kills 50 times.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.config import Cell
from bench.errors import UserError
from bench.exits.stream import Checkpoint
from bench.run import renaming
from bench.run.going import run_cell
from bench.run.lease import Lease
from bench.run.runner import Running, run_study
from bench.run.status import status
from bench.run.upgrade import open_store
from bench.run.verify import check_stored
from bench.store.digests import CARD, read_sealed, write_sealed
from bench.store.files import LOCK
from bench.store.records import Record
from bench.store.store import Store
from bench.store.tracking import ATTEMPT, CELL_TAG, MlflowTracker
from bench.store.versions import ABOUT, ROOM, VERSION, first_id, located
from bench.study.load import load_study
from bench.study.plan import Plan, make_plan
from bench.train.checkpoints import Every

STORES = Path(__file__).parent / "stores"
KILLS = int(os.environ.get("CYCLEBENCH_UPGRADE_KILLS", "8"))
NEW = {"schema", "id", "cell", "settings", "former", "files", "digest"}  # keys of a result that an upgrade changes
TOUCHES = ("open", "os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")


def unpacked(name: str, folder: Path) -> Path:
    with tarfile.open(STORES / name) as file:
        file.extractall(folder, filter="data")
    return folder / "runs"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return unpacked("store-0713034.tgz", tmp_path)


def planned(root: Path, name: str = "old") -> Plan:
    return make_plan(load_study(str(root.parent / f"{name}.yaml")), "", None)


def results(root: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """What the results say of their numbers, by variant and seed."""
    found = [json.loads(path.read_text()) for path in root.glob("*/result.json")]
    told = {(record["cell"]["variant"], record["cell"]["seed"]): record for record in found}
    assert len(told) == len(found), "a cell is there twice"
    return {key: {name: part for name, part in record.items() if name not in NEW} for key, record in told.items()}


def content(root: Path) -> dict[str, str]:
    """A digest of every file but the lock, by path."""
    files = [path for path in root.rglob("*") if path.is_file() and path.name != LOCK]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def assert_nothing_to_run(store: Store, plan: Plan) -> None:
    records = run_study(plan, store, Running(1), lambda *_: pytest.fail("a cell was run"))
    assert len(records) == len(plan.cells)


def test_a_store_of_0713034_keeps_its_results_and_needs_no_run(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, former = results(old), {path.name for path in old.glob("*") if len(path.name) == 64}
    others = sorted(path.read_bytes() for path in old.glob("*/*.npz"))
    store, made = open_store(old), planned(old)
    assert "brought up to date: 4 cells of an earlier version; nothing is trained again" in capsys.readouterr().err
    assert results(old) == before and len(before) == 4
    assert sorted(path.read_bytes() for path in old.glob("*/*.npz")) == others
    ids = {cell.cell.id for cell in made.cells}
    manifest = store.manifest("old")
    assert manifest is not None and {cell.id for cell in manifest.cells} == ids
    assert not ids & former and not any((old / id).exists() for id in former)
    assert read_sealed(old / ABOUT) == {"version": VERSION} and not (old / ROOM).exists()
    assert_nothing_to_run(store, made)
    for id in former:
        record = store.record(id)
        assert store.done(id) and record is not None and record.id in ids and record.former == [id]
        assert record.cell.cell().id == record.id and record.settings["task_options"]["alphabet"] == 4
        assert record.cell.train["device"] == "cpu" and record.cell.train["precision"] == "float32"
        assert Checkpoint(str(old / id)).lm.config.vocab_size and located(old / id / "model" / "config.json").is_file()


def test_results_of_another_mode_are_kept_and_told(old: Path) -> None:
    store = open_store(old)
    manifest = store.manifest("old")
    assert manifest is not None
    found = check_stored(store, manifest.cells)
    assert [finding.problem for finding in found] == [""] * 4
    assert all("was computed alone, its configuration says stacked = True" in finding.note for finding in found)
    assert status(store, manifest).other_mode == 4


def forked(work: Callable[[], None]) -> int:
    """The exit status of a child that does something and ends; everything is imported already."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(root: Path, moment: int, told: Path | None = None) -> int:
    """Open a store in a process that dies just before so many touches of the store's files; its exit status."""

    def work() -> None:
        seen = 0

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in TOUCHES and (event != "open" or arguments[1] not in (None, "r", "rb")):
                seen += 1
                if seen == moment:
                    os._exit(9)

        sys.addaudithook(count)
        open_store(root)
        moments = seen
        if told is not None:
            told.write_text(str(moments))

    return forked(work)


@pytest.mark.parametrize("name", ["store-0713034.tgz", "store-3.tgz"])
def test_killed_at_any_moment_it_ends_the_same(tmp_path: Path, name: str) -> None:
    old, whole = unpacked(name, tmp_path), tmp_path / "whole"
    shutil.copytree(old, whole)
    assert killed_at(whole, -1, tmp_path / "moments") == 0
    expected, moments = content(whole), int((tmp_path / "moments").read_text())
    assert moments > 40
    draw = random.Random(int.from_bytes(os.urandom(4), "big"))
    for number in range(-(-KILLS // 2)):
        root, ends = tmp_path / f"killed {number}", [draw.randrange(1, moments) for _ in range(1 + number % 3)]
        shutil.copytree(old, root)
        for moment in ends:  # some are killed again while they go on
            assert killed_at(root, moment) in (0, 9)
        open_store(root)
        assert content(root) == expected, ends
        shutil.rmtree(root)


def test_several_processes_at_once(old: Path) -> None:
    before, context = results(old), multiprocessing.get_context("fork")
    processes = [context.Process(target=open_store, args=(old,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 3
    assert results(old) == before
    assert_nothing_to_run(Store(old), planned(old))


def test_a_second_opening_changes_nothing_and_needs_no_torch(old: Path) -> None:
    open_store(old)
    before = {path: path.stat().st_mtime_ns for path in old.rglob("*")}
    code = f"import sys, bench.run.upgrade as it; it.open_store({str(old)!r}); print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "False\n" and told.stderr == ""
    assert {path: path.stat().st_mtime_ns for path in old.rglob("*")} == before


def test_an_empty_folder_is_begun_only_to_be_written_to(tmp_path: Path) -> None:
    open_store(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    open_store(tmp_path / "new", begin=True)
    assert read_sealed(tmp_path / "new" / ABOUT) == {"version": VERSION}


def test_a_store_says_its_version_before_it_holds_anything(tmp_path: Path) -> None:
    manifest = open_store(unpacked("store-3.tgz", tmp_path)).manifest("three")
    assert manifest is not None
    Store(tmp_path / "new").write_manifest("three", manifest)
    assert read_sealed(tmp_path / "new" / ABOUT) == {"version": VERSION}


def test_a_store_of_a_later_version_is_refused(tmp_path: Path) -> None:
    write_sealed(tmp_path / ABOUT, {"version": 99})
    with pytest.raises(UserError, match=r"^--runs: '.*' is a store of version 99 \(allowed: up to 4\)$"):
        open_store(tmp_path)


def test_a_store_that_an_earlier_version_works_on_is_left_alone(old: Path) -> None:
    folder = next(old.glob("*/result.json")).parent
    before = content(old)
    lease = Lease.take(folder, 1)
    assert lease is not None
    with pytest.raises(UserError, match=rf"process {os.getpid()} on .*, of an earlier version, is running a cell"):
        open_store(old)
    lease.path.unlink()
    assert content(old) == before


def test_a_store_of_version_3_is_left_alone_while_that_works_on_it(tmp_path: Path) -> None:
    root = unpacked("store-3.tgz", tmp_path)
    lease = Lease.take(root / ("a" * 64), 1)
    assert lease is not None
    with pytest.raises(UserError, match="of an earlier version, is running a cell"):
        open_store(root)
    with lease:
        pass
    assert_nothing_to_run(open_store(root), planned(root, "three"))


def changed(root: Path, variant: str, change: Callable[[Any], object], keep: bool = False) -> tuple[str, str]:
    """Make another old cell of one: its id before and after."""
    path = next(p for p in root.glob("*/result.json") if json.loads(p.read_text())["cell"]["variant"] == variant)
    record = json.loads(path.read_text())
    change(record["cell"])
    record["id"] = first_id(record["cell"], 2)
    target = root / record["id"]
    shutil.copytree(path.parent, target)
    (target / "result.json").write_text(json.dumps(record))
    (target / "cell.json").write_text(json.dumps(record["cell"]))
    if not keep:
        shutil.rmtree(path.parent)
    return path.parent.name, record["id"]


def test_what_a_cell_starts_from_is_found_by_its_new_id(old: Path) -> None:
    source = next(p.parent.name for p in old.glob("*/result.json"))
    init = {"source": f"cell:{source}", "sharing": None, "digest": ""}
    _, id = changed(old, "ztt", lambda cell: cell.update(init=init), keep=True)
    store = open_store(old)
    record = store.record(id)
    assert record is not None and record.cell.init is not None
    assert record.cell.init["source"] == f"cell:{store.current(source)}" != f"cell:{source}"
    assert record.cell.cell().id == record.id == store.current(id)


def test_a_variant_that_is_not_installed_is_left_as_it_is(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, id = changed(old, "ztt", lambda cell: cell.update(variant="gone"))
    before = results(old)
    store = open_store(old)
    said = [line for line in capsys.readouterr().err.splitlines() if id[:12] in line]
    assert len(said) == 1 and "is left as it is: unknown variant 'gone'" in said[0]
    assert results(old) == before and (old / id).is_dir() and store.sound(id, weights=True)


def test_a_result_whose_configuration_was_changed_is_left_as_it_is(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = next(old.glob("*/result.json"))
    path.write_text(path.read_text().replace('"lr": 0.003', '"lr": 0.004', 1))
    open_store(old)
    assert path.exists() and "its configuration has another id" in capsys.readouterr().err


def test_two_cells_that_become_one_are_both_kept(old: Path) -> None:
    first, second = changed(old, "htc", lambda cell: cell["train"].update(device="cpu"), keep=True)
    store = open_store(old)
    assert store.current(first) == store.current(second) and store.done(first)
    assert ((old / first / "result.json").exists()) != ((old / second / "result.json").exists())
    open_store(old)


def test_an_unfinished_cell_goes_on_from_its_checkpoint(
    old: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = planned(old).cells[0].cell
    (former,) = renaming.former_ids(made, {}) & {path.name for path in old.glob("*")}
    shutil.rmtree(old / former)

    def stop(entry: dict[str, float]) -> None:
        if entry["step"] == 15:
            raise InterruptedError

    with monkeypatch.context() as earlier:
        earlier.setattr(Cell, "id", property(lambda _: former))
        with pytest.raises(InterruptedError):
            run_cell(made, Store(old), every=Every(None, 5), watch=stop, stacked=False)
    assert list((old / former / "checkpoints").glob("*.safetensors"))
    store = open_store(old)
    assert not (old / former).exists() and store.current(former) == made.id
    with caplog.at_level("INFO", logger=f"cyclebench.cell.{made.id}"):
        record = run_cell(made, store)
    assert "goes on from its checkpoint of step 10" in caplog.text
    assert record.id == made.id and record.former == [former] and record.stacked is False and record.other_mode


def test_what_mlflow_holds_by_a_former_id_is_not_logged_again(old: Path) -> None:
    former = [path.parent.name for path in old.glob("*/result.json")]
    store = open_store(old)
    tracker = MlflowTracker("none", store)
    runs = [
        SimpleNamespace(info=SimpleNamespace(status="FINISHED"), data=SimpleNamespace(tags={CELL_TAG: id, ATTEMPT: ""}))
        for id in former
    ]

    class Page(list[Any]):
        token = None

    tracker.experiment, tracker.parent = "0", "parent"
    tracker.client = SimpleNamespace(search_runs=lambda *_, **__: Page(runs))
    assert set(tracker._logged()) == {(cell.cell.id, "") for cell in planned(old).cells}


@pytest.mark.parametrize(("version", "name"), [(3, "three"), (4, "four")])
def test_a_store_is_read_by_every_later_version(
    tmp_path: Path, version: int, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each version adds the store it writes."""
    root = unpacked(f"store-{version}.tgz", tmp_path)
    before, ids = results(root), {path.parent.name for path in root.glob("*/result.json")}
    store, made = open_store(root), planned(root, name)
    assert len(before) == 2 and results(root) == before
    assert {cell.cell.id for cell in made.cells} == ids and all(store.sound(id, weights=True) for id in ids)
    assert [finding.problem for finding in check_stored(store, made.manifest.cells)] == ["", ""]
    assert_nothing_to_run(store, made)
    assert "damaged" not in capsys.readouterr().err


def test_what_a_result_of_version_3_lies_beside_gets_its_digest(tmp_path: Path) -> None:
    root = unpacked("store-3.tgz", tmp_path)
    damaged, other = sorted(root.glob("*/result.json"))
    damaged.write_bytes(damaged.read_bytes()[:-7])
    store = open_store(root)
    assert not store.sound(damaged.parent.name) and damaged.with_name("result.json.corrupt").exists()
    record = store.record(other.parent.name)
    assert isinstance(record, Record) and store.sound(record.id, weights=True)
    model = {f"model/{path.name}" for path in (other.parent / "model").iterdir() if path.name not in CARD}
    assert record.files.keys() == {"trace.npz", "trace_valid.npz", *model}
    assert record.files["trace.npz"] == hashlib.sha256((other.parent / "trace.npz").read_bytes()).hexdigest()
    for path in root.rglob("*.json"):
        assert "model" in path.parts or "tokenizer" in path.parts or read_sealed(path)
