"""Whether a training step's time grows as its FLOPs say: over depth, cycles, length and zero tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from bench.config import ModelConfig
from bench.model.costs import training_flops
from bench.model.language_model import CycleModel, build_model
from bench.model.variant import get_variant
from bench.perf.timing import VOCAB, Row, in_turns, quartiles, training_step

TITLE = "a ZTT training step's time over its FLOPs, relative to the first value (1: it grows as the FLOPs say)"
VALUES: dict[str, Sequence[int]] = {
    "depth": (4, 8, 16),
    "cycles": (1, 2, 4, 8),
    "length": (64, 128, 256, 512),
    "zero tokens": (1, 4, 16, 64),
    "routed pool": (2, 16, 128, 1024),
}


def rows(
    device: torch.device,
    rounds: int,
    values: dict[str, Sequence[int]] = VALUES,
    d_model: int = 128,
    batch: int = 4,
    length: int = 128,
) -> list[Row]:
    """A row for each value of each parameter, the others at 4 blocks, 2 cycles and one zero token a step; all values of
    a parameter take turns. Depth: blocks, of which all but two run in each of the 2 cycles; zero tokens: pool entries
    that a step attends to; routed pool: entries that it chooses from.
    """
    found = []
    for parameter, chosen in values.items():
        sides = [(value, *side) for value in chosen for side in _models(parameter, value, d_model, length)]
        batches = [max(1, batch * max(chosen) // tokens) if parameter == "length" else batch for *_, tokens in sides]
        shapes = [(lm.to(device), VOCAB, many, tokens) for many, (_, lm, tokens) in zip(batches, sides, strict=True)]  # type: ignore[arg-type]
        steps = [training_step(*shape) for shape in shapes]
        flops = np.array([many * training_flops(lm, tokens) for lm, _, many, tokens in shapes])
        seconds = in_turns(steps, rounds)
        relative = seconds / flops
        relative /= relative[:, :1]
        for place, (value, _, _) in enumerate(sides):
            row = {"parameter": parameter, "value": value, "flops": int(flops[place])}
            row["seconds"] = float(np.median(seconds[:, place]))
            found.append(row | {"rounds": rounds} | quartiles(relative[:, place]))
    return found


def _models(parameter: str, value: int, d_model: int, length: int) -> Iterator[tuple[CycleModel, int]]:
    """The model with the parameter at the value, and the length of its sequences."""
    options: dict[str, Any] = {}
    if parameter == "zero tokens":
        options = {"zero_tokens": value}
    elif parameter == "routed pool":
        options = {"lookup": "routed", "pool_size": value}
    shape = {"n_blocks": value} if parameter == "depth" else {"n_cycles": value} if parameter == "cycles" else {}
    model = ModelConfig(**{"d_model": d_model, "n_heads": max(2, d_model // 64), "n_blocks": 4, "n_cycles": 2, **shape})
    tokens = value if parameter == "length" else length
    lm = build_model(get_variant("ztt", options), model, VOCAB, tokens)
    lm.reset_parameters(0)
    yield lm, tokens
