"""What a variant costs beside what it gives, both against the reference."""

from __future__ import annotations

import math
from statistics import fmean

from bench.store.manifest import Manifest
from bench.store.records import Outcome, Record
from reports.policy import Rows
from reports.table import Row, done, mean_costs

COSTS = {  # columns, and the field of a record's costs
    "parameters": "params",
    "FLOPs/token": "forward_flops_per_token",
    "activations": "activation_bytes",
    "KV cache": "kv_bytes_per_token",
}


def worth(manifest: Manifest, results: dict[str, Outcome], differences: Rows) -> Rows:
    """A row for each of ``differences`` on a task of the study: the variant's costs over the reference's and the time
    a training token takes over that of the same seed's reference, beside the difference in the metric.

    differences: rows of ``reports.verdicts.differences``.
    """
    found: list[Row] = []
    tasks = {task.label for task in manifest.tasks}
    for row in differences:
        if row["task"] not in tasks:
            continue
        ours, theirs = (done(manifest, results, row[side], row["task"]) for side in ("variant", "reference"))
        if not ours or not theirs:
            continue
        cost, its = mean_costs(ours), mean_costs(theirs)
        costs = {name: _times(getattr(cost, field), getattr(its, field)) for name, field in COSTS.items()}
        gave = {key: value for key, value in row.items() if key not in ("reference", *LEFT_OUT)}
        gave["reading"] = gave["reading"].split("; ")[0]
        place = {key: gave.pop(key) for key in ("task", "variant")}
        found.append({**place, **costs, "time/token": _time(ours, theirs), **gave})
    return Rows(found, differences.ends)


LEFT_OUT = ("p", "pairs", "Hedges g", "detectable")  # columns of differences that stand there


def _times(ours: float, theirs: float) -> str:
    return f"x {ours / theirs:.3f}" if theirs else "-"


def _time(ours: list[Record], theirs: list[Record]) -> str:
    """The geometric mean over seeds of how many times as long a token of training took; "-" where one of a pair was
    computed in a stack, whose time its cells share.
    """
    speeds = {(record.cell.seed, record.stacked): record.timing.tokens_per_second for record in theirs}
    ratios = [
        math.log(speeds[key] / record.timing.tokens_per_second)
        for record in ours
        if (key := (record.cell.seed, record.stacked)) in speeds and record.timing.tokens_per_second > 0
    ]
    return f"x {math.exp(fmean(ratios)):.2f}" if ratios else "-"
