"""Early exits at batch 1: how much of the time that the skipped cycles take is really saved."""

from __future__ import annotations

import time
from bisect import bisect_left
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from bench.config import ModelConfig
from bench.costs import build_model, step_flops
from bench.exits.generation import EarlyExit, Policy
from bench.model import CycleForCausalLM
from bench.variant import get_variant

VOCAB, PROMPT, CYCLES = 256, 32, 6
POLICIES: tuple[Policy, ...] = ("recompute", "propagate", "share_last", "share_first")


@torch.no_grad()
def realised(d_model: int, kv: Policy, tokens: int) -> tuple[float, NDArray[np.float64]]:
    """The mean number of cycles run, and for each token that left early the realised saving over the predicted one.

    Three greedy generations take turns token by token: with exits, without, and without at half the cycles. The last
    two tell what a cycle takes; the time of the skipped cycles, less the share of it that projected keys and values
    take in FLOPs, is the predicted saving. With ``recompute`` what a token catches up for others counts against it.
    """
    model = ModelConfig(d_model=d_model, n_heads=d_model // 64, n_blocks=6, n_cycles=CYCLES)
    lm = build_model(get_variant("htc"), model, VOCAB, PROMPT + tokens).eval()
    lm.reset_parameters(0)
    exits = EarlyExit("latent_diff", _middle_signal(lm), kv)
    sides: list[tuple[EarlyExit | None, int]] = [(exits, CYCLES), (None, CYCLES), (None, CYCLES // 2)]
    seconds, left = np.zeros((tokens, 3)), np.zeros(tokens)
    outputs: list[Any] = [None] * 3
    for token in range(-1, tokens):  # -1: the prompt
        for side in (0, 1, 2) if token % 2 else (2, 1, 0):
            lm.exits, n_cycles = sides[side]
            out = outputs[side]
            ids = _prompt() if out is None else out.logits[:, -1:].argmax(-1)
            start = time.perf_counter()
            cache = None if out is None else out.cache
            outputs[side] = lm(ids, cache=cache, use_cache=True, n_cycles=n_cycles, logits_to_keep=1)
            if token >= 0:
                seconds[token, side] = time.perf_counter() - start
        left[token] = bisect_left(lm.schedule.exits, int(outputs[0].exit_depth) - lm.schedule.n_coda) + 1
    early = left < CYCLES
    skipped = CYCLES - left[early]
    cycle = np.median(seconds[:, 1] - seconds[:, 2]) / (CYCLES - CYCLES // 2)
    projected = 0.0
    if kv == "propagate":  # every block once for all of the skipped cycles
        keys = 4 * d_model * model.kv_heads * model.head_dim * len(lm.schedule.cycles[0])
        projected = keys / step_flops(lm, lm.schedule.cycles[0], 1, "cpu").forward
    return float(left.mean()), (seconds[early, 1] - seconds[early, 0]) / ((skipped - projected) * cycle)


@torch.no_grad()
def _middle_signal(lm: CycleForCausalLM) -> float:
    """A threshold at which about half of a prompt's tokens would leave at half of the cycles."""
    state = lm.embed(_prompt())
    for number in lm.cycles(state):
        if number == CYCLES // 2:
            break
    change = state.hidden - cast(torch.Tensor, state.before)
    return float((change.norm(dim=-1) / state.hidden.norm(dim=-1)).median())


def _prompt() -> torch.Tensor:
    return torch.randint(VOCAB, (1, PROMPT), generator=torch.Generator().manual_seed(0))


def table(tokens: int) -> Table:
    """Realised over predicted saving by width and policy."""
    title = f"generation at batch 1 with exits (HTC, {CYCLES} cycles): time saved / time the skipped cycles take"
    found = Table("d_model, policy", "mean cycles", "ratio, median over tokens [quartiles]", title=title)
    for d_model in (256, 384):
        for kv in POLICIES:
            cycles, ratio = realised(d_model, kv, tokens)
            low, middle, high = np.quantile(ratio, (0.25, 0.5, 0.75))
            found.add_row(f"{d_model}, {kv}", f"{cycles:.2f}", f"{middle:.3f} [{low:.3f}, {high:.3f}]")
    return found
