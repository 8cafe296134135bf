"""Searches whose names have changed with ids, and searches whose database is lost: nothing is trained again.

The store is of version 0713034, which has tuned a study and searched its budgets (by two workers, so that what a trial
asked for depended on when others ended); without its models.
"""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from commands import Ended, cyclebench
from optuna.trial import FrozenTrial, TrialState
from test_upgrade import unpacked

from bench.run.upgrade import open_store
from bench.store.store import Store
from bench.sweep.storage import default_url

NO_MLFLOW = ("--tracking-uri", "sqlite:////dev/null/x.db")
DONE = 9  # of the 16 trials that count: the others were pruned


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return unpacked("store-0713034-searched.tgz", tmp_path)


def trials(root: Path, kind: str) -> list[list[FrozenTrial]]:
    """Of every study of a kind in the database, in the order they were begun."""
    names = [name for name in optuna.get_all_study_names(default_url(root)) if f" / {kind} / " in name]
    return [optuna.load_study(study_name=name, storage=default_url(root)).trials for name in names]


def results(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.glob("*/result.json")}


def told(trial: FrozenTrial) -> object:
    attributes = {key: value for key, value in trial.user_attrs.items() if key != "former"}
    return trial.number, trial.state, trial.params, trial.values, trial.constraints, attributes


def command(root: Path, *words: str) -> Ended:
    ended = cyclebench(root.parent, *words, *NO_MLFLOW)
    assert ended.returncode == 0, ended.stderr
    return ended


@pytest.mark.long
def test_after_an_upgrade_trials_of_tuning_are_found_again(old: Path) -> None:
    store = open_store(old)
    before = results(old)
    ended = command(old, "run", "searched.yaml")
    assert ended.stderr.count("are done already; nothing to run") == 4 and results(old) == before
    former, now = trials(old, "tune")
    assert [(t.params, t.values) for t in now] == [(t.params, t.values) for t in former] and len(now) == 3
    assert [store.current(t.user_attrs["cell"]) for t in former] == [t.user_attrs["cell"] for t in now]


@pytest.mark.long
def test_after_an_upgrade_trials_of_budgets_are_found_again_and_pruned_ones_too(old: Path) -> None:
    (former,) = trials(old, "budgets")
    open_store(old)
    before = results(old)
    for _ in range(2):
        ended = command(old, "sweep", "searched.yaml")
        assert "16 of 16 trials are done already; nothing to run" in ended.stderr and results(old) == before
        _, now = trials(old, "budgets")
        assert [told(trial) for trial in now] == [told(trial) for trial in former]
    states = [trial.state for trial in now if "reason" in trial.user_attrs]
    assert states == [TrialState.PRUNED] * (16 - DONE)


@pytest.mark.parametrize(
    "other", ["sweep.max_flops=7999", "sweep.budgets.ranges={train.lr: {low: 1.0e-4, high: 1.0e-2, log: true}}"]
)
@pytest.mark.long
def test_trials_of_another_search_are_not_taken_for_its_own(old: Path, other: str) -> None:
    command(old, "sweep", "searched.yaml", "--set", other, "--set", "sweep.budgets.trials=1", "--jobs", "1")
    _, now = trials(old, "budgets")
    assert sum("refused" not in trial.user_attrs for trial in now) == 1
    assert not any("former" in trial.user_attrs for trial in now)


@pytest.mark.long
def test_a_lost_database_is_filled_again_from_what_was_trained(old: Path) -> None:
    fewer = ("sweep", "searched.yaml", "--set", f"sweep.budgets.trials={DONE}")
    command(old, *fewer)
    before, path = results(old), old / "optuna.db"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    ended = command(old, *fewer)
    assert "optuna.db is damaged and kept as optuna.db.damaged-1" in ended.stderr
    assert f"{DONE} of {DONE} trials are done already; nothing to run" in ended.stderr and results(old) == before
    (now,) = trials(old, "budgets")
    assert len(now) == DONE and {trial.state for trial in now} == {TrialState.COMPLETE}
    store = Store(old)
    for trial in now:
        record = store.record(trial.user_attrs["cell"])
        assert record is not None and record.status == "done"
        assert trial.values is not None and trial.values[1] == record.costs.forward_flops_per_token
        assert trial.params["train.lr"] == record.cell.train["lr"]
