"""Leaving early for real, at sequence granularity: sequences that left are dropped from the batch.

What it gives is, sequence by sequence, what the trace says (a test); the clock says what the saved FLOPs are worth.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from bench.data.task import IGNORED
from bench.errors import UserError
from bench.evaluate import EVAL_BATCH
from bench.exits.rules import Rule, Watch, get_rule
from bench.model.language_model import CycleForCausalLM

Threshold = float | Sequence[float]  # one for all exit points, or one for each


@dataclass(frozen=True)
class Execution:
    """What leaving early gave for N sequences.

    cycle: [N], the cycle each left after, 1, 2, ...; loss: [N], summed over the scored targets, nats; correct: [N],
    targets predicted right; scored: [N], targets scored; seconds: wall-clock time of it all.
    """

    cycle: NDArray[np.int64]
    loss: NDArray[np.float64]
    correct: NDArray[np.float64]
    scored: NDArray[np.int64]
    seconds: float

    @property
    def scores(self) -> dict[str, float]:
        """Mean loss (nats per scored target), accuracy and mean number of cycles."""
        scored = self.scored.sum()
        return {
            "loss": float(self.loss.sum() / scored),
            "accuracy": float(self.correct.sum() / scored),
            "mean_cycles": float(self.cycle.mean()),
        }


def threshold_at(threshold: Threshold, number: int) -> float:
    """The threshold after cycle 1, 2, ..."""
    return float(threshold) if isinstance(threshold, int | float) else threshold[number - 1]


@torch.no_grad()
def execute(
    lm: CycleForCausalLM,
    ids: NDArray[np.int64],
    targets: NDArray[np.int64],
    rule: str | None,
    threshold: Threshold = 0.0,
    n_cycles: int | None = None,
    batch: int = EVAL_BATCH,
) -> Execution:
    """Score sequences ids [N, T] against targets [N, T] (-100 is not scored), each leaving where the rule says.

    rule: key of an exit rule; None: no exits, the whole depth; n_cycles: another number than the model was built with;
    batch: sequences that start together. Raises UserError if the rule cannot be used with the model.
    """
    known = None if rule is None else get_rule(rule)
    training = lm.training
    lm.eval()
    found = np.zeros((3, len(ids)))
    started = time.perf_counter()
    for start in range(0, len(ids), batch):
        part = slice(start, start + batch)
        tokens, goal = (torch.from_numpy(column[part]).to(lm.device) for column in (ids, targets))
        rows = torch.arange(start, start + len(tokens), device=lm.device)
        for left, score in _batch(lm, tokens, goal, rows, known, threshold, n_cycles):
            found[:, left.cpu().numpy()] = score.cpu().numpy()
    seconds = time.perf_counter() - started
    lm.train(training)
    return Execution(found[0].astype(np.int64), found[1], found[2], (targets != IGNORED).sum(1), seconds)


def _batch(
    lm: CycleForCausalLM,
    tokens: Tensor,
    goal: Tensor,
    rows: Tensor,
    rule: Rule | None,
    threshold: Threshold,
    n_cycles: int | None,
) -> list[tuple[Tensor, Tensor]]:
    """For the sequences of every exit taken: which they are [N], and cycle, loss and correct targets [3, N]."""
    state = lm.embed(tokens, n_cycles=n_cycles)
    last, found = state.schedule.n_cycles, []
    watch = Watch([rule] if rule is not None else [], rows)
    lm.start(state)
    for number in range(1, last + 1):
        reads = rule is not None and rule.reads_zero_attention and number < last
        state.context.with_mass = reads
        lm.cycle(number - 1, state)
        logits, leaves = None, torch.full_like(rows, number == last, dtype=torch.bool)
        if rule is not None and number < last:
            logits, signals = watch.look(lm, state, number)
            if rule.key not in signals:
                raise UserError(f"exit rule {rule.key!r} cannot be used with this {lm.variant.name!r} model")
            leaves = rule.leaves(rule.pool(signals[rule.key]), threshold_at(threshold, number))
        if not bool(leaves.any()):
            continue
        everyone = bool(leaves.all())
        if logits is None:
            logits = lm.lm_head(lm.read_out(state if everyone else state.select(leaves)))
        elif not everyone:
            logits = logits[leaves]
        found.append((rows[leaves], _score(logits.float(), goal[leaves], number)))
        if everyone:
            break
        state, goal, rows = state.select(~leaves), goal[~leaves], rows[~leaves]
        watch.keep(~leaves)
    return found


def _score(logits: Tensor, goal: Tensor, number: int) -> Tensor:
    """Cycle, loss and correct targets [3, N] of logits [N, T, V]."""
    loss = cross_entropy(logits.flatten(0, 1), goal.flatten(), ignore_index=IGNORED, reduction="none")
    loss = loss.view_as(goal).double().sum(1)
    return torch.stack([torch.full_like(loss, number), loss, (logits.argmax(-1) == goal).double().sum(1)])
