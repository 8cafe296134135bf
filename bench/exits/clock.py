"""What leaving early saves by the clock, beside what it saves in FLOPs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.exits.execute import Granularity, execute
from bench.model.language_model import CycleModel
from bench.store.records import ExecutionRow


def measure_exits(
    lm: CycleModel,
    ids: NDArray[Any],
    targets: NDArray[np.int64],
    rule: str,
    threshold: float,
    rounds: int,
    granularity: Granularity = "sequence",
) -> ExecutionRow:
    """What exits save on test data: with them and without, in turns.

    ``mean_cycles`` is that of the sequences or of the tokens. ``flops_saved`` and ``time_saved`` are shares of what the
    full depth takes; the latter is the median over the pairs, with its quartiles.

    Args:
        lm: in evaluation mode.
        ids: sequences [N, T].
        targets: of their positions [N, T].
        rule: the exit rule's key.
        threshold: of its signal.
        rounds: pairs of passes.
        granularity: what leaves.
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
    return ExecutionRow(
        rule=rule,
        granularity=granularity,
        threshold=threshold,
        loss=done.scores["loss"],
        accuracy=done.scores["accuracy"],
        mean_cycles=done.scores["mean_cycles"],
        flops_per_token=executed,
        flops_saved=1 - executed / full,
        time_saved=float(middle),
        time_saved_quartiles=[float(low), float(high)],
        rounds=rounds,
    )
