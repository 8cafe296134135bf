"""Pictures of the test data by the cycle that they leave after, as a record keeps them for its report."""

from __future__ import annotations

import base64
import math

import numpy as np
import torch
from torch.nn.functional import pixel_shuffle

from bench.data.batches import arrays
from bench.data.task import TaskData
from bench.evaluate.trace import Trace
from bench.store.records import Example, ExitsRecord

RULES = ("zero_attention", "halting", "confidence")  # the first that a model has decides who leaves
BUDGET = 0.8  # share of the FLOPs at full depth that its threshold is tuned for
SHOWN = 12  # pictures of a cycle


def examples(data: TaskData, trace: Trace, exits: ExitsRecord) -> list[Example] | None:
    """The first test pictures that leave after every cycle, and whether they are told right there; None where the data
    are no square pictures, or no threshold keeps the budget.
    """
    patch = data.form.patch
    key = next((rule for rule in RULES if rule in exits.rules), None)
    tuned = [] if patch is None or key is None else exits.rules[key].tuned
    point = next((point for point in tuned if point.budget == BUDGET), None)
    if patch is None or key is None or point is None or point.threshold is None:
        return None
    left, test = trace.leave(key, point.threshold), data.test
    names = test["class"] if "class" in test.column_names else [""] * len(test)
    chosen = [row for cycle in range(1, trace.n_cycles + 1) for row in np.flatnonzero(left == cycle)[:SHOWN].tolist()]
    vectors = torch.from_numpy(arrays(test)[0][chosen])
    if data.form.judged == "last":  # a class token stands behind them
        vectors = vectors[:, :-1, :-1]
    side = math.isqrt(vectors.shape[1])
    if side * side != vectors.shape[1]:  # no square: how wide it is, nobody says
        return None
    pictures = pixel_shuffle(vectors.transpose(1, 2).unflatten(2, (side, -1)), patch)
    low, high = pictures.min(), pictures.max()
    pixels = ((pictures - low) / (high - low).clamp_min(1e-9) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [
        Example(
            rule=key,
            cycle=int(left[row]),
            label=str(names[row]),
            right=bool(trace.correct[row, left[row] - 1]),
            shape=list(picture.shape),
            pixels=base64.b64encode(picture.contiguous().numpy().tobytes()).decode(),
        )
        for row, picture in zip(chosen, pixels, strict=True)
    ]
