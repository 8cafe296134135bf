"""What judging every exit rule costs: thresholds tried on a trace against the evaluation pass that recorded it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from bench.config import ModelConfig
from bench.evaluate.evaluation import evaluate
from bench.evaluate.rules import all_rules
from bench.model.language_model import build_model
from bench.model.variant import get_variant
from bench.perf.timing import VOCAB, Row, quartiles

TITLE = "thresholds of every exit rule: evaluation and judging them / the evaluation alone (ZTT, 4 blocks, 4 cycles)"
THRESHOLDS = 1000
MOST = 3


def rows(
    device: torch.device,
    rounds: int,
    widths: Sequence[int] = (64, 128),
    sequences: int = 1000,
    length: int = 128,
    thresholds: int = THRESHOLDS,
) -> list[Row]:
    """A row for each width and way: the exact curves of all rules, which hold every threshold there is; so many
    thresholds of every rule scored one by one, looked up there. ``naive_seconds``: evaluating anew for each of them.
    """
    rounds = min(rounds, MOST)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCAB, (sequences, length))
    found = []
    for d_model in widths:
        model = ModelConfig(d_model=d_model, n_heads=4, n_blocks=4, n_cycles=4)
        lm = build_model(get_variant("ztt"), model, VOCAB, length)
        lm.reset_parameters(0)
        lm.to(device)  # type: ignore[arg-type]
        parts = np.zeros((rounds, 3))
        for turn in range(rounds):
            marks = [time.perf_counter()]
            trace = evaluate(lm, ids, ids, rules=all_rules())
            marks.append(time.perf_counter())
            for key in trace.rules:
                trace.curve(key)
            marks.append(time.perf_counter())
            for key, signal in trace.signals.items():
                for threshold in np.quantile(signal, np.linspace(0, 1, thresholds)):
                    trace.score(key, float(threshold))
            marks.append(time.perf_counter())
            parts[turn] = np.diff(marks)
        whole, curves, single = parts.T
        tried = thresholds * len(trace.signals)
        for way, seconds in (("exact curves", curves), ("one by one", single)):
            row: Row = {"way": way, "d_model": d_model, "sequences": sequences, "thresholds": tried, "rounds": rounds}
            row["evaluation_seconds"] = float(np.median(whole))
            row["judging_seconds"] = float(np.median(seconds))
            row["naive_seconds"] = tried * float(np.median(whole))
            found.append(row | quartiles(1 + seconds / whole))
    return found
