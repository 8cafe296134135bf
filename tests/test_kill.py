"""A study killed at random moments leaves what one that lived leaves: results, files, MLflow.

``CYCLEBENCH_KILLS`` sets how often (25 by default); ``make torture`` kills 200 times.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from agree import runs_of
from mlflow import MlflowClient
from test_runner import RAW, plan

from bench.run.executors import local
from bench.run.runner import Running, run_study
from bench.store.store import Store
from bench.store.tracking import EXPERIMENT_OF, MlflowTracker
from bench.study.plan import Plan
from bench.train.checkpoints import Every

KILLS = int(os.environ.get("CYCLEBENCH_KILLS", "15"))
TIMES = ("timing", "seconds", "tokens_per_second", "digest")  # of a file that tells times, the digest too


def study(made: Plan, root: Path) -> None:
    """What ``cyclebench run`` does, in a process that has imported everything already."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    local.worker_context = lambda: multiprocessing.get_context("fork")
    store = Store(root / "runs")
    tracker = MlflowTracker(f"sqlite:///{root}/mlflow.db", store)
    tracker.begin(made.manifest)
    tracker.catch_up(made.manifest)
    run_study(made, store, Running(jobs=2, every=Every(None, 4)), tracker.add)
    tracker.complete(made.manifest)
    os._exit(3 if tracker.broken else 0)


def start(made: Plan, root: Path) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=study, args=(made, root))
    process.start()
    return process


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory, no_runs: Path) -> Path:
    """An empty MLflow store with its experiment: making one takes seconds, in which no cell could be killed."""
    folder = tmp_path_factory.mktemp("empty")
    shutil.copy(no_runs, folder)
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    client.create_experiment(EXPERIMENT_OF.format(RAW["name"]), artifact_location=str(folder / "artifacts"))
    return folder / "mlflow.db"


def new(root: Path, empty: Path) -> Path:
    """A folder for a study."""
    root.mkdir()
    shutil.copy(empty, root)
    return root


def untimed(value: Any) -> Any:
    """A record without what differs from run to run: times."""
    if isinstance(value, dict):
        return {key: untimed(inner) for key, inner in value.items() if key not in TIMES}
    return [untimed(inner) for inner in value] if isinstance(value, list) else value


def left(made: Plan, root: Path) -> dict[str, Any]:
    """All that a study has left in its store and in MLflow, without times and logs."""
    files: dict[str, Any] = {}
    for path in (root / "runs").rglob("*"):
        name = str(path.relative_to(root))
        if path.is_file() and path.name not in ("log.txt", "usage.json"):
            files[name] = untimed(json.loads(path.read_bytes())) if path.suffix == ".json" else path.read_bytes()
    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    runs: dict[str, Any] = {}
    for run in runs_of(client):
        name = str(run.info.run_name)
        assert name not in runs, f"MLflow has {name} twice"
        metrics = {
            key: [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, key)]
            for key in run.data.metrics
            if not key.startswith(("timing.", "system/"))
        }
        artifacts = {artifact.path for artifact in client.list_artifacts(run.info.run_id)} - {"log.txt"}
        runs[name] = (run.info.status, run.data.params, metrics, artifacts)
    assert set(runs) == {made.study.name, *(f"{p.variant} {p.task} seed {p.cell.seed}" for p in made.cells)}
    return {"files": files, "runs": runs}


@pytest.mark.long
def test_a_study_killed_at_random_moments_leaves_what_one_that_lived_leaves(tmp_path: Path, empty: Path) -> None:
    train = {"steps": 40, "batch_size": 4, "eval_sequences": 8}
    made, chance, kills = plan(train=train, seeds=[0]), random.Random(os.environ.get("CYCLEBENCH_KILL_SEED", "0")), 0
    root, began = new(tmp_path / "whole", empty), time.monotonic()
    process = start(made, root)
    process.join()
    assert process.exitcode == 0
    whole, seconds = left(made, root), time.monotonic() - began
    root = new(tmp_path / "0", empty)
    while True:
        process = start(made, root)
        process.join(chance.uniform(0, seconds / 2) if kills < KILLS else None)
        if process.is_alive() and process.pid is not None:
            os.killpg(process.pid, signal.SIGKILL) if chance.random() < 0.5 else process.kill()
            kills += 1
            process.join()
        else:
            assert process.exitcode == 0 and left(made, root) == whole, f"after {kills} kills"
            if kills >= KILLS:
                return
            root = new(tmp_path / str(len(list(tmp_path.iterdir()))), empty)
