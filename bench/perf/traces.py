"""What judging every exit rule costs: thresholds tried on a trace against the evaluation pass that recorded it."""

from __future__ import annotations

import time

import numpy as np
from rich.table import Table

from bench.config import ModelConfig
from bench.costs import build_model
from bench.evaluate import evaluate
from bench.exits.rules import all_rules
from bench.variant import get_variant

VOCAB, THRESHOLDS = 256, 1000


def trace_table(sequences: int, length: int) -> Table:
    """Seconds of a full-depth evaluation of ZTT with all signals recorded, of the exact curves of all rules, which hold
    every threshold there is, and of 1,000 thresholds of every rule scored one by one, as a sweep does that sets one for
    each exit point; and the ratios of both with the evaluation to the evaluation alone.
    """
    title = f"{THRESHOLDS:,} thresholds of every exit rule, {sequences} sequences of {length}"
    table = Table("d_model", "evaluation, s", "exact curves, s", "ratio", "one by one, s", "ratio", title=title)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCAB, (sequences, length))
    for d_model in (64, 128):
        model = ModelConfig(d_model=d_model, n_heads=4, n_blocks=4, n_cycles=4)
        lm = build_model(get_variant("ztt"), model, VOCAB, length)
        lm.reset_parameters(0)
        marks = [time.perf_counter()]
        trace = evaluate(lm, ids, ids, rules=all_rules())
        marks.append(time.perf_counter())
        for key in trace.rules:
            trace.curve(key)
        marks.append(time.perf_counter())
        for key, signal in trace.signals.items():
            for threshold in np.quantile(signal, np.linspace(0, 1, THRESHOLDS)):
                trace.score(key, float(threshold))
        marks.append(time.perf_counter())
        whole, curves, single = np.diff(marks)
        ratios = [f"{(whole + part) / whole:.3f}" for part in (curves, single)]
        table.add_row(str(d_model), f"{whole:.2f}", f"{curves:.2f}", ratios[0], f"{single:.2f}", ratios[1])
    return table
