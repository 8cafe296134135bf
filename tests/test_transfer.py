"""Export and import: what leaves a store comes whole into another, verified, and overwrites nothing there."""

from __future__ import annotations

import json
import tarfile
import zipfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from stored import content, here, made, packed, plan, record_of, sound, stored, taken  # noqa: F401 - fixtures

from bench.cli import app
from bench.errors import UserError
from bench.run import transfer
from bench.run.cells import failure
from bench.run.lease import Lease
from bench.run.runner import Running, run_study
from bench.run.status import status
from bench.run.upgrade import open_store
from bench.store.archive import INDEX
from bench.store.manifest import DecideRow, TrialRow, TuningRow
from bench.store.store import Store
from bench.store.versions import VERSION
from bench.study.plan import Plan


def test_everything_arrives_and_nothing_is_left_to_run(tmp_path: Path, here: Store, made: Plan) -> None:
    there = stored(tmp_path / "there", made)
    last = made.cells[-1].cell
    (there.folder(last.id) / "result.json").unlink()
    there.write_failure(last.id, failure(last, "loss is nan", "cell"))
    manifest, fates, notes, why = taken(packed(there, tmp_path / "a.zip"), here)
    assert fates == {"imported": 4} and not notes and not why
    expected = content(there.root)
    for name in ("model/config.json", "model/model.safetensors", "trace.npz", "trace_valid.npz", "cell.json"):
        del expected[f"{last.id}/{name}"]  # of a cell that failed
    arrived = {path: data for path, data in content(here.root).items() if "/lease." not in path}
    assert arrived == expected
    assert here.manifest("stored") == there.manifest("stored") == manifest
    found = status(here, manifest)
    assert (found.done, len(found.failed), found.waiting) == (3, 1, 0)
    records = run_study(made, here, Running(1), lambda *_: pytest.fail("a cell was run"))
    assert len(records) == 4
    assert taken(tmp_path / "a.zip", here)[1] == {"known": 4}


def test_an_archive_is_the_same_each_time_and_says_what_is_in_it(tmp_path: Path, made: Plan, sound: Path) -> None:
    again = packed(stored(tmp_path / "runs", made), tmp_path / "again.zip")
    assert again.read_bytes() == sound.read_bytes()
    with zipfile.ZipFile(sound) as archive:
        index = json.loads(archive.read(INDEX))
        assert (index["version"], index["study"]) == (VERSION, "stored")
        names = set(archive.namelist())
        assert names == {*index["files"], INDEX} and len(names) == 4 * 7 + 3
        for name, told in index["files"].items():
            data = archive.read(name)
            assert (told["sha256"], told["size"]) == (sha256(data).hexdigest(), len(data))
            assert archive.getinfo(name).external_attr >> 16 == 0o644, "for whoever unzips it by hand"
    with pytest.raises(UserError, match=r"again\.zip: there is such a file already"):
        packed(Store(tmp_path / "runs"), again)


def test_what_only_a_running_process_needs_stays_behind(tmp_path: Path, made: Plan, sound: Path) -> None:
    store = stored(tmp_path / "runs", made)
    folder = store.folder(made.cells[0].cell.id)
    for name in (
        "lease.3",
        "checkpoints/000000005.safetensors",
        ".model.77/x",
        ".result.json.ab12cd_4",
        "result.json.corrupt",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    (folder / "model" / ".README.md.ab12cd_4").write_text("x")
    assert packed(store, tmp_path / "a.zip").read_bytes() == sound.read_bytes()


def test_cells_of_the_tuning_belong_to_a_study(tmp_path: Path, here: Store, made: Plan) -> None:
    there = stored(tmp_path / "there", made)
    trial = made.cells[0].cell.id
    tuned = {"variant": "htc", "task": "p_hop", "seed": 9, "metric": "accuracy", "value": 0.5, "chosen": {}}
    rows = [TuningRow(**tuned, trials=[TrialRow(id=trial, value=0.5)])]
    rest = [cell for cell in made.manifest.cells if cell.id != trial]
    there.write_manifest("stored", made.manifest.but(cells=rest, tuning=rows))
    assert taken(packed(there, tmp_path / "a.zip"), here)[1] == {"imported": 4} and here.done(trial)


@pytest.mark.parametrize("first", ["here", "there"])
def test_two_machines_seeds_become_one_study(tmp_path: Path, first: str) -> None:
    both = {
        "here": stored(tmp_path / "here", plan(seeds=[0, 3])),
        "there": stored(tmp_path / "there", plan(seeds=[1, 2])),
    }
    other = both["there" if first == "here" else "here"]
    theirs = other.manifest("stored")
    assert theirs is not None
    other.write_manifest("stored", theirs.but(verdicts_at=[1]))
    manifest, fates, _, why = taken(packed(other, tmp_path / "a.zip"), both[first])
    assert (
        manifest.verdicts_at == [1]
        and fates == {"imported": 4}
        and not why
        and manifest == both[first].manifest("stored")
    )
    whole = plan(seeds=[0, 1, 2, 3])
    assert manifest.seeds == [0, 1, 2, 3] == manifest.config["seeds"]
    assert manifest.cells == whole.manifest.cells, "in the order in which one machine would have planned them"
    assert run_study(whole, both[first], Running(1), lambda *_: pytest.fail("a cell was run")).keys() == {
        cell.id for cell in whole.manifest.cells
    }


def test_a_deciding_study_keeps_its_looks(tmp_path: Path) -> None:
    looks = DecideRow(looks=[6, 8], shares=[0.5, 0.5], alpha=0.05)
    stores = []
    for place, (seeds, changed) in {"here": ([0, 1], False), "there": ([0, 1, 2], True)}.items():
        made = plan(seeds=seeds)
        stores.append(stored(tmp_path / place, made))
        decide = looks.but(changed=changed)
        config = {**made.manifest.config, "seeds": list(range(8))}
        stores[-1].write_manifest("stored", made.manifest.but(decide=decide, config=config))
    manifest, fates, _, why = taken(packed(stores[1], tmp_path / "a.zip"), stores[0])
    assert fates == {"known": 4, "imported": 2} and not why and manifest.seeds == [0, 1, 2]
    assert manifest.decide == looks.but(changed=True) and manifest.config["seeds"] == list(range(8))


def test_a_result_that_is_here_is_never_overwritten(tmp_path: Path, made: Plan, sound: Path) -> None:
    here = stored(tmp_path / "here", made)
    one, two = (record_of(planned) for planned in made.cells[:2])
    scores = {**one.metrics, "test_accuracy": one.metrics["test_accuracy"] + 0.25}
    for other in (one.but(metrics=scores), two.but(timing=two.timing.but(seconds=100.0))):
        (here.folder(other.id) / "result.json").unlink()
        here.write_result(other.id, other)
    before = content(here.root)
    _, fates, notes, why = taken(sound, here)
    assert fates == {"conflict": 1, "known": 3} and not why
    (note,) = notes
    assert note.startswith("this store has a result, which is kept; theirs differs in metrics.test_accuracy: ")
    assert content(here.root) == before


def test_a_result_takes_the_place_of_a_failure_and_of_a_damaged_one(tmp_path: Path, made: Plan, sound: Path) -> None:
    here = stored(tmp_path / "here", made)
    cut, failed = (planned.cell for planned in made.cells[:2])
    (here.folder(cut.id) / "result.json").write_text('{"status"')
    (here.folder(failed.id) / "result.json").unlink()
    here.write_failure(failed.id, failure(failed, "out of memory", "environment"))
    (here.folder(failed.id) / "checkpoints").mkdir()
    (here.folder(failed.id) / "model" / "stale").write_text("x")
    assert taken(sound, here)[1] == {"imported": 2, "known": 2}
    for cell in (cut, failed):
        names = {path.name for path in here.folder(cell.id).iterdir()}
        assert not names & {"failure.json", "checkpoints"} and not any("lease" in name for name in names)
        assert not (here.folder(cell.id) / "model" / "stale").exists()
        assert here.record(cell.id) == record_of(made.cells[0 if cell is cut else 1])


def test_a_failure_takes_no_ones_place(tmp_path: Path, made: Plan) -> None:
    there, here = (stored(tmp_path / name, made) for name in ("there", "here"))
    done, also = (planned.cell for planned in made.cells[:2])
    for cell, stores in ((done, [there]), (also, [there, here])):
        for store in stores:
            (store.folder(cell.id) / "result.json").unlink()
            store.write_failure(cell.id, failure(cell, f"of {store.root.name}", "cell"))
    assert taken(packed(there, tmp_path / "a.zip"), here)[1] == {"known": 4}
    assert here.done(done.id) and here.failures([also.id])[also.id].reason == "of here"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"question": "Another?"},
            "the study stored of this store is another: question is Another? here, Is it there? there",
        ),
        ({"variants": ["htc", "bc"]}, "variants.bc is"),
        ({"train": {"steps": 20, "batch_size": 2, "device": "cpu"}}, "train.batch_size is 2 here, 4 there"),
    ],
)
def test_another_study_of_the_same_name_keeps_its_manifest(
    tmp_path: Path, sound: Path, changes: dict[str, Any], message: str
) -> None:
    here, made = open_store(tmp_path / "here", begin=True), plan(**changes)
    here.write_manifest("stored", made.manifest)
    manifest, fates, _, why = taken(sound, here)
    assert message in why and fates["imported"] + fates["known"] == 4
    assert manifest == here.manifest("stored") == made.manifest


def test_cells_made_in_another_way_are_not_mixed(tmp_path: Path, made: Plan, sound: Path) -> None:
    other = plan(
        ["seeds=[5]"],
        tasks=[{**made.study.tasks[0].model_dump(), "options": {**made.study.tasks[0].options, "n_test": 21}}],
    )
    here = stored(tmp_path / "here", other)
    here.write_manifest("stored", other.manifest.but(config={**made.manifest.config, "seeds": [5]}))
    _, fates, _, why = taken(sound, here)
    assert fates == {"imported": 4}
    assert "cells of htc on p_hop differ in fingerprint, task_options.n_test" in why


def test_a_cell_that_is_run_here_is_left_to_its_process(
    here: Store, made: Plan, sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "EXPIRY", 0.1)
    id = made.cells[0].cell.id
    lease = Lease.take(here.folder(id), 1, beat=0.05)
    assert lease is not None
    with lease:
        _, fates, notes, why = taken(sound, here)
        assert fates == {"imported": 3, "refused": 1} and notes == [
            "a process is running it here: import again when that has ended"
        ]
        lease.check()
        assert not here.done(id) and not why
    assert taken(sound, here)[1] == {"known": 3, "imported": 1}


def test_former_ids_travel_along(tmp_path: Path, here: Store, capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(Path(__file__).parent / "stores" / "store-0713034.tgz") as file:
        file.extractall(tmp_path, filter="data")
    former = {path.name for path in (tmp_path / "runs").glob("*") if len(path.name) == 64}
    there = open_store(tmp_path / "runs")
    assert taken(packed(there, tmp_path / "a.zip", "old"), here)[1] == {"imported": 4}
    again = Store(here.root)
    assert former and all(again.done(id) for id in former) and again.former == there.former


def test_the_commands_tell_what_happened(
    tmp_path: Path, made: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    store = stored(tmp_path / "runs", made)
    (store.folder(made.cells[0].cell.id) / "result.json").unlink()
    app(["export", "stored", "a.zip"], standalone_mode=False)
    said = capsys.readouterr().out
    assert "stored: 3 cells, 23 files, " in said and "not in it: 1 cell without a record yet" in said
    app(["import", "a.zip", "--runs", "other"], standalone_mode=False)
    assert "stored: 3 cells imported, 0 were here already, 0 conflicts, 0 refused" in capsys.readouterr().out
    app(["status", "stored", "--runs", "other"], standalone_mode=False)
    assert "stored: 3 of 4 cells done, 0 running, 0 failed, 1 waiting" in capsys.readouterr().out
    other, record = Store(tmp_path / "other"), record_of(made.cells[1])
    (other.folder(record.id) / "result.json").unlink()
    other.write_result(record.id, record.but(metrics={**record.metrics, "test_accuracy": 0.25}))
    assert app(["import", "a.zip", "--runs", "other"], standalone_mode=False) == 1
    said = capsys.readouterr().out
    assert "stored: 0 cells imported, 2 were here already, 1 conflict, 0 refused" in said
    assert f"conflict: ztt p_hop seed 0 ({made.cells[1].cell.id[:12]}): this store has a result" in said
    with pytest.raises(UserError, match="no cell has run yet"):
        empty = open_store(tmp_path / "empty", begin=True)
        empty.write_manifest("stored", made.manifest)
        app(["export", "stored", "b.zip", "--runs", "empty"], standalone_mode=False)
    assert not (tmp_path / "b.zip").exists()
