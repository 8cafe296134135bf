"""MLflow agrees with the store after every command, whatever was killed, damaged, stopped or run beside it.

``CYCLEBENCH_TRACKING_KILLS`` sets how often a process is killed while it begins to log (3 by default); ``make torture``
kills 40 times.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from agree import assert_agree, runs_of
from commands import Command, cyclebench
from mlflow import MlflowClient
from records import MANIFEST, RESULTS
from sqlalchemy import Engine, event
from test_runner import RAW

from bench.store import mlflow_server, tracking
from bench.store.manifest import Manifest
from bench.store.store import Store
from bench.store.tracking import CELL_TAG, MlflowTracker

KILLS = int(os.environ.get("CYCLEBENCH_TRACKING_KILLS", "3"))
TOUCHES = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "sqlite3.connect")
OTHER = MANIFEST.but(study="other", cells=MANIFEST.cells[:2])


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with three results and a failure of one study, and a second study of two of them."""
    store = Store(tmp_path_factory.mktemp("template") / "runs")
    for manifest in (MANIFEST.but(cells=MANIFEST.cells[:4]), OTHER):
        store.write_manifest(manifest.study, manifest)
    for cell in MANIFEST.cells[:4]:
        if (record := RESULTS[cell.id]).status == "done":
            store.write_result(cell.id, record)
        else:
            store.write_failure(cell.id, record)
    return store.root


@pytest.fixture
def store(template: Path, tmp_path: Path) -> Store:
    shutil.copytree(template, tmp_path / "runs")
    return Store(tmp_path / "runs")


@pytest.fixture
def uri(tmp_path: Path, no_runs: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A ready database; what MLflow keeps beside it goes into a folder of the test."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(no_runs, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


def of(store: Store, study: str = MANIFEST.study) -> Manifest:
    manifest = store.manifest(study)
    assert manifest is not None
    return manifest


@pytest.mark.long
def test_three_commands_that_begin_at_once_with_no_database(tmp_path: Path) -> None:
    """Neither MLflow's nor Optuna's, which keeps the trials of the tuning."""
    tune = {"trials": 2, "lr": [1e-4, 1e-2], "seed": 90}
    (tmp_path / "tiny.yaml").write_text(json.dumps({**RAW, "variants": ["htc"], "tune": tune}))
    started = [Command(tmp_path, "run", "tiny.yaml", "--jobs", "1", fresh=True) for _ in range(3)]
    ended = [each.ended() for each in started]
    assert [each.returncode for each in ended] == [0, 0, 0], [each.stderr for each in ended]
    assert all("MLflow" not in each.stderr for each in ended), [each.stderr for each in ended]
    store = Store(tmp_path / "runs")
    for study in ("tiny", "tiny-tuning"):
        assert len(store.results(cell.id for cell in of(store, study).cells)) == 2
        assert_agree(f"sqlite:///{tmp_path}/mlflow.db", store, of(store, study))


def begun(root: Path, moment: int = -1) -> int:
    """What a command does to MLflow, in a process that kills itself before so many statements and touches of files;
    how many there were, of one that lived.
    """
    child = os.fork()
    if child == 0:
        try:
            seen = 0

            def count(*_: object) -> None:
                nonlocal seen
                seen += 1
                if seen == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

            def touched(name: str, arguments: tuple[Any, ...]) -> None:
                if name in TOUCHES and (name != "open" or arguments[1] not in (None, "r", "rb")):
                    count()

            os.dup2(os.open(root / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            os.chdir(root)
            event.listen(Engine, "before_cursor_execute", count)
            sys.addaudithook(touched)
            store = Store(root / "runs")
            tracker = MlflowTracker("sqlite:///mlflow.db", store)
            tracker.begin(of(store))
            tracker.complete(of(store))
            (root / "seen").write_text(str(seen))
            os._exit(3 if tracker.broken else 0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        finally:
            os._exit(4)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), (status, (root / "stderr").read_text())
    return int((root / "seen").read_text()) if status == 0 else 0


@pytest.mark.long
def test_killed_while_it_begins_it_ends_as_one_that_lived(tmp_path: Path, template: Path) -> None:
    chance, number, moments = random.Random(int.from_bytes(os.urandom(4), "big")), 0, 0
    while True:
        root = tmp_path / str(number)
        shutil.copytree(template, root / "runs")
        told = []
        while moments and number < KILLS and len(told) < 1 + number % 3:
            told.append(round(chance.choice((0.02, 0.5, 0.7, 1)) * chance.random() * moments) + 1)
            begun(root, told[-1])
            number += 1
        moments = moments or begun(root)
        begun(root)
        assert (root / "stderr").read_text() == "", told
        store = Store(root / "runs")
        assert_agree(f"sqlite:///{root}/mlflow.db", store, of(store))
        left = {path.name for path in root.iterdir()}
        assert left <= {"runs", "mlflow.db", ".mlflow.db.lock", "mlruns", "stderr", "seen"}, told
        shutil.rmtree(root)
        if told and number >= KILLS:
            return
        number += not told


def follow(uri: str, store: Store, study: str = MANIFEST.study) -> MlflowTracker:
    tracker = MlflowTracker(uri, store)
    tracker.complete(of(store, study))
    return tracker


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def vanish(path: Path) -> None:
    path.unlink()


def other_one(path: Path) -> None:
    """Another, empty database takes its place."""
    shutil.copy(path.with_name("empty.db"), path)


@pytest.mark.parametrize(("harm", "running"), [(damage, False), (damage, True), (vanish, True), (other_one, False)])
@pytest.mark.long
def test_a_database_that_is_lost_is_filled_again(
    harm: Callable[[Path], None],
    running: bool,
    uri: str,
    store: Store,
    tmp_path: Path,
    no_runs: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copy(no_runs, tmp_path / "empty.db")
    follow(uri, store, OTHER.study)
    tracker = follow(uri, store)
    harm(tmp_path / "mlflow.db")
    if running:
        tracker.complete(of(store))
    else:
        tracker = follow(uri, store)
    assert not tracker.broken
    assert_agree(uri, store, of(store))
    told = capsys.readouterr().err.splitlines()
    if harm is damage:
        assert len(told) == 1 and "mlflow.db is damaged and kept as mlflow.db.damaged-1" in told[0]
        assert (tmp_path / "mlflow.db.damaged-1").exists()
        assert_agree(uri, store, of(store, OTHER.study))
    else:
        assert told == []


def test_what_others_have_logged_is_not_logged_again(uri: str, store: Store) -> None:
    first, second = MlflowTracker(uri, store), MlflowTracker(uri, store)
    for tracker in (first, second):
        tracker.begin(of(store))
    for number, cell in enumerate(of(store).cells):
        for tracker in (first, second) if number % 2 else (second, first):
            record = store.record(cell.id)
            assert record is not None
            tracker.add(record, cell)
    for tracker in (first, second):
        tracker.complete(of(store))
    assert_agree(uri, store, of(store))


def test_a_result_that_was_made_again_takes_the_place_of_the_first(uri: str, store: Store) -> None:
    tracker, cell = follow(uri, store), of(store).cells[0]
    record = store.record(cell.id)
    assert record is not None and record.status == "done"
    (store.folder(cell.id) / "result.json").unlink()
    again = record.but(timing=record.timing.but(started=1.8e9))
    store.write_result(cell.id, again)
    tracker.add(again, cell)
    tracker.complete(of(store))
    assert_agree(uri, store, of(store))


def test_what_was_complete_is_not_looked_through_but_by_sync(
    uri: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(uri, store)
    looks: list[None] = []
    logged = MlflowTracker._logged
    monkeypatch.setattr(MlflowTracker, "_logged", lambda self: (looks.append(None), logged(self))[1])
    tracker = follow(uri, store)
    assert looks == [] and tracker.there == 4 and tracker.filled == 0
    client = MlflowClient(uri)
    client.delete_run(next(run.info.run_id for run in runs_of(client) if CELL_TAG in run.data.tags))
    doubting = MlflowTracker(uri, store)
    doubting.trusting = False
    doubting.complete(of(store))
    assert len(looks) == 1 and (doubting.there, doubting.filled) == (3, 1)
    assert_agree(uri, store, of(store))


def test_what_says_that_it_holds_everything_is_not_opened(
    uri: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "report.html"
    report.write_text("first")
    MlflowTracker(uri, store).complete(of(store), [report])
    opened: list[str] = []
    connect = tracking.connect
    monkeypatch.setattr(tracking, "connect", lambda *words: (opened.append(""), connect(*words))[1])
    tracker = MlflowTracker(uri, store)
    tracker.complete(of(store), [report])
    assert not opened and tracker.there == 4
    for change in (
        lambda: report.write_text("second"),
        lambda: store.write_manifest(MANIFEST.study, of(store).but(question="another")),
        lambda: store.write_manifest(MANIFEST.study, of(store).but(cells=MANIFEST.cells[:3])),
        lambda: MlflowClient(uri).delete_run(
            next(run.info.run_id for run in runs_of(MlflowClient(uri)) if run.data.tags.get("role") == "study")
        ),
        (tmp_path / "mlflow.db").unlink,
    ):
        change()
        MlflowTracker(uri, store).complete(of(store), [report])
        assert opened.pop() == "" and not opened
        MlflowTracker(uri, store).complete(of(store), [report])
        assert not opened


def test_of_two_runs_of_the_same_cell_one_is_left(uri: str, store: Store) -> None:
    tracker, cell = follow(uri, store), of(store).cells[0]
    record = store.record(cell.id)
    assert record is not None
    tracker._write(record, cell, "", int(1000 * record.timing.started))  # type: ignore[union-attr]
    tracker.trusting, tracker.known = False, set()
    tracker.complete(of(store))
    assert_agree(uri, store, of(store))


@pytest.mark.long
def test_report_and_sync_bring_mlflow_up_to_the_store(tmp_path: Path, template: Path, no_runs: Path) -> None:
    shutil.copytree(template, tmp_path / "runs")
    (tmp_path / "sample.yaml").write_text(json.dumps({**RAW, "name": "sample"}))
    store = Store(tmp_path / "runs")
    for number, words in enumerate((["report", "sample.yaml"], ["sync", "sample.yaml"])):
        shutil.copy(no_runs, tmp_path / f"{number}.db")
        uri = f"sqlite:///{tmp_path}/{number}.db"
        ended = cyclebench(tmp_path, *words, "--tracking-uri", uri)
        assert ended.returncode == 0, ended.stderr
        assert_agree(uri, store, of(store))
        (parent,) = [run for run in runs_of(MlflowClient(uri)) if run.data.tags.get("role") == "study"]
        kept = {file.path for file in MlflowClient(uri).list_artifacts(parent.info.run_id, "report")}
        assert "report/report.html" in kept
    assert "4 cells added, 0 were there already" in ended.stdout


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a server that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield server.getsockname()[1]


@pytest.mark.parametrize("scheme", ["http", "postgresql+psycopg"])
def test_a_server_that_never_answers_is_waited_for_once(
    scheme: str, silent: int, store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (mlflow_server, tracking):
        monkeypatch.setattr(module, "ANSWER", 1.0)
    tracker, began = MlflowTracker(f"{scheme}://127.0.0.1:{silent}", store), time.monotonic()
    tracker.begin(of(store))
    tracker.catch_up(of(store))
    for cell in of(store).cells:
        record = store.record(cell.id)
        assert record is not None
        tracker.add(record, cell)
    tracker.complete(of(store))
    assert tracker.broken and tracker.hung and time.monotonic() - began < 5
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "is not available, results are kept in the store" in warning
    assert "a later command adds them: no answer in 1 s" in warning
