"""Accuracy on parts of the test data: by slice of a test split, and on further test splits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bench.data.batches import arrays
from bench.data.task import COLUMNS, TaskData
from bench.evaluate.evaluation import evaluate
from bench.evaluate.trace import Trace
from bench.model.network import Network

if TYPE_CHECKING:
    from datasets import Dataset


def further_scores(lm: Network, data: TaskData, test: Trace) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics and slices at full depth. test: the trace of the test split, which is not scored again.

    Metrics: loss and accuracy on every further test split, as ``test_accuracy@NAME``. Slices: by axis of the test
    split, and as ``AXIS@NAME`` by axis of a further one, what ``by_slice`` gives.
    """
    metrics: dict[str, float] = {}
    slices = by_slice(data.test, test)
    for name, split in data.tests.items():
        trace = evaluate(lm, *arrays(split))
        metrics |= {f"test_{key}@{name}": value for key, value in trace.leaving(1).items()}
        slices |= {f"{axis}@{name}": found for axis, found in by_slice(split, trace).items()}
    return metrics, slices


def by_slice(split: Dataset, trace: Trace) -> dict[str, dict[str, dict[str, float]]]:
    """By axis and label: accuracy (micro, over scored targets), exact_match (share of sequences with every scored
    target right) and n (sequences), at full depth.
    """
    correct, scored, found = trace.correct[:, -1], trace.scored, {}
    for axis in split.column_names:
        if axis in COLUMNS:
            continue
        labels = np.array(split.data.column(axis).to_pylist())
        found[axis] = {
            str(label): {
                "accuracy": float(correct[chosen].sum() / scored[chosen].sum()),
                "exact_match": float((correct[chosen] == scored[chosen]).mean()),
                "n": int(chosen.sum()),
            }
            for label in sorted(set(labels.tolist()), key=lambda label: (len(label), label))  # 2 before 16
            for chosen in [labels == label]
        }
    return found
