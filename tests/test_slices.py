"""Further tests and slices in a cell's record, counted again from the saved model by a plain forward pass."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.config import Cell
from bench.data.batches import arrays
from bench.data.task import task_data
from bench.model.costs import count
from bench.model.language_model import CycleForCausalLM
from bench.run.going import run_cell
from bench.store.store import Store
from bench.study.load import study_from
from bench.study.plan import make_plan

TASKS: dict[str, dict[str, Any]] = {
    "addition": {"n_train": 50, "n_valid": 10, "n_test": 90, "test_numbers": [7]},
    "mqar": {"n_train": 50, "n_valid": 10, "n_test": 70, "pairs": [2, 4], "length": 16, "vocabulary": 64}
    | {"test_shapes": [[16, 1], [32, 8]]},
    "state_tracking": {"n_train": 50, "n_valid": 10, "n_test": 70, "group": "parity", "length": 12}
    | {"test_lengths": [30]},
}


def cell(task: str, family: str) -> Cell:
    raw = {
        "name": "tiny",
        "question": "Is it sliced?",
        "model": {"family": family, "d_model": 16, "n_heads": 2, "n_blocks": 3, "n_cycles": 2},
        "train": {"steps": 8, "batch_size": 8, "eval_sequences": 8, "lr": 0.01},
        "tasks": [{"name": task, "options": TASKS[task]}],
        "variants": ["ztt"],
        "seeds": 1,
    }
    return make_plan(study_from(raw, [], "tiny"), "", None).cells[0].cell


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.long
def test_metrics_and_slices_are_those_of_the_saved_model(task: str, family: str, tmp_path: Path) -> None:
    planned, store = cell(task, family), Store(tmp_path)
    record = run_cell(planned, store)
    data = task_data(planned.task, planned.task_options)
    lm = CycleForCausalLM.from_pretrained(store.folder(planned.id) / "model").eval()
    assert record.costs.params == count(lm.parameters())
    assert record.costs.length == data.length < data.max_length == lm.config.max_position_embeddings
    if family == "gpt2":
        assert lm.positions is not None and lm.positions.num_embeddings == data.max_length
    metrics, slices = {}, {}
    for name, split in {"": data.test, **data.tests}.items():
        suffix = f"@{name}" if name else ""
        ids, targets = (torch.from_numpy(column) for column in arrays(split))
        with torch.no_grad():
            right = lm(ids).logits.argmax(-1) == targets
        metrics[f"test_accuracy{suffix}"] = float(right.sum() / (targets != -100).sum())
        for axis in set(split.column_names) - {"input_ids", "targets"}:
            of: dict[str, list[int]] = defaultdict(list)
            for at, label in enumerate(split[axis]):
                of[label].append(at)
            slices[f"{axis}{suffix}"] = {
                label: {
                    "accuracy": pytest.approx(float(right[at].sum() / (targets[at] != -100).sum())),
                    "exact_match": pytest.approx(float((right | (targets == -100))[at].all(1).double().mean())),
                    "n": len(at),
                }
                for label, at in of.items()
            }
    found = {name: value for name, value in record.metrics.items() if name.startswith("test_accuracy")}
    assert found == {name: pytest.approx(value) for name, value in metrics.items()}
    assert record.dump()["slices"] == slices
    expected = {
        "addition": ({"numbers": ["2", "3", "4"], "numbers@7": ["7"]}, ["7"]),
        "mqar": ({"pairs": ["2", "4"], "pairs@16x1": ["1"], "pairs@32x8": ["8"]}, ["16x1", "32x8"]),
        "state_tracking": ({}, ["30"]),
    }
    labels, further = expected[task]
    assert {axis: list(found) for axis, found in record.slices.items()} == labels
    assert list(data.tests) == further and {f"test_loss@{name}" for name in further} <= record.metrics.keys()


def test_a_task_without_further_tests_has_the_positions_it_trains_on() -> None:
    data = task_data("recall", {"length": 16, "n_train": 20, "n_valid": 5, "n_test": 5})
    assert data.max_length == data.length == 16 and data.tests == {}
