"""What MLflow shows of a study: verdicts, table and means first, in an experiment of its own; and curves of cells that
run, whose runs are not left behind, whatever becomes of the cell.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from agree import assert_agree, runs_of
from mlflow import MlflowClient
from records import MANIFEST, RESULTS

from bench.store import tracking
from bench.store.manifest import CellRow, Manifest
from bench.store.mlflow_server import EXPERIMENT
from bench.store.records import Record
from bench.store.store import Store
from bench.store.tracked import LONGEST, REST, page, totals
from bench.store.tracker import Findings
from bench.store.tracking import CELL_TAG, EXPERIMENT_OF, NOTE, STUDY, MlflowTracker
from reports.first_page import findings
from reports.table import summary
from reports.verdicts import sentences

OWN = EXPERIMENT_OF.format(MANIFEST.study)


def test_two_labels_are_never_one_metric() -> None:
    metrics = {"accuracy/p_hop/ztt (params)": 0.1, "accuracy/p_hop/ztt params": 0.2, "accuracy/p_hop/htc": 0.3}
    names = [name for name, *_ in totals(MANIFEST, Findings((), metrics=metrics), 0)]
    assert (
        len(set(names)) == 3 and names[2] == "accuracy/p_hop/htc" and names[0].startswith("accuracy/p_hop/ztt params ")
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """With the results of some cells."""
    store = Store(tmp_path / "runs")
    manifest = MANIFEST.but(cells=MANIFEST.cells[:4])
    store.write_manifest(manifest.study, manifest)
    for cell in manifest.cells:
        if (record := RESULTS[cell.id]).status == "done":
            store.write_result(cell.id, record)
        else:
            store.write_failure(cell.id, record)
    return store


@pytest.fixture
def uri(tmp_path: Path, no_runs: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    shutil.copy(no_runs, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


def of(store: Store) -> Manifest:
    manifest = store.manifest(MANIFEST.study)
    assert manifest is not None
    return manifest


def follow(uri: str, store: Store) -> MlflowTracker:
    tracker = MlflowTracker(uri, store)
    tracker.complete(of(store))
    return tracker


def parent_of(uri: str) -> Any:
    (run,) = [run for run in runs_of(MlflowClient(uri)) if run.data.tags.get(STUDY) == MANIFEST.study]
    return run


def test_the_first_page_has_verdicts_table_and_means(uri: str, store: Store) -> None:
    MlflowTracker(uri, store).complete(of(store), (), findings(MANIFEST, RESULTS))
    client, run = MlflowClient(uri), parent_of(uri)
    note = run.data.tags[NOTE]
    assert client.get_experiment_by_name(OWN).tags[NOTE] == note and note.startswith(MANIFEST.question)
    assert all(f"- {sentence.split(':')[0]}" in note for sentence in sentences(MANIFEST, RESULTS))
    rows = summary(MANIFEST, RESULTS)
    assert all(f"| {row.task} | {row.variant} | {row.metric.replace('_', ' ')} |" in note for row in rows)
    for row in rows:
        name = re.sub(r"[^\w\-. :/]", "", f"{row.metric}/{row.task}/{row.variant}")
        assert run.data.metrics.get(name) == (row.score.mean if row.done else None)
    counts = {name: run.data.metrics[f"cells/{name}"] for name in ("done", "failed", "missing")}
    assert sum(counts.values()) == len(MANIFEST.cells)
    MlflowTracker(uri, store).begin(of(store))
    assert parent_of(uri).data.tags[NOTE] == note, "the verdicts stay while a study goes on"


def test_other_findings_take_the_place_of_those_before(uri: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    MlflowTracker(uri, store).complete(of(store), (), Findings(("nothing yet",)))
    looked: list[str] = []
    shown = tracking.shown_of
    monkeypatch.setattr(tracking, "shown_of", lambda *told: (looked.append(told[0].study), shown(*told))[1])
    MlflowTracker(uri, store).complete(of(store), (), Findings(("something",)))
    assert looked == [MANIFEST.study], "files are read once"
    note = parent_of(uri).data.tags[NOTE]
    assert "something" in note and "nothing" not in note
    monkeypatch.setattr(tracking, "connect", lambda *_: pytest.fail("it was all there"))
    MlflowTracker(uri, store).complete(of(store), (), Findings(("something",)))


def test_a_page_is_no_longer_than_mlflow_takes() -> None:
    table = ("| a |", "| --- |", *(f"| {number:0100d} |" for number in range(500)))
    told = page(MANIFEST, Findings(("short",), table))
    assert len(told) <= LONGEST and told.endswith(REST) and f"| {3:0100d} |" in told
    assert len(page(MANIFEST, Findings(("long" * LONGEST,), table))) <= LONGEST
    assert REST not in page(MANIFEST, Findings(("short",), table[:9]))


def test_a_study_of_before_is_found_where_it_was_begun(
    uri: str, store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as before:
        before.setattr(tracking, "EXPERIMENT_OF", EXPERIMENT)
        before.setattr(tracking, "former_experiment", lambda *_: None)
        MlflowTracker(uri, store).complete(of(store))
    first = {run.info.run_id for run in runs_of(MlflowClient(uri))}
    more = next(cell for cell in MANIFEST.cells[4:] if cell.id in RESULTS)
    store.write_manifest(MANIFEST.study, MANIFEST.but(cells=[*MANIFEST.cells[:4], more]))
    store.write_result(more.id, RESULTS[more.id])  # type: ignore[arg-type]
    MlflowTracker(uri, store).complete(of(store), (), Findings(("found",)))
    said = f"MLflow: {MANIFEST.study} stays in the experiment {EXPERIMENT!r}, where it was begun\n"
    assert capsys.readouterr().err == said
    now = {run.info.run_id for run in runs_of(MlflowClient(uri))}
    assert first < now and len(now - first) == 1
    MlflowTracker(uri, store).complete(of(store), (), Findings(("found again",)))
    assert capsys.readouterr().err == "", "told once"
    assert_agree(uri, store, of(store))
    client = MlflowClient(uri)
    assert client.get_experiment_by_name(OWN) is None
    assert NOTE not in client.get_experiment_by_name(EXPERIMENT).tags, "it is of other studies, too"
    other = MANIFEST.but(study="another", cells=MANIFEST.cells[:2])
    store.write_manifest(other.study, other)
    MlflowTracker(uri, store).complete(other)
    assert len(client.search_runs([client.get_experiment_by_name(EXPERIMENT_OF.format("another")).experiment_id])) == 3


def test_a_deleted_experiment_is_taken_back(uri: str, store: Store) -> None:
    MlflowTracker(uri, store).complete(of(store))
    client = MlflowClient(uri)
    client.delete_experiment(client.get_experiment_by_name(OWN).experiment_id)
    tracker = MlflowTracker(uri, store)
    tracker.trusting = False
    tracker.complete(of(store))
    assert not tracker.broken and client.get_experiment_by_name(OWN).lifecycle_stage == "active"
    assert_agree(uri, store, of(store))


def run_of(uri: str, id: str) -> Any:
    (run,) = [run for run in runs_of(MlflowClient(uri)) if run.data.tags.get(CELL_TAG) == id]
    return run


def open_one(uri: str, store: Store) -> tuple[MlflowTracker, CellRow, Record]:
    """A tracker at a cell that is not in the store yet, and has shown a part of its curves."""
    row = next(cell for cell in MANIFEST.cells[4:] if RESULTS[cell.id].status == "done")
    record = RESULTS[row.id]
    assert record.status == "done"
    store.write_manifest(MANIFEST.study, MANIFEST.but(cells=[*MANIFEST.cells[:4], row]))
    tracker = MlflowTracker(uri, store)
    tracker.begin(of(store))
    tracker.catch_up(of(store))
    tracker.opened(row.id, row, row.seed, record.timing.started)
    for entry in record.history[:2]:
        tracker.entry(row.id, entry.dump())
    return tracker, row, record


def test_a_run_is_open_while_its_cell_runs_and_is_completed_in_place(uri: str, store: Store) -> None:
    tracker, row, record = open_one(uri, store)
    there = run_of(uri, row.id)
    assert there.info.status == "RUNNING"
    curve = MlflowClient(uri).get_metric_history(there.info.run_id, "valid_loss")
    assert [(m.step, m.value) for m in curve] == [(e.step, e.valid_loss) for e in record.history[:2]]
    other = follow(uri, store)
    assert other.held == "" and run_of(uri, row.id).info.run_id == there.info.run_id, "left alone by others"
    store.write_result(row.id, record)
    tracker.add(record, row)
    tracker.complete(of(store))
    assert run_of(uri, row.id).info.run_id == there.info.run_id
    assert_agree(uri, store, of(store))
    assert tracker.held, "says now that it holds everything"


@pytest.mark.parametrize("ending", ["dropped", "killed", "again", "elsewhere"])
def test_an_open_run_that_nobody_completes_is_gone(
    ending: str, uri: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker, row, record = open_one(uri, store)
    first = run_of(uri, row.id).info.run_id
    if ending == "dropped":
        tracker.dropped(row.id)
    elif ending == "killed":
        monkeypatch.setattr(tracking, "gone", lambda owner: True)
        follow(uri, store)
    elif ending == "again":  # the cell begins once more, in a process that has taken it over
        open_one(uri, store)
        assert run_of(uri, row.id).info.run_id != first
        store.write_result(row.id, record)
    else:  # it is completed by another process, which began it later
        later = record.but(timing=record.timing.but(started=record.timing.started + 5))
        store.write_result(row.id, later)
        tracker.add(later, row)
    assert ending in ("again", "elsewhere") or first not in {run.info.run_id for run in runs_of(MlflowClient(uri))}
    follow(uri, store)
    assert_agree(uri, store, of(store))


def test_what_fails_leaves_no_open_run(uri: str, store: Store) -> None:
    tracker, row, _ = open_one(uri, store)
    failed = next(found for found in RESULTS.values() if found.status == "failed").but(id=row.id, at=1.7e9)
    store.write_failure(row.id, failed)
    tracker.add(failed, row)
    tracker.complete(of(store))
    assert run_of(uri, row.id).info.status == "FAILED"
    assert_agree(uri, store, of(store))
