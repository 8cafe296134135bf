"""Clean: what nothing needs is shown, and goes when that is asked for; what something may need stays."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from stored import content, plan, stored

from bench.cli import app
from bench.config import CELL_SOURCE, Init
from bench.errors import UserError
from bench.run.clean import OLD, Waste, clean, waste
from bench.run.lease import Lease
from bench.store.files import is_partial
from bench.store.manifest import TrialRow, TuningRow
from bench.store.store import Store
from bench.study.plan import Plan
from bench.sweep.storage import cells_of_sweeps, default_url, open_storage, open_trials


@pytest.fixture(scope="module")
def made() -> Plan:
    return plan()


@pytest.fixture
def store(tmp_path: Path, made: Plan) -> Store:
    """The study's four cells, their data, and two cells of a study that is not there any more."""
    other = stored(tmp_path / "runs", plan(train={"steps": 5, "device": "cpu"}, seeds=1))
    (other.root / "studies" / "stored.json").unlink()
    store = stored(tmp_path / "runs", made)
    fingerprint = made.cells[0].cell.fingerprint
    for name in (fingerprint, "d" * 64):
        store.data(name).mkdir(parents=True)
        (store.data(name) / "train.arrow").write_bytes(bytes(1000))
    return store


def orphans(store: Store, made: Plan) -> set[str]:
    found = {path.name for path in store.root.iterdir() if len(path.name) == 64}
    return found - {planned.cell.id for planned in made.cells}


def kinds(found: list[Waste]) -> dict[str, set[str]]:
    return {kind: {one.path.name for one in found if one.kind == kind} for kind in {one.kind for one in found}}


def test_a_sound_store_has_nothing_to_clean(tmp_path: Path, made: Plan) -> None:
    store = stored(tmp_path / "runs", made)
    before = content(store.root)
    assert waste(store) == ([], "") and content(store.root) == before


def test_nothing_goes_before_it_is_asked_for(
    store: Store, made: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(store.root.parent)
    gone, before = orphans(store, made), content(store.root)
    assert len(gone) == 2
    app(["clean"], standalone_mode=False)
    said = capsys.readouterr().out
    assert said.count("may go: ") == 3 and "ztt on p_hop seed 0, trained in 2 s, of no study" in said
    assert "nothing was removed (to do it: --yes)" in said and content(store.root) == before
    app(["clean", "--yes"], standalone_mode=False)
    assert capsys.readouterr().out.count("removed: ") == 3
    kept = {path: data for path, data in before.items() if path.split("/")[0] not in gone and "d" * 64 not in path}
    assert content(store.root) == kept and not orphans(store, made)
    app(["clean"], standalone_mode=False)
    assert "runs: nothing to clean" in capsys.readouterr().out


def test_what_a_process_is_at_stays(store: Store, made: Plan) -> None:
    id, other = sorted(orphans(store, made))
    (store.folder(id) / "result.json").unlink()
    lease = Lease.take(store.folder(id), 1)
    assert lease is not None
    with lease:
        found, unsure = waste(store)
        assert kinds(found)["cell"] == {other} and unsure == "", "its data are told by its cell.json"
        (store.folder(id) / "cell.json").unlink()
        found, unsure = waste(store)
        assert kinds(found) == {"cell": {other}} and unsure == f"prepared data: cell {id[:12]} has not ended yet"
    found, _ = waste(store)
    assert kinds(found)["cell"] == {id, other}, "given back, it is nobody's"
    lease = Lease.take(store.folder(id), 2)
    assert lease is not None
    with lease:
        assert {one.path.name for one in clean(store, found)} == {other, "d" * 64}, "taken in the meantime"
        lease.check()
    assert store.folder(id).exists()


def test_what_a_study_has_come_to_need_stays(store: Store, made: Plan) -> None:
    found, _ = waste(store)
    again = plan(train={"steps": 5, "device": "cpu"}, seeds=1, name="again")
    store.write_manifest("again", again.manifest)
    assert [one.kind for one in clean(store, found)] == ["data"]
    assert orphans(store, made) == {planned.cell.id for planned in again.cells}


def test_everything_that_a_file_of_a_study_names_is_needed(store: Store, made: Plan) -> None:
    id, other = sorted(orphans(store, made))
    assert kinds(waste(store)[0])["cell"] == {id, other}
    tuned = {"variant": "htc", "task": "p_hop", "seed": 9, "metric": "accuracy", "value": 0.5, "chosen": {}}
    config = {**made.manifest.config, "init": f"runs/{other}/model"}
    rows = [TuningRow(**tuned, trials=[TrialRow(id=id, value=0.5)])]
    store.write_manifest("stored", made.manifest.but(tuning=rows, config=config))
    assert kinds(waste(store)[0]) == {"data": {"d" * 64}}, "a trial, and a model that cells start from"
    path = store.root / "studies" / "stored.json"
    path.write_text(path.read_text()[:-50])
    for name in ("stored.json", "stored.json.corrupt"):
        found, unsure = waste(store)
        assert (found, unsure.startswith(f"cells: {path.with_name(name)} is damaged")) == ([], True)
        store.manifest("stored")


def test_what_a_cell_starts_from_is_needed(store: Store, made: Plan) -> None:
    id, other = sorted(orphans(store, made))
    cell = made.cells[0].cell
    store.write_cell(cell.id, cell.model_copy(update={"init": Init(source=f"{CELL_SOURCE}{id}")}))
    assert kinds(waste(store)[0])["cell"] == {other}


def test_data_of_cells_that_have_not_run_are_kept(store: Store, made: Plan) -> None:
    waiting = plan(name="later", tasks=["memorisation"])
    store.write_manifest("later", waiting.manifest)
    found, unsure = waste(store)
    assert unsure == "prepared data: of later, no cell has ended on memorisation yet" and set(kinds(found)) == {"cell"}
    more = plan(seeds=9)
    store.write_manifest("later", more.manifest)
    found, unsure = waste(store)
    assert unsure == "" and kinds(found)["data"] == {"d" * 64}, "other cells of the task tell the data"


def test_checkpoints_go_where_a_cell_has_ended(store: Store, made: Plan) -> None:
    done, left = (planned.cell.id for planned in made.cells[:2])
    for id in (done, left):
        (store.folder(id) / "checkpoints").mkdir()
        (store.folder(id) / "checkpoints" / "000000005.safetensors").write_bytes(bytes(500))
    (store.folder(left) / "result.json").unlink()
    found = [one for one in waste(store)[0] if one.kind == "checkpoints"]
    assert [(one.path.parent.name, one.size) for one in found] == [(done, 500)]
    assert len(list(clean(store, found))) == 1
    assert store.done(done) and not (store.folder(done) / "checkpoints").exists()
    assert (store.folder(left) / "checkpoints" / "000000005.safetensors").exists(), "it goes on from there"


def test_what_killed_processes_have_left_goes_when_it_is_old(store: Store, made: Plan) -> None:
    cell = made.cells[0].cell.id
    old = [".store.json.ab12cd_4", "studies/.stored.json.zz12cd_4", "reports/stored/.report.md.ab12cd_4"]
    old += [".import.77/x", ".upgrade/y", ".clean/z", f"{cell}/.model.77/model.safetensors"]
    old += [f"{cell}/checkpoints/.000000005.safetensors.ab12cd_4", f"{cell}/.damaged.77/train.arrow"]
    fresh = ["sweeps/.stored.json.ab12cd_4", ".import.78/x"]
    never = [".upgrade.lock", "optuna.db-wal", f"{cell}/log.txt", f"{cell}/result.json.corrupt", "notes.txt"]
    for name in (*old, *fresh, *never):
        path = store.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
        if name not in fresh:
            for each in (path, path.parent):
                os.utime(each, (time.time() - 2 * OLD,) * 2)
    found = [one for one in waste(store)[0] if one.kind == "half"]
    assert len(list(clean(store, found))) == len(old)
    assert not any((store.root / name).exists() for name in old)
    assert all((store.root / name).exists() for name in (*fresh, *never))


@pytest.mark.parametrize(
    ("name", "partial"),
    [
        (".result.json.ab12cd_4", True),
        (".model.123", True),
        (".a.b.c.12345678", True),
        (".upgrade.lock", False),
        (".gitignore", False),
        ("result.json", False),
        ("lease.12", False),
        ("a.12345678", False),
    ],
)
def test_names_of_what_is_half_written(name: str, partial: bool) -> None:
    assert is_partial(Path("x") / name) is partial


def trials(store: Store, *told: dict[str, Any]) -> None:
    """Trials of a sweep, as its database has them."""
    study = open_trials(open_storage(default_url(store.root)), "stored / htc / p_hop / budgets / 1", "accuracy", True)
    for attributes in told:
        trial = study.ask()
        for key, value in attributes.items():
            trial.set_user_attr(key, value)


def test_cells_of_sweeps_are_needed(store: Store, made: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    id, other = sorted(orphans(store, made))
    trials(
        store,
        {"cell": id, "flops_per_token": 1.0},
        {"cell": other, "flops_per_token": 1.0, "reason": "pruned at 20% of the training"},
        {"cell": "e" * 64, "number": 0},
    )
    needed = cells_of_sweeps(store.root, None, {})
    assert needed == {id} and kinds(waste(store, needed)[0])["cell"] == {other}
    app(["clean", "--yes", "--runs", str(store.root)], standalone_mode=False)
    assert orphans(store, made) == {id} and "removed: " in capsys.readouterr().out
    assert cells_of_sweeps(store.root, None, {"stored": "sqlite:////elsewhere/runs/optuna.db"}) == {id}, "it was moved"
    other_file = store.root.parent / "optuna.db"
    other_file.touch()
    with pytest.raises(UserError, match="--storage: the sweep stored has its trials in sqlite"):
        cells_of_sweeps(store.root, None, {"stored": f"sqlite:///{other_file}"})
    with pytest.raises(UserError, match="--storage: the sweep stored has its trials in postgresql://host/db"):
        cells_of_sweeps(store.root, None, {"stored": "postgresql://host/db"})
    (store.root / "optuna.db.damaged-1").write_bytes(b"x")
    found, unsure = waste(store, needed)
    assert found == [] and unsure.startswith(f"cells: {store.root / 'optuna.db.damaged-1'} is damaged")
    assert cells_of_sweeps(store.root / "nowhere", None, {}) == set() and not (store.root / "nowhere").exists()
