"""Sweeps: what is searched, what is chosen, and that it is chosen on validation data, once, and never twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState, create_trial
from records import RESULTS, TASKS

from bench.errors import UserError
from bench.evaluate.trace import Trace
from bench.store.manifest import SweepResult
from bench.store.store import Store
from bench.store.tracking import MlflowTracker
from bench.store.versions import left_by
from bench.study.load import study_from
from bench.study.sweep import BudgetSweep, Sweep, ThresholdSweep
from bench.sweep import budgets, storage, thresholds
from bench.sweep import run as sweep_run
from bench.sweep.run import run_sweep
from bench.sweep.storage import default_url, open_storage, open_trials, shown_url
from reports.sweeps import findings

IDS = ("a" * 64, "b" * 64)


def trace(seed: int, n: int = 60) -> Trace:
    """Sequences whose signal knows something of whether later cycles help."""
    rng = np.random.default_rng(seed)
    correct = np.sort(rng.integers(0, 2, (n, 4)), axis=1).astype(float)
    signals = {
        "confidence": (0.5 * correct + rng.random((n, 4))).astype(np.float32),
        "entropy": (rng.random((n, 4)) - correct).astype(np.float32),
    }
    flops = {"fixed": 100 * np.arange(1.0, 5), "random": 100 * np.arange(1.0, 5)}
    flops |= {name: 110 * np.arange(1.0, 5) for name in signals}
    return Trace(1 - correct + rng.random((n, 4)), correct, np.ones(n), np.array([np.nan]), signals, flops)


def stored(root: Path, seed: int = 0) -> Store:
    store = Store(root)
    found = next(record for record in RESULTS.values() if record.status == "done")
    for number, id in enumerate(IDS):
        folder = store.folder(id)
        folder.mkdir(parents=True)
        (folder / "trace_valid.npz").write_bytes(trace(number).to_bytes())
        (folder / "trace.npz").write_bytes(trace(100 + seed + number).to_bytes())
        store.write_result(id, found.but(id=id, files=left_by(folder)))
    return store


def job(root: Path, trials: int = 40, rule: str = "confidence", **changes: Any) -> thresholds.ThresholdJob:
    spec = ThresholdSweep(trials=trials, per_cycle=changes.pop("per_cycle", True))
    fields: dict[str, Any] = {"name": "s", "variant": "htc", "task": "p_hop", "rule": rule, "ids": IDS, "spec": spec}
    fields |= {"metric": "accuracy", "higher_is_better": True, "max_flops": None, "seed": 0, "root": root}
    return thresholds.ThresholdJob(**{**fields, "url": default_url(root), **changes})


@pytest.mark.parametrize("rule", ["confidence", "entropy"])
@pytest.mark.parametrize("per_cycle", [False, True])
def test_a_share_of_the_signals_is_what_leaves(rule: str, per_cycle: bool) -> None:
    here = trace(3)
    levels = thresholds.Levels(here, rule, per_cycle)
    signal = here.signals[rule][:, :-1]
    for shares in ([0.0], [0.25], [1.0]) if not per_cycle else ([0.0, 0.5, 1.0], [0.1, 0.2, 0.0]):
        threshold = levels.threshold(np.array(shares))
        leaves = signal >= threshold if rule == "confidence" else signal <= threshold
        found = leaves.mean(0) if per_cycle else [leaves.mean()]
        np.testing.assert_allclose(found, shares, atol=0.5 / len(levels.ordered))
    assert (here.leave(rule, levels.threshold(np.zeros(3 if per_cycle else 1))) == 4).all()


def test_thresholds_are_chosen_on_validation_and_reported_on_test(tmp_path: Path) -> None:
    row = thresholds.search(job(stored(tmp_path / "one").root))
    other = thresholds.search(job(stored(tmp_path / "two", seed=50).root, name="t"))
    assert row.trials == 40 and row.tuned and row.full_flops_per_token == 400
    for mine, theirs in zip(row.tuned, other.tuned, strict=True):
        assert mine.thresholds == theirs.thresholds and mine.valid == theirs.valid
        assert mine.valid["flops_per_token"] <= mine.max_flops * (1 + 1e-9)
        for split, shift in (("valid", 0), ("test", 100)):
            scores = [
                trace(shift + number).score("confidence", np.array([np.inf if v is None else v for v in threshold]))
                for number, threshold in enumerate(mine.thresholds)
            ]
            assert getattr(mine, split)["accuracy"] == pytest.approx(np.mean([score["accuracy"] for score in scores]))
            assert getattr(mine, split)["flops_per_token"] == pytest.approx(
                np.mean([s["flops_per_token"] for s in scores])
            )
    assert row.tuned[0].test != other.tuned[0].test
    best = [point.valid["accuracy"] for point in row.tuned]
    assert best == sorted(best)
    front = np.array(row.front)
    assert (np.diff(front[:, 1]) > 0).all() and (np.diff(front[:, 0]) > 0).all()


def test_a_search_goes_on_to_the_number_asked_for(tmp_path: Path) -> None:
    stored(tmp_path)
    assert thresholds.search(job(tmp_path, trials=10)).trials == 10
    again = thresholds.search(job(tmp_path, trials=10))
    more = thresholds.search(job(tmp_path, trials=25))
    assert (again.trials, more.trials) == (10, 25)
    study = optuna.load_study(study_name="s", storage=default_url(tmp_path))
    params = [tuple(trial.params.values()) for trial in study.trials]
    assert len(params) == 25 and len(set(params)) > 20, "the resumed search asked for what it had"


def test_a_limit_of_flops_is_kept(tmp_path: Path) -> None:
    stored(tmp_path)
    row = thresholds.search(job(tmp_path, max_flops=230.0, rule="entropy", per_cycle=False))
    (point,) = row.tuned
    assert point.max_flops == 230 and point.valid["flops_per_token"] <= 230
    assert all(flops <= 230 for _, flops in row.front)
    for number, threshold in enumerate(point.thresholds):
        score = trace(number).score("entropy", -np.inf if threshold[0] is None else threshold[0])
        curve = trace(number).curve("entropy")
        at = np.flatnonzero(np.isclose(curve["flops_per_token"], score["flops_per_token"]))
        assert np.isclose(curve["accuracy"][at], score["accuracy"]).any(), "a point of the exact curve"


def test_a_limit_that_no_threshold_keeps_is_told(tmp_path: Path) -> None:
    stored(tmp_path)
    rows = [thresholds.search(job(tmp_path, trials=4, max_flops=most, rule="entropy")) for most in (230.0, 1.0)]
    assert rows[0].tuned and not rows[1].tuned
    about: dict[str, Any] = {"study": "s", "question": "?", "storage": "", "command": "c", "git": None, "budgets": []}
    about |= {"tasks": [TASKS[0].but(label=rows[0].task)], "environment": []}
    told = [
        findings(SweepResult(**about, max_flops=most, thresholds=[row]))
        for row, most in zip(rows, (230.0, 1.0), strict=True)
    ]
    assert told[1] == [f"{rows[1].task}, {rows[1].variant}: no threshold of entropy keeps within 1 FLOPs/token."]
    assert not any("no threshold" in line for line in told[0])


def finished(study: optuna.Study, flops: float, losses: list[float]) -> None:
    curve = [[(n + 1) / len(losses), loss] for n, loss in enumerate(losses)]
    study.add_trial(create_trial(values=[0.5, flops], user_attrs={"flops_per_token": flops, "curve": curve}))


def test_a_trial_is_stopped_by_the_median_of_rivals_that_are_no_dearer() -> None:
    study = optuna.create_study(directions=["maximize", "minimize"])
    for flops in (100.0, 110.0, 120.0):
        finished(study, flops, [3.0, 2.0, 1.0, 0.5])
    assert not budgets.behind(study, 0.75, 9.0, 200.0), "three rivals are too few to be judged by"
    finished(study, 130.0, [3.0, 2.0, 1.0, 0.5])
    assert budgets.behind(study, 0.75, 1.1, 200.0)
    assert budgets.behind(study, 0.75, 1.1, 130.0)
    assert not budgets.behind(study, 0.75, 0.9, 200.0)
    assert not budgets.behind(study, 0.75, 9.0, 125.0), "only three are as cheap: it may be on the front by its price"
    assert not budgets.behind(study, 0.1, 9.0, 200.0), "too early"
    assert budgets.behind(study, 0.625, 1.6, 200.0) and not budgets.behind(study, 0.625, 1.4, 200.0)


RAW: dict[str, Any] = {
    "name": "small",
    "question": "?",
    "model": {"d_model": 16, "n_heads": 2, "n_blocks": 3, "n_cycles": 2},
    "train": {"steps": 10, "batch_size": 4},
    "tasks": [
        {"name": "p_hop", "options": {"hops": [1], "length": 8, "n_train": 64, "n_valid": 32, "n_test": 32}},
    ],
    "variants": ["htc"],
    "seeds": 1,
}


def budget_job(root: Path, trials: int, max_flops: float | None = None, **spec: Any) -> budgets.BudgetJob:
    ranges: Any = {"model.n_cycles": {"low": 1, "high": 4}, "train.steps": [5, 10], "options.lookup": ["step"]}
    found = BudgetSweep.model_validate({"trials": trials, "ranges": ranges, **spec})
    url = default_url(root)
    return budgets.BudgetJob("b", "k", study_from(dict(RAW), (), "x"), "accuracy", True, found, max_flops, 0, root, url)


def test_budget_trials_are_cells_and_go_on(tmp_path: Path) -> None:
    events: list[str] = []
    small = budget_job(tmp_path, 2)
    budgets.run_trials(small, lambda kind, _: events.append(kind))
    assert events.count("finish") == 2
    budgets.run_trials(small, lambda kind, _: events.append("again"))
    assert "again" not in events
    budgets.run_trials(budget_job(tmp_path, 4), lambda kind, _: events.append(kind))
    row = budgets.row(small)
    assert row.trials == 4 and len(row.cells) + row.pruned == 4
    store = Store(tmp_path)
    for point in row.front:
        record = store.record(point.id)
        assert record is not None and record.cell.seed == 1_000_000
        assert record.cell.model["n_cycles"] == point.params["model.n_cycles"]
        assert record.costs.forward_flops_per_token == point.flops_per_token
        assert record.metrics["test_accuracy"] == point.test
        assert budgets.valid_score(store, point.id)["accuracy"] == point.valid
    assert "options.lookup" not in row.front[0].params, "cycling without zero tokens has no lookup"
    assert row.chosen.valid == max(point.valid for point in row.front)


def test_what_a_search_has_no_use_for_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its trials have one variant on one task: nothing that a hypothesis compares."""
    claim = {"claim": "c", "better": "ztt", "than": "htc", "task": "p_hop", "metric": "area"}
    starts = {"name": "ztt", "label": "later", "init": "cell:ztt"}
    ranges = {"trials": 1, "ranges": {"train.steps": [4]}, "prune": False}
    raw = {**RAW, "variants": ["htc", "ztt", starts], "hypotheses": [claim], "sweep": {"budgets": ranges}}
    store, url = Store(tmp_path), default_url(tmp_path)
    study = study_from(raw, (), "x")
    _, jobs = sweep_run._budget_jobs(study, store, url, "", None)
    assert [job.entry.label for job in jobs] == ["htc", "ztt"]
    assert "later is left out of the search of budgets: init = 'cell:ztt'" in capsys.readouterr().err
    budgets.run_trials(jobs[0], lambda *_: None)
    assert budgets.lost(jobs[0]) == []
    (id,) = budgets.row(jobs[0]).cells
    (store.folder(id) / "result.json").unlink()
    (planned,) = budgets.lost(jobs[0])
    assert planned.cell.id == id
    with pytest.raises(UserError, match=r"trial 0 of .* has no result in"):
        budgets.row(jobs[0])


@pytest.mark.long
def test_what_is_over_the_limit_is_not_trained_and_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = budget_job(tmp_path, 2, ranges={"model.n_cycles": [1, 2], "train.steps": [5]})
    costs = [budgets.forward_flops(budgets.planned_at(full, {"model.n_cycles": n})) for n in (1, 2)]
    limited = replace(full, max_flops=(costs[0] + costs[1]) / 2)
    budgets.run_trials(limited, lambda *_: None)
    row = budgets.row(limited)
    assert row.trials == 2 and all(point.params["model.n_cycles"] == 1 for point in row.front)
    study = optuna.load_study(study_name="b", storage=limited.url)
    for trial in study.trials:
        assert ("refused" in trial.user_attrs) == (trial.params["model.n_cycles"] > 1)
        assert Store(tmp_path).done(trial.user_attrs["cell"]) == (trial.state == TrialState.COMPLETE)
    monkeypatch.setattr(storage, "TRIED", 5)  # not fifty trials
    with pytest.raises(UserError, match=r"nearly all are refused, the last: .* max_flops"):
        budgets.run_trials(
            replace(full, name="none", max_flops=1.0, spec=full.spec.model_copy(update={"trials": 1})), lambda *_: None
        )


def test_a_pruned_trial_leaves_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "behind", lambda study, share, loss, flops: share > 0.4)
    small = budget_job(tmp_path, 1)
    budgets.run_trials(small, lambda *_: None)
    found = optuna.load_study(study_name="b", storage=small.url)
    (trial,) = found.trials
    assert found.metric_names == [small.metric.replace("_", " "), "executed FLOPs per token"]
    assert trial.state == TrialState.PRUNED and "pruned at" in trial.user_attrs["reason"]
    assert not Store(tmp_path).done(trial.user_attrs["cell"])
    row = budgets.row(small)
    assert (row.trials, row.pruned, row.front, row.chosen) == (1, 1, [], None)


def test_trials_of_dead_processes_and_surplus_ones_do_not_count(tmp_path: Path) -> None:
    study = open_trials(open_storage(default_url(tmp_path)), "s", "accuracy", True)
    stored(tmp_path)
    study.add_trial(create_trial(state=TrialState.FAIL))
    assert thresholds.search(job(tmp_path, trials=5)).trials == 5
    assert len(study.get_trials()) == 6


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({}, "needs thresholds, budgets or both"),
        ({"thresholds": {"trails": 3}}, "did you mean 'trials'"),
        ({"budgets": {"ranges": {"model.d_modle": [1]}}}, "unknown key of model 'd_modle'; did you mean 'd_model'"),
        ({"budgets": {"ranges": {"train.stepz": [1]}}}, "unknown key of train 'stepz'; did you mean 'steps'"),
        (
            {"budgets": {"ranges": {"model.flops": ["full", "executed"]}}},
            "'model.flops' must be the same for all cells",
        ),
        ({"budgets": {"ranges": {"train.device": ["cpu"]}}}, "'train.device' must be the same for all cells"),
        ({"budgets": {"ranges": {"d_model": [1]}}}, "must be model.NAME, train.NAME or options.NAME"),
        ({"budgets": {"ranges": {"model.d_model": {"low": 9, "high": 3}}}}, "low = 9 must not be above high = 3"),
        ({"budgets": {"ranges": {"train.lr": [1e-3]}, "seed": 0}}, "none of the seeds that are reported"),
    ],
)
def test_mistakes_in_a_sweep_are_told(sweep: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        study_from({**RAW, "sweep": sweep}, (), "x")
    assert "\n" not in str(caught.value)


def test_mistakes_of_a_command_are_told(tmp_path: Path) -> None:
    store, tracker = Store(tmp_path), MlflowTracker("sqlite:////dev/null/x.db", Store(tmp_path))
    study = study_from(dict(RAW), (), "x")
    with pytest.raises(UserError, match="has no sweep"):
        run_sweep(study, store, default_url(tmp_path), 1, tracker, "", None)
    swept = study.model_copy(update={"sweep": Sweep(thresholds=ThresholdSweep())})
    with pytest.raises(UserError, match=r"no trained cells to sweep .run: cyclebench run small"):
        run_sweep(swept, store, default_url(tmp_path), 1, tracker, "", None)
    with pytest.raises(UserError, match="--storage: 'mysterious://x' cannot be used"):
        run_sweep(swept, store, "mysterious://x", 1, tracker, "", None)
    assert shown_url("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"
    with pytest.raises(UserError, match="unknown exit rule 'confidense'; did you mean 'confidence'"):
        thresholds.tunable(trace(0), ("confidense",))
    assert thresholds.tunable(trace(0), ("zero_attention", "entropy")) == ["entropy"]


def test_ranges_of_cycles_mean_nothing_to_a_stack() -> None:
    entry = study_from({**RAW, "variants": ["vanilla"]}, (), "x").variants[0]
    for field, values in (("n_cycles", [1, 2]), ("kv", ["own", "first"]), ("halting", ["none", "gate"])):
        ranges = {f"model.{field}": values}
        with pytest.raises(UserError, match=rf"none of model.{field} means anything to 'vanilla'"):
            budgets.space(entry, BudgetSweep.model_validate({"trials": 1, "ranges": ranges}))
