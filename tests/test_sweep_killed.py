"""A sweep whose processes are killed goes on: what is done is kept, and there are as many trials as were asked for."""

from __future__ import annotations

import json
import sqlite3
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from commands import Command, cyclebench
from optuna.trial import TrialState
from test_sweep import RAW

from bench.sweep.storage import GRACE

TRIALS = 3
SWEEP: dict[str, Any] = {
    "budgets": {"trials": TRIALS, "prune": False, "ranges": {"train.lr": {"low": 1e-4, "high": 1e-2, "log": True}}}
}
COMMAND = ["sweep", "small.yaml", "--jobs", "1", "--tracking-uri", "sqlite:////dev/null/x.db"]


def trials(folder: Path) -> list[optuna.trial.FrozenTrial]:
    url = f"sqlite:///{folder}/runs/optuna.db"
    names = [study.study_name for study in optuna.get_all_study_summaries(url)]
    return [trial for name in names for trial in optuna.load_study(study_name=name, storage=url).trials]


def at_work(folder: Path) -> bool:
    """Whether a trial is done and another one is being trained."""
    about = "SELECT DISTINCT state FROM trials JOIN trial_user_attributes USING (trial_id) WHERE key = 'cell'"
    with sqlite3.connect(folder / "runs" / "optuna.db") as database:
        return {state for (state,) in database.execute(about)} >= {"COMPLETE", "RUNNING"}


@pytest.mark.long
def test_a_killed_sweep_goes_on(tmp_path: Path) -> None:
    task = {**RAW["tasks"][0], "train": {"steps": 200}}
    (tmp_path / "small.yaml").write_text(json.dumps({**RAW, "tasks": [task], "sweep": SWEEP}))
    results = lambda: {path: path.read_bytes() for path in (tmp_path / "runs").glob("*/result.json")}  # noqa: E731
    command = Command(tmp_path, *COMMAND)
    while not (results() and at_work(tmp_path)) and command.process.is_alive():
        time.sleep(0.02)
    command.kill()  # its workers too
    kept, before = results(), trials(tmp_path)
    done = {t.number: (t.params, t.values) for t in before if t.state == TrialState.COMPLETE}
    (halfway,) = (t for t in before if t.state == TrialState.RUNNING)
    assert 1 <= len(done) < TRIALS
    with sqlite3.connect(tmp_path / "runs" / "optuna.db") as database:  # the time passes after which it is given up
        database.execute(f"UPDATE trial_heartbeats SET heartbeat = datetime(heartbeat, '-{2 * GRACE} seconds')")
    again = cyclebench(tmp_path, *COMMAND)
    assert again.returncode == 0, again.stderr
    after = {t.number: t for t in trials(tmp_path)}
    assert {number: (after[number].params, after[number].values) for number in done} == done
    assert after[halfway.number].state == TrialState.FAIL
    complete = [t for t in after.values() if t.state == TrialState.COMPLETE]
    assert len(complete) == TRIALS and len(results()) == TRIALS
    assert halfway.params in [t.params for t in complete if t.number not in done], "it is tried again"
    assert all(path.read_bytes() == data for path, data in kept.items())
    row = json.loads((tmp_path / "runs" / "sweeps" / "small.json").read_text())["budgets"][0]
    assert row["trials"] == TRIALS and len(row["cells"]) == TRIALS
