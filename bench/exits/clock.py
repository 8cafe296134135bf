"""What leaving early saves by the clock, beside what it saves in FLOPs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.data.batches import arrays
from bench.errors import UserError
from bench.exits.execute import Granularity, execute
from bench.exits.rules import get_rule
from bench.model import CycleForCausalLM
from bench.store import Store
from bench.study import load_study
from bench.train import repeatable


def measure(
    lm: CycleForCausalLM,
    ids: NDArray[np.int64],
    targets: NDArray[np.int64],
    rule: str,
    threshold: float,
    rounds: int,
    granularity: Granularity = "sequence",
) -> dict[str, Any]:
    """Sequences [N, T] with exits and without, in turns, ``rounds`` times; granularity: what leaves.

    ``mean_cycles`` is that of the sequences or of the tokens. ``flops_saved`` and ``time_saved`` are shares of what the
    full depth takes; the latter is the median over the pairs, with its quartiles.
    """
    execute(
        lm, ids[:1], targets[:1], rule, threshold, granularity=granularity
    )  # it pays for what later ones find ready
    saved, found = [], {}
    for turn in range(rounds):
        for key in (rule, None) if turn % 2 else (None, rule):
            found[key] = execute(lm, ids, targets, key, threshold, granularity=granularity)
        saved.append(1 - found[rule].seconds / found[None].seconds)
    done = found[rule]
    low, middle, high = np.quantile(saved, (0.25, 0.5, 0.75))
    executed, full = (float(found[key].flops.mean()) / ids.shape[1] for key in (rule, None))
    return {
        "rule": rule,
        "granularity": granularity,
        "threshold": threshold,
        **done.scores,
        "flops_per_token": executed,
        "flops_saved": 1 - executed / full,
        "time_saved": float(middle),
        "time_saved_quartiles": [float(low), float(high)],
        "rounds": rounds,
    }


def execute_study(
    study: str, rule: str, thresholds: list[float] | None, rounds: int, runs: Path, granularity: Granularity
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure the cells of a study's last run that have exits and the rule, and store what is found beside their
    results; a label and a row at a time.

    thresholds: by default those tuned on the cell's validation data, where whole sequences leave. Raises UserError if
    the study has not been run.
    """
    from bench.config import Cell
    from bench.plan import task_data

    get_rule(rule)
    store, name = Store(runs), load_study(study).name
    manifest = store.manifest(name)
    if manifest is None:
        raise UserError(f"study {name!r} has not been run: {runs} holds no record of it (run: cyclebench run {study})")
    for planned in manifest["cells"]:
        record = store.record(planned["id"])
        if record is None or record["status"] != "done" or not record["exits"]:
            continue
        known = record["exits"]["rules"].get(rule)
        if known is None:
            continue
        tuned = [entry["threshold"] for entry in known["tuned"] if entry["threshold"] is not None]
        cell = Cell.model_validate(record["cell"])
        data = task_data(cell.task, cell.task_options)
        rows = []
        with repeatable(cell.seed, cell.train.threads):
            lm = CycleForCausalLM.from_pretrained(store.folder(cell.id) / "model").eval()
            for threshold in thresholds or sorted(set(tuned)):
                rows.append(measure(lm, *arrays(data.test), rule, threshold, rounds, granularity))
                yield f"{planned['variant']}, {planned['task']}, seed {planned['seed']}", rows[-1]
        store.write_execution(cell.id, rule if granularity == "sequence" else f"{rule} by {granularity}", rows)
