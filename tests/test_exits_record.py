"""What a cell stores of its exits: chosen on validation data, reported on test data, made again from the traces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.data.task import task_data
from bench.errors import UserError
from bench.evaluate.record import BUDGETS, POINTS, exits_record
from bench.evaluate.trace import Trace
from bench.run.going import run_cell
from bench.store.records import Record
from bench.store.store import Store
from bench.study.load import study_from
from bench.study.plan import make_plan

RAW: dict[str, Any] = {
    "name": "tiny",
    "question": "?",
    "model": {"d_model": 16, "n_heads": 2, "n_blocks": 3, "n_cycles": 3},
    "train": {"steps": 40, "batch_size": 8, "lr": 3e-3, "eval_sequences": 8, "exit_loss": 1.0},
    "tasks": [{"name": "p_hop", "options": {"hops": 1, "length": 12, "n_train": 50, "n_valid": 60, "n_test": 80}}],
    "variants": ["ztt"],
    "seeds": 1,
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Record, Trace, Trace]:
    store = Store(Path(tmp_path_factory.mktemp("runs")))
    cell = make_plan(study_from(json.loads(json.dumps(RAW)), [], "tiny"), "", None).cells[0].cell
    record = run_cell(cell, store)
    valid, test = (
        Trace.from_bytes((store.folder(cell.id) / f"{name}.npz").read_bytes()) for name in ("trace_valid", "trace")
    )
    return cell, record, valid, test


def test_the_record_can_be_made_again_from_the_stored_traces(stored: Any) -> None:
    cell, record, valid, test = stored
    metric = task_data(cell.task, cell.task_options).metric
    assert record.exits == exits_record(valid, test, metric)
    assert len(valid.loss) == 60 and len(test.loss) == 80
    assert record.metrics["test_loss"] == test.leaving(3)["loss"]
    assert [point.cycles for point in record.exits.points] == [1, 2, 3]
    assert [point.valid for point in record.exits.points] == [valid.leaving(cycle) for cycle in (1, 2, 3)]
    assert record.valid_metrics == {f"valid_{name}": value for name, value in valid.leaving(3).items()}


def test_stored_curves_are_points_of_the_exact_ones(stored: Any) -> None:
    _, record, _, test = stored
    for key, rule in record.exits.rules.items():
        curve = rule.curve
        assert 2 <= len(curve["threshold"]) <= POINTS or len(test.curve(key)["threshold"]) == 1
        if key == "random":
            continue
        exact = test.curve(key)
        assert (curve["flops_per_token"][0], curve["flops_per_token"][-1]) == (
            exact["flops_per_token"][0],
            exact["flops_per_token"][-1],
        )
        for number, threshold in enumerate(curve["threshold"]):
            if threshold is not None:
                at = int(np.flatnonzero(exact["threshold"] == threshold)[0])
                assert curve["accuracy"][number] == exact["accuracy"][at]
                assert curve["mean_cycles"][number] == pytest.approx(
                    np.dot(curve["share"][number], [1, 2, 3]), abs=1e-5
                )


def test_thresholds_are_chosen_on_validation_data_within_their_budget(stored: Any) -> None:
    _, record, valid, test = stored
    full = valid.flops["fixed"][-1]
    for key, rule in record.exits.rules.items():
        assert bool(rule.tuned) == (not key.startswith(("oracle", "random")))
        for entry in rule.tuned:
            threshold = {"above": np.inf, "below": -np.inf}[rule.leave]
            threshold = entry.threshold if entry.threshold is not None else threshold
            assert entry.budget in BUDGETS
            assert entry.valid == pytest.approx(valid.score(key, threshold))
            assert entry.test == pytest.approx(test.score(key, threshold))
            exact = valid.curve(key)
            within = exact["flops_per_token"] <= entry.budget * full * (1 + 1e-9)
            assert entry.valid["accuracy"] == pytest.approx(exact["accuracy"][within].max())


def test_figures_of_merit(stored: Any) -> None:
    """The oracle is worth most, random nothing; a fixed number of cycles chooses nobody."""
    _, record, _, _ = stored
    rules = record.exits.rules
    assert rules["random"].area == pytest.approx(0, abs=1e-12) and rules["random"].gain == 0
    assert rules["fixed"].gain == pytest.approx(0, abs=1e-12)
    assert rules["oracle"].area >= max(rule.area for rule in rules.values()) - 1e-12
    assert rules["oracle"].area > 0.01


def test_cycles_beyond_training_are_scored_as_far_as_asked(stored: Any, tmp_path: Path) -> None:
    _, record, _, test = stored
    assert [entry.cycles for entry in record.cycles] == [1, 2, 3, 4, 5, 6]
    for number in (1, 2, 3):
        assert record.cycles[number - 1].loss == pytest.approx(test.leaving(number)["loss"], rel=1e-5)
    fewer = study_from(json.loads(json.dumps(RAW)), ["evaluation.max_cycles=4", "train.steps=2"], "tiny")
    cell = make_plan(fewer, "", None).cells[0].cell
    assert len(run_cell(cell, Store(tmp_path)).cycles) == 4
    with pytest.raises(UserError, match=r"evaluation\.max_cycles"):
        study_from(json.loads(json.dumps(RAW)), ["evaluation.max_cycles=0"], "tiny")
