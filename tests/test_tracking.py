"""MLflow against a real sqlite store and a real server; and that its absence costs nothing but a warning."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agree import assert_agree, runs_of
from mlflow import MlflowClient
from records import MANIFEST, RESULTS, planned, record

from bench.store import mlflow_server, tracking
from bench.store.manifest import CellRow
from bench.store.store import Store
from bench.store.tracking import CELL_TAG, EXPERIMENT_OF, MlflowTracker


def children(client: MlflowClient) -> list[Any]:
    runs = runs_of(client)
    parents = [run for run in runs if run.data.tags.get("role") == "study"]
    assert len(parents) == 1 and parents[0].info.run_name == MANIFEST.study
    return [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]


def track(uri: str, root: Path) -> MlflowTracker:
    store = Store(root)
    tracker = MlflowTracker(uri, store)
    tracker.study(MANIFEST)
    for cell in MANIFEST.cells[:3]:
        found = record(cell)
        if found.status == "failed":
            store.write_failure(cell.id, found)
        elif not store.done(cell.id):
            store.write_result(cell.id, found)
        tracker.log(found, planned(cell))
    report = root / "report.html"
    report.write_text("<p>report</p>")
    tracker.finish([report])
    return tracker


@pytest.fixture(scope="module")
def sqlite(tmp_path_factory: pytest.TempPathFactory, no_runs: Path) -> str:
    folder = tmp_path_factory.mktemp("tracked")
    shutil.copy(no_runs, folder)
    uri = f"sqlite:///{folder}/mlflow.db"
    client = MlflowClient(uri)
    client.create_experiment(EXPERIMENT_OF.format(MANIFEST.study), artifact_location=str(folder / "artifacts"))
    track(uri, folder)
    return uri


def test_one_child_a_cell_with_metrics_by_step_and_by_flops(sqlite: str) -> None:
    client = MlflowClient(sqlite)
    runs = {run.data.tags[CELL_TAG]: run for run in children(client)}
    assert set(runs) == {cell.id for cell in MANIFEST.cells[:3]}
    cell = MANIFEST.cells[0]
    run, expected = runs[cell.id], record(cell)
    assert run.info.status == "FINISHED" and run.data.tags["data_fingerprint"] == expected.cell.fingerprint
    assert run.data.params["model.d_model"] == "64" and run.data.params["variant"] == expected.cell.variant
    assert run.data.metrics["test_accuracy"] == expected.metrics["test_accuracy"]
    assert run.data.metrics["test_accuracy at 64"] == 0.5
    by_step = client.get_metric_history(run.info.run_id, "valid_loss")
    by_flops = client.get_metric_history(run.info.run_id, "by_mflops/valid_loss")
    assert [m.step for m in by_step] == [entry.step for entry in expected.history]
    assert [m.step for m in by_flops] == [int(entry.flops / 1e6) for entry in expected.history]
    fixed = client.get_metric_history(run.info.run_id, "by_executed_kflops/fixed/accuracy")
    assert expected.exits is not None
    points = [(round(point.flops_per_token / 1e3), point.accuracy) for point in expected.exits.points]
    assert [(m.step, m.value) for m in fixed] == points
    by_rule = client.get_metric_history(run.info.run_id, "by_executed_kflops/confidence/accuracy")
    assert [m.step for m in by_rule] == [1000, 1250, 1500, 2000]
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"result.json"}


def test_failed_cells_are_failed_runs(sqlite: str) -> None:
    failed = [run for run in children(MlflowClient(sqlite)) if run.info.status == "FAILED"]
    assert [run.data.tags["reason"] for run in failed] == ["loss is nan within steps 11-20"]


def test_logging_again_adds_nothing_but_another_try_of_what_failed(sqlite: str, tmp_path: Path) -> None:
    before = {run.info.run_id for run in children(MlflowClient(sqlite))}
    tracker = track(sqlite, tmp_path)
    assert {run.info.run_id for run in children(MlflowClient(sqlite))} == before
    failed = next(cell for cell in MANIFEST.cells if record(cell).status == "failed")
    tracker.log(record(failed).but(at=1.8e9), planned(failed))
    assert len({run.info.run_id for run in children(MlflowClient(sqlite))} - before) == 1


class Server:
    """A real MLflow server that can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # eight processes for what no run needs
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, cwd=self.folder, env=env, start_new_session=True, **quiet)
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)

    def send(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def stop(self) -> None:
        self.send(signal.SIGCONT)
        self.send(signal.SIGTERM)
        self.process.wait(20)


@pytest.fixture
def server(tmp_path: Path, no_runs: Path) -> Iterator[Server]:
    shutil.copy(no_runs, tmp_path / "server.db")
    server = Server(tmp_path)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.mark.long
def test_a_real_server_that_is_stopped_started_and_held_up_loses_nothing(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker, store = track(server.uri, tmp_path / "runs"), Store(tmp_path / "runs")
    assert not tracker.broken and len(children(MlflowClient(server.uri))) == 3
    more = [cell for cell in MANIFEST.cells[3:] if cell.id in RESULTS]

    def add(cell: CellRow) -> None:
        store.write_result(cell.id, RESULTS[cell.id])  # type: ignore[arg-type]
        tracker.add(RESULTS[cell.id], cell)

    server.stop()
    for cell in more[:2]:
        add(cell)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "results are kept in the store, and a later command adds them" in told
    server.start()
    tracker.complete(MANIFEST)
    assert "answers again and holds what the store holds" in capsys.readouterr().err
    assert_agree(server.uri, store, MANIFEST)

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    for module in (mlflow_server, tracking):
        monkeypatch.setattr(module, "ANSWER", 1.0)
    server.send(signal.SIGSTOP)  # it takes connections and does not answer
    began = time.monotonic()
    for cell in more[2:]:
        add(cell)
    tracker.complete(MANIFEST)
    assert tracker.hung and time.monotonic() - began < 2 * 2
    server.send(signal.SIGCONT)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    later = MlflowTracker(server.uri, store)
    later.complete(MANIFEST)
    assert later.filled == len(more[2:]) > 0
    assert_agree(server.uri, store, MANIFEST)


def test_an_absent_server_is_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = track("http://127.0.0.1:9", tmp_path / "runs")
    assert tracker.broken
    warning = capsys.readouterr().err.strip()
    assert warning.count("\n") == 0 and "http://127.0.0.1:9 is not available, results are kept" in warning
    assert Store(tmp_path / "runs").done(MANIFEST.cells[0].id)
