"""Trackio itself, in files: what it holds of a store, once and whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from records import MANIFEST, RESULTS

from bench.errors import UserError
from bench.store.store import Store
from bench.store.tracker import trackers
from bench.store.trackio_tracker import TrackioTracker
from reports.first_page import findings

CELLS = MANIFEST.cells[:4]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "runs")
    store.write_manifest(MANIFEST.study, MANIFEST.but(cells=CELLS))
    for cell in CELLS:
        if (record := RESULTS[cell.id]).status == "done":
            store.write_result(cell.id, record)
        else:
            store.write_failure(cell.id, record)
    return store


def test_without_trackio_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", "")
    monkeypatch.setitem(__import__("sys").modules, "trackio.sqlite_storage", None)
    assert "trackio" in trackers.names()
    with pytest.raises(UserError, match=r"--tracker: 'trackio' cannot be used: .*cyclebench\[trackio\]"):
        TrackioTracker(str(tmp_path), Store(tmp_path))


def test_it_holds_what_the_store_holds_once(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = pytest.importorskip("trackio.sqlite_storage", reason="pip install 'cyclebench[trackio]'")
    monkeypatch.setattr(storage, "TRACKIO_DIR", tmp_path / "trackio")  # read when Trackio is imported
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    files: Any = storage.SQLiteStorage
    manifest = MANIFEST.but(cells=CELLS)
    found = findings(manifest, RESULTS)

    def follow() -> TrackioTracker:
        tracker = TrackioTracker("sqlite:///not-ours.db", store)
        tracker.complete(manifest, (), found)
        assert not tracker.broken
        return tracker

    first = follow()
    assert (first.filled, first.there) == (4, 0)
    again = follow()
    assert (again.filled, again.there) == (0, 4)
    runs = {run["name"]: run["id"] for run in files.get_run_records(first.project)}
    assert set(runs) == {MANIFEST.study, *(cell.name for cell in CELLS)}
    record = RESULTS[CELLS[0].id]
    assert record.status == "done"
    first.log(record, CELLS[0])  # by a process that did not know
    logs = files.get_logs(first.project, CELLS[0].name, run_id=record.id)
    curve = [(row["step"], row["valid_loss"]) for row in logs if "valid_loss" in row]
    assert curve == [(entry.step, entry.valid_loss) for entry in record.history]
    assert [row["test_accuracy"] for row in logs if "test_accuracy" in row] == [record.metrics["test_accuracy"]]
    told = files.get_run_config(first.project, CELLS[0].name, run_id=record.id)
    assert told["variant"] == CELLS[0].variant and told["model.d_model"] == 64
    failed = next(cell for cell in CELLS if RESULTS[cell.id].status == "failed")
    assert files.get_run_config(first.project, failed.name, run_id=runs[failed.name])["reason"]
    about = files.get_run_config(first.project, MANIFEST.study, run_id=runs[MANIFEST.study])
    assert about["question"] == MANIFEST.question and about["verdicts"] == list(found.sentences)
    (means,) = files.get_logs(first.project, MANIFEST.study, run_id=runs[MANIFEST.study])
    assert found.metrics.items() <= means.items()

    monkeypatch.setattr(storage, "TRACKIO_DIR", Path("/dev/null/nowhere"))
    lost = TrackioTracker("sqlite:///not-ours.db", store)
    lost.complete(manifest, (), found)
    warned = capsys.readouterr().err
    assert lost.broken and warned.count("\n") == 1 and "a later command adds them" in warned
