"""The one evaluation loop."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from bench.exits.trace import Trace
from bench.model.language_model import IGNORED, CycleForCausalLM

EVAL_BATCH = 64  # sequences; fixed, so that float sums do not depend on a setting


@torch.no_grad()
def evaluate(
    lm: CycleForCausalLM,
    ids: NDArray[np.int64],
    targets: NDArray[np.int64],
    every_exit: bool = False,
    n_cycles: int | None = None,
) -> Trace:
    """Score sequences ids [N, T] against targets [N, T] (-100 is not scored).

    every_exit: score what coda and head give at the end of every cycle and read the zero attention; otherwise only the
    full depth, as one column; n_cycles: another number of cycles than the model was built with.
    """
    training = lm.training
    lm.eval()
    parts = []
    for start in range(0, len(ids), EVAL_BATCH):
        tokens = torch.from_numpy(ids[start : start + EVAL_BATCH]).to(lm.device)
        goal = torch.from_numpy(targets[start : start + EVAL_BATCH]).to(lm.device)
        parts.append(_batch(lm, tokens, goal, every_exit, n_cycles))
    lm.train(training)
    loss, correct, scored, signal, seen = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Trace(loss, correct, scored, signal, seen.mean(0))


def _batch(
    lm: CycleForCausalLM, tokens: Tensor, goal: Tensor, every_exit: bool, n_cycles: int | None
) -> tuple[NDArray[np.float64], ...]:
    state = lm.embed(tokens, with_mass=every_exit, n_cycles=n_cycles)
    schedule = state.schedule
    losses, corrects, signals = [], [], []
    for number in lm.cycles(state):
        if not every_exit and number < schedule.n_cycles:
            continue
        signal = state.signal(schedule.cycles[number - 1])
        logits = lm.lm_head(lm.read_out(state)).float()
        loss = cross_entropy(logits.flatten(0, 1), goal.flatten(), ignore_index=IGNORED, reduction="none")
        losses.append(loss.view_as(goal).double().sum(1))
        corrects.append((logits.argmax(-1) == goal).double().sum(1))
        signals.append(torch.full((len(goal),), torch.nan) if signal is None else signal)
    means = [
        state.zero_attention[step.depth].mean((1, 2)).double() if step.depth in state.zero_attention else None
        for step in schedule.steps
    ]
    nothing = torch.full((len(goal),), torch.nan, dtype=torch.double)
    found = (
        torch.stack(losses, 1),
        torch.stack(corrects, 1),
        (goal != IGNORED).double().sum(1),
        torch.stack([signal.cpu().double() for signal in signals], 1),
        torch.stack([nothing if mean is None else mean.cpu() for mean in means], 1),
    )
    return tuple(tensor.cpu().numpy() for tensor in found)
