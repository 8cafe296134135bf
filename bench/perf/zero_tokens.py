"""What the zero token and its gate cost a training step, in pairs with the same schedule without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from bench.config import ModelConfig
from bench.model.costs import training_flops
from bench.model.language_model import build_model
from bench.model.variant import get_variant
from bench.perf.timing import VOCAB, Precision, Row, in_turns, quartiles, training_step

TITLE = "a training step of ZTT / HTC (4 blocks, 2 cycles): time, and FLOPs (above 1: the zero token costs that much)"
WIDTHS = (128, 256, 384)
GATINGS = ("attention", "none")


def rows(
    device: torch.device,
    rounds: int,
    widths: Sequence[int] = WIDTHS,
    batch: int = 4,
    length: int = 256,
    gatings: Sequence[str] = GATINGS,
    precision: Precision = "float32",
    graph: bool = False,
) -> list[Row]:
    """A row for each width and gating; ZTT with each gating and HTC take turns. graph: all of them as CUDA graphs."""
    found = []
    for d_model in widths:
        model = ModelConfig(d_model=d_model, n_heads=max(2, d_model // 64), n_blocks=4, n_cycles=2)
        options: list[tuple[str, dict[str, Any]]] = [("ztt", {"gating": gating}) for gating in gatings]
        sides = [build_model(get_variant(*side), model, VOCAB, length) for side in [*options, ("htc", {})]]
        for lm in sides:
            lm.reset_parameters(0)
            lm.to(device)  # type: ignore[arg-type]
        steps = [training_step(lm, VOCAB, batch, length, graph=graph, precision=precision) for lm in sides]
        seconds = in_turns(steps, rounds)
        flops = [training_flops(lm, length) for lm in sides]
        for place, gating in enumerate(gatings):
            row: Row = {"gating": gating, "d_model": d_model, "batch": batch, "length": length}
            row |= {"mode": "graph" if graph else "eager"}
            row["seconds"] = float(np.median(seconds[:, place]))
            row["flops_ratio"] = flops[place] / flops[-1]
            found.append(row | {"rounds": rounds} | quartiles(seconds[:, place] / seconds[:, -1]))
    return found
