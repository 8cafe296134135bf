"""Early exits in generation: how much of the time that the skipped cycles take is really saved."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from bench.config import ModelConfig
from bench.exits.generation import EarlyExit, Policy
from bench.model.costs import step_flops
from bench.model.language_model import CycleModel, build_model
from bench.model.variant import get_variant
from bench.perf.timing import VOCAB, Row, quartiles, random_tokens, wait

TITLE = "generation with exits (HTC, 6 blocks, 6 cycles): time saved / time the skipped cycles take"
PROMPT, CYCLES = 32, 6
TOKENS = 4  # for each round
GROUP = 8  # tokens whose savings are added up before they are compared
SHAPES = ((256, 1), (384, 1), (256, 8), (256, 32))  # width and sequences
POLICIES: tuple[Policy, ...] = ("recompute", "propagate", "share_last", "share_first")


@torch.no_grad()
def realised(
    d_model: int, kv: Policy, tokens: int, device: torch.device, batch: int = 1
) -> tuple[float, NDArray[np.float64]]:
    """The mean number of cycles run, and for each group of tokens the realised saving over the predicted one.

    Three greedy generations take turns token by token: with exits, without, and without at half the cycles. The last
    two tell what a cycle takes; the time of the skipped cycles, less the share of it that projected keys and values
    take in FLOPs, is the predicted saving; in a batch it is the mean over the sequences, each of which leaves on its
    own. With ``recompute`` what a token catches up for others counts against it, those that run all cycles themselves
    included.
    """
    model = ModelConfig(d_model=d_model, n_heads=max(1, d_model // 64), n_blocks=6, n_cycles=CYCLES)
    lm = build_model(get_variant("htc"), model, VOCAB, PROMPT + tokens).eval()
    lm.reset_parameters(0)
    lm.to(device)
    exits = EarlyExit("latent_diff", _middle_signal(lm), kv)
    sides: list[tuple[EarlyExit | None, int]] = [(exits, CYCLES), (None, CYCLES), (None, CYCLES // 2)]
    seconds, left = np.zeros((tokens, 3)), np.zeros((tokens, batch))
    outputs: list[Any] = [None] * 3
    for token in range(-1, tokens):  # -1: the prompt
        for side in (0, 1, 2) if token % 2 else (2, 1, 0):
            lm.exits, n_cycles = sides[side]
            out = outputs[side]
            ids = _prompt(device, batch) if out is None else out.logits[:, -1:].argmax(-1)
            start = time.perf_counter()
            cache = None if out is None else out.cache
            outputs[side] = lm(ids, cache=cache, use_cache=True, n_cycles=n_cycles, logits_to_keep=1)
            wait(device)
            if token >= 0:
                seconds[token, side] = time.perf_counter() - start
        left[token] = [bisect_left(lm.schedule.depths, depth) + 1 for depth in outputs[0].exit_depth.tolist()]
    cycle = np.median(seconds[:, 1] - seconds[:, 2]) / (CYCLES - CYCLES // 2)
    projected = 0.0
    if kv == "propagate":  # every block once for all of the skipped cycles
        keys = 4 * d_model * model.kv_heads * model.head_dim * len(lm.schedule.cycles[0])
        projected = keys / step_flops(lm, lm.schedule.cycles[0], 1).forward
    predicted = cycle * np.where(left < CYCLES, CYCLES - left - projected, 0.0).mean(1)
    saved, possible = (
        np.add.reduceat(part, np.arange(0, tokens, GROUP)) for part in (seconds[:, 1] - seconds[:, 0], predicted)
    )
    return float(left.mean()), saved[possible > 0] / possible[possible > 0]


@torch.no_grad()
def _middle_signal(lm: CycleModel) -> float:
    """A threshold at which about half of a prompt's tokens would leave at half of the cycles."""
    state = lm.embed(_prompt(lm.device, 1))
    for number in lm.cycles(state):
        if number == CYCLES // 2:
            break
    change = state.hidden - cast(torch.Tensor, state.before)
    return float((change.norm(dim=-1) / state.hidden.norm(dim=-1)).median())


def _prompt(device: torch.device, batch: int) -> torch.Tensor:
    return random_tokens(batch, PROMPT, device)


def rows(
    device: torch.device,
    rounds: int,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    policies: Sequence[Policy] = POLICIES,
) -> list[Row]:
    """A row for each shape (width and sequences) and policy: the ratio's median and quartiles are over groups of tokens
    for which a saving is predicted; without any, a ``note`` says so.
    """
    found = []
    for d_model, batch in shapes:
        for kv in policies:
            cycles, ratio = realised(d_model, kv, TOKENS * rounds, device, batch)
            row = {"policy": kv, "d_model": d_model, "batch": batch, "mean_cycles": cycles, "groups": len(ratio)}
            told = quartiles(ratio) if len(ratio) else {"note": "no cycle was skipped, or none takes time to speak of"}
            found.append(row | told)
    return found
