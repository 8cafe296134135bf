"""Status, verify and sync on a study that was really run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from agree import runs_of
from mlflow import MlflowClient
from test_runner import RAW, plan

from bench.cli import runs as commands
from bench.errors import UserError
from bench.house import PUBLISHED
from bench.run import lease
from bench.run.cells import failure
from bench.run.lease import Lease
from bench.run.published import run_again
from bench.run.runner import Running, run_study
from bench.run.status import status
from bench.run.verify import check_stored, record_difference, rerun
from bench.store.digests import read_sealed, write_sealed
from bench.store.published import published_text
from bench.store.store import Store
from bench.store.tracking import CELL_TAG, MlflowTracker
from bench.study.plan import Plan
from reports.table import csv_of_cells


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    root = tmp_path_factory.mktemp("ran")
    made = plan(variants=["htc", "ztt"], seeds=[0])
    run_study(made, Store(root / "runs"), Running(1), lambda *_: None)
    return made, root


@pytest.fixture
def copy(ran: tuple[Plan, Path], tmp_path: Path) -> tuple[Plan, Store]:
    shutil.copytree(ran[1] / "runs", tmp_path / "runs")
    (tmp_path / "tiny.yaml").write_text(json.dumps(RAW))
    return ran[0], Store(tmp_path / "runs")


def test_sound_results_are_found_sound_and_give_the_same_numbers_again(copy: tuple[Plan, Store]) -> None:
    made, store = copy
    assert [finding.problem for finding in check_stored(store, made.manifest.cells)] == ["", ""]
    again = rerun(store, made.manifest.cells, 1)
    assert [(finding.check, finding.problem, finding.note) for finding in again] == [("run again", "", "")]


def _edit(store: Store, id: str, change: Any) -> None:
    path = store.folder(id) / "result.json"
    record = read_sealed(path)
    change(record)
    write_sealed(path, record)


def test_what_was_changed_is_found(copy: tuple[Plan, Store], capsys: pytest.CaptureFixture[str]) -> None:
    made, store = copy
    first, second = made.manifest.cells
    _edit(store, first.id, lambda record: record["metrics"].update(test_loss=record["metrics"]["test_loss"] + 1e-12))
    _edit(store, second.id, lambda record: record["cell"].update(seed=5))
    problems = [finding.problem for finding in check_stored(store, made.manifest.cells)]
    assert "its trace gives a test loss" in problems[0] and "its configuration has the id" in problems[1]
    _edit(store, first.id, lambda record: record["history"][-1].update(train_loss=9.0))
    found = rerun(store, [first], 5)
    assert "history" in found[0].problem and "relative difference" in found[0].problem
    with pytest.raises(typer.Exit):
        commands.verify(str(store.root.parent / "tiny.yaml"), sample=0, runs=store.root)
    assert "0 of 2 stored results are sound" in capsys.readouterr().out


def test_times_may_differ_and_nothing_else(copy: tuple[Plan, Store]) -> None:
    record = copy[1].record(copy[0].cells[0].cell.id)
    assert record is not None and record.status == "done"
    other = record.model_copy(deep=True)
    other.history[0].seconds += 1
    assert record_difference(record, other) == ""
    other.history[0].lr *= 1 + 1e-15
    assert "history[0].lr" in record_difference(record, other)


def test_status_tells_done_running_failed_and_waiting(
    copy: tuple[Plan, Store], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, store = copy
    made = plan(variants=["htc", "ztt"], seeds=2)
    store.write_manifest("tiny", made.manifest)
    htc, ztt = (planned.cell for planned in made.cells if planned.cell.seed == 1)
    each = [store.record(planned.cell.id) for planned in made.cells if planned.cell.seed == 0]
    costs = [record.costs.train_flops for record in each if record is not None]
    found = status(store, made.manifest)
    assert (found.done, found.waiting, found.running, found.failed) == (2, 2, [], [])
    assert found.left_flops == sum(costs) and found.left_seconds is not None and found.left_seconds > 0
    store.write_failure(ztt.id, failure(ztt, "loss is nan", "cell"))
    held = Lease.take(store.folder(htc.id), 1)
    assert held is not None
    with held:
        held.note(step=3, steps=6, tokens_per_second=1234.5, seconds_left=3661.0)
        held._write()
        found = status(store, made.manifest)
        assert (found.done, found.waiting, len(found.running), len(found.failed)) == (2, 0, 1, 1)
        assert found.left_flops == costs[0] / 2 + costs[1]
        commands.status(str(tmp_path / "tiny.yaml"), runs=store.root)
    shown = capsys.readouterr().out
    for text in ("2 of 4 cells done, 1 running, 1 failed, 0 waiting", "1,234", "3/6", "1:01:01", "loss is nan"):
        assert text in shown
    assert lease.read_lease(store.folder(htc.id)) is None


def test_status_before_anything_is_done_knows_the_cost_from_the_study(copy: tuple[Plan, Store], tmp_path: Path) -> None:
    made, store = copy
    whole = status(Store(tmp_path / "empty"), made.manifest)
    done = [store.record(planned.cell.id) for planned in made.cells]
    assert whole.waiting == 2 and whole.left_seconds is None
    assert whole.left_flops == sum(record.costs.train_flops for record in done if record is not None)


def _logged(uri: str) -> dict[str, Any]:
    client = MlflowClient(uri)
    runs = [run for run in runs_of(client) if CELL_TAG in run.data.tags]
    names = {key for run in runs for key in run.data.metrics}
    return {
        run.data.tags[CELL_TAG]: {
            "metrics": {
                name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] for name in names
            },
            "params": run.data.params,
            "status": run.info.status,
            "tags": {key: value for key, value in run.data.tags.items() if not key.startswith("mlflow.")},
        }
        for run in runs
    }


def test_mlflow_is_rebuilt_from_the_store(
    copy: tuple[Plan, Store],
    no_runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, store = copy
    monkeypatch.chdir(tmp_path)
    for name in ("mlflow.db", "new.db"):
        shutil.copy(no_runs, name)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = MlflowTracker(uri, store)
    tracker.study(made.manifest)
    for planned in made.cells:
        record = store.record(planned.cell.id)
        assert record is not None
        tracker.log(record, planned)
    tracker.finish([])
    before = _logged(uri)
    assert len(before) == 2 and any(name.startswith("system/") for name in next(iter(before.values()))["metrics"])
    commands.sync(str(tmp_path / "tiny.yaml"), runs=store.root, tracking_uri=uri)
    assert "0 cells added, 2 were there already" in capsys.readouterr().out and _logged(uri) == before
    new = f"sqlite:///{tmp_path}/new.db"
    commands.sync(str(tmp_path / "tiny.yaml"), runs=store.root, tracking_uri=new)
    assert "2 cells added" in capsys.readouterr().out and _logged(new) == before


def test_the_environment_is_locked_with_the_study(copy: tuple[Plan, Store]) -> None:
    import torch

    manifest = copy[1].manifest("tiny")
    assert manifest is not None
    assert f"torch=={torch.__version__}" in manifest.lock and len(manifest.lock) > 50


@pytest.fixture
def published(ran: tuple[Plan, Path], tmp_path: Path) -> Path:
    """The two files by which anyone can run the cells again, without the figures."""
    manifest, store = ran[0].manifest, Store(ran[1] / "runs")
    results = {row.id: record for row in manifest.cells if (record := store.record(row.id)) is not None}
    (tmp_path / "study.json").write_text(published_text(manifest, results, [], []))
    (tmp_path / "results.csv").write_text(csv_of_cells(manifest, results))
    return tmp_path


def test_a_published_study_is_run_again(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands.verify(str(published), sample=2, published=True)
    told = capsys.readouterr().out
    assert told.count(": the same to the last digit") == 2 and "2 of 2 cells run again gave what was" in told


def test_a_published_number_that_is_wrong_is_told(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = published / "results.csv"
    head, *rows = path.read_text().splitlines()
    place = head.split(",").index("test_accuracy")
    rows = [",".join([*(row := line.split(","))[:place], "0.9876", *row[place + 1 :]]) for line in rows]
    path.write_text("\n".join([head, *rows]))
    with pytest.raises(typer.Exit):
        commands.verify(str(published), sample=1, published=True)
    assert "published 0.9876: not the same, and the published seeds (one, or all equal)" in capsys.readouterr().out


def test_the_tolerance_is_of_the_seeds_of_the_variant(published: Path) -> None:
    text = json.loads((published / "study.json").read_text())
    lines = (published / "results.csv").read_text().splitlines()
    cells = text["manifest"]["cells"]
    other = {**cells[0], "seed": 1, "id": "f" * 64}
    cells.append(other)
    text["cells"]["f" * 64] = text["cells"][cells[0]["id"]]
    place = lines[0].split(",").index("test_accuracy")
    row = next(line for line in lines if cells[0]["id"] in line).replace(cells[0]["id"], "f" * 64).split(",")
    known = float(row[place])
    row[place] = str(known + 0.02)
    (published / "study.json").write_text(json.dumps(text))
    (published / "results.csv").write_text("\n".join([*lines, ",".join(row)]))
    found = {each.cell.id: each for each in run_again(str(published), 3)}
    assert found[cells[0]["id"]].tolerance == pytest.approx(3 * 0.02 / 2**0.5)
    assert found["f" * 64].problem == f"its configuration has the id {cells[0]['id'][:12]} here"
    assert not found["f" * 64].holds


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "Invalid JSON"), ('{"manifest": {}, "cells": {}}', "manifest.study"), (None, "unknown published study")],
)
def test_what_is_published_may_be_damaged(published: Path, text: str | None, said: str) -> None:
    (published / "study.json").unlink() if text is None else (published / "study.json").write_text(text)
    with pytest.raises(UserError, match=said):
        run_again(str(published), 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: re.sub(r"0\.\d+", "much", text), r"results.csv: line 2: test_accuracy = 'much' must be a number"),
        (lambda text: re.sub(r"0\.\d+", "inf", text), r"results.csv: line 2: test_accuracy = 'inf' must be a number"),
        (lambda text: re.sub(r"0\.\d+", "", text), r"results.csv: line 2: test_accuracy = '' must be a number"),
        (lambda text: text.replace("id,", "ident,", 1), "results.csv: column 'id' is missing"),
        (lambda text: text.replace("test_accuracy", "accuracy", 1), "results.csv: column 'test_accuracy' is missing"),
        (None, "results.csv cannot be read"),
    ],
)
def test_a_published_table_may_be_damaged(published: Path, change: Any, said: str) -> None:
    path = published / "results.csv"
    text = path.read_text()
    path.unlink() if change is None else path.write_text(change(text))
    with pytest.raises(UserError, match=said) as error:
        run_again(str(published), 1)
    assert "\n" not in str(error.value)


def test_to_have_run_nothing_is_no_success(published: Path) -> None:
    (published / "results.csv").write_text((published / "results.csv").read_text().splitlines()[0])
    with pytest.raises(typer.Exit):
        commands.verify(str(published), sample=2, published=True)


def test_a_study_of_ones_own_is_found_by_its_name(
    published: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where `report --publish` has written it; where one of that name comes with the suite, the name is not enough."""
    monkeypatch.chdir(published)
    own = published / "reports/published"
    (own / "mine").mkdir(parents=True)
    for name in ("study.json", "results.csv"):
        (own / "mine" / name).write_text((published / name).read_text())
    commands.verify("mine", sample=0, published=True)
    assert "0 of 0 cells run again" in capsys.readouterr().out
    shipped = next(path.parent.name for path in PUBLISHED.glob("*/study.json"))
    (own / "mine").rename(own / shipped)
    with pytest.raises(UserError, match=f"published study '{shipped}' is there twice .*{published}"):
        run_again(shipped, 0)
    assert run_again(f"reports/published/{shipped}", 0) == []
    with pytest.raises(UserError, match="unknown published study 'mine'"):
        run_again("mine", 0)
