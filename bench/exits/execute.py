"""Leaving early for real: by sequences, which are dropped from the batch, or by tokens (see ``bench.exits.tokens``).

By sequences it gives for each of them what the trace says (a test). The clock tells what the saved FLOPs are worth.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from bench.costs import token_exit_flops
from bench.data.task import IGNORED
from bench.errors import UserError
from bench.evaluate import EVAL_BATCH, rule_flops
from bench.exits.rules import Rule, Watch, get_rule
from bench.exits.tokens import TokenCycle, tokens_of
from bench.model.language_model import CycleForCausalLM

Granularity = Literal["sequence", "token"]
Threshold = float | Sequence[float]  # one for all exit points, or one for each


@dataclass(frozen=True)
class Execution:
    """What leaving early gave for N sequences.

    cycle: the cycle each left after, 1, 2, ...: [N], by tokens [N, T]; loss: [N], summed over the scored targets, nats;
    correct: [N], targets predicted right; scored: [N], targets scored; flops: [N], executed, forward, each sequence
    alone; seconds: wall-clock time of it all.
    """

    cycle: NDArray[np.int64]
    loss: NDArray[np.float64]
    correct: NDArray[np.float64]
    scored: NDArray[np.int64]
    flops: NDArray[np.float64]
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
    granularity: Granularity = "sequence",
) -> Execution:
    """Score sequences ids [N, T] against targets [N, T] (-100 is not scored), each leaving where the rule says.

    rule: key of an exit rule; None: no exits, the whole depth; n_cycles: another number than the model was built with;
    batch: sequences that start together; granularity: what leaves, a sequence by its pooled signal or a token by its
    own. Raises UserError if the rule cannot be used with the model, and for tokens if the variant chooses them itself.
    """
    known = None if rule is None else get_rule(rule)
    by_token = granularity == "token" and known is not None
    training = lm.training
    lm.eval()
    cycle, found = np.zeros(ids.shape if by_token else len(ids), np.int64), np.zeros((2, len(ids)))
    started = time.perf_counter()
    for start in range(0, len(ids), batch):
        part = slice(start, start + batch)
        tokens, goal = (torch.from_numpy(column[part]).to(lm.device) for column in (ids, targets))
        rows = torch.arange(start, start + len(tokens), device=lm.device)
        run = _tokens if by_token else _batch
        for which, left, score in run(lm, tokens, goal, rows, known, threshold, n_cycles):
            cycle[which.cpu().numpy()], found[:, which.cpu().numpy()] = left.cpu().numpy(), score.cpu().numpy()
    seconds = time.perf_counter() - started
    lm.train(training)
    flops = executed_flops(lm, known or get_rule("fixed"), cycle, ids.shape[1], n_cycles)
    return Execution(cycle, found[0], found[1], (targets != IGNORED).sum(1), flops, seconds)


def executed_flops(
    lm: CycleForCausalLM, rule: Rule, cycle: NDArray[np.int64], length: int, n_cycles: int | None
) -> NDArray[np.float64]:
    """Forward FLOPs [N] of sequences of ``length`` that, or whose tokens, leave after ``cycle`` ([N] or [N, T])."""
    if cycle.ndim == 1:
        return rule_flops(lm, rule, length, n_cycles)[cycle - 1] * length
    reads = rule.reads_zero_attention, rule.reads_logits
    return np.array([token_exit_flops(lm, row, lm.device.type, *reads, n_cycles) for row in cycle.tolist()], float)


def _batch(
    lm: CycleForCausalLM,
    tokens: Tensor,
    goal: Tensor,
    rows: Tensor,
    rule: Rule | None,
    threshold: Threshold,
    n_cycles: int | None,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For the sequences of every exit taken: which they are [N], their cycle [N], loss and correct targets [2, N]."""
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
            leaves = rule.leaves(rule.pool(_signal(rule, signals, lm)), threshold_at(threshold, number))
        if not bool(leaves.any()):
            continue
        everyone = bool(leaves.all())
        if logits is None:
            logits = lm.lm_head(lm.read_out(state if everyone else state.select(leaves)))
        elif not everyone:
            logits = logits[leaves]
        left = torch.full_like(rows[leaves], number)
        found.append((rows[leaves], left, _score(logits.float(), goal[leaves])))
        if everyone:
            break
        state, goal, rows = state.select(~leaves), goal[~leaves], rows[~leaves]
        watch.keep(~leaves)
    return found


def _tokens(
    lm: CycleForCausalLM,
    tokens: Tensor,
    goal: Tensor,
    rows: Tensor,
    rule: Rule | None,
    threshold: Threshold,
    n_cycles: int | None,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What ``_batch`` gives, with the cycles [N, T] of the tokens. A sequence is scored when all of them have left."""
    assert rule is not None
    state = lm.embed(tokens, n_cycles=n_cycles)
    last, found = state.schedule.n_cycles, []
    left = torch.full_like(tokens, last)
    inside = torch.ones_like(tokens, dtype=torch.bool)
    # A row of its own for every token: a random rule must not draw the same for all of a sequence.
    watch = Watch(
        [rule], (rows[:, None] * tokens.shape[1] + torch.arange(tokens.shape[1], device=rows.device)).flatten()
    )
    lm.start(state)
    for number in range(1, last + 1):
        state.context.with_mass = rule.reads_zero_attention and number < last
        cycle = TokenCycle(lm, state, inside)
        cycle.run(number - 1, state)
        if number < last:
            logits = lm.lm_head(lm.read_out(state)[inside]).float()[:, None] if rule.reads_logits else None
            signal = _signal(rule, watch.look(lm, tokens_of(state, cycle.at), number, logits)[1], lm)[:, 0]
            leaves = rule.leaves(signal, threshold_at(threshold, number))
            watch.keep(~leaves)
            gone = torch.zeros_like(inside).masked_scatter(inside, leaves)
            left, inside = left.masked_fill(gone, number), inside & ~gone
        stays = inside.any(1) if number < last else torch.zeros_like(rows, dtype=torch.bool)
        if bool(stays.all()):
            continue
        logits = lm.lm_head(lm.read_out(state.select(~stays)))
        found.append((rows[~stays], left[~stays], _score(logits.float(), goal[~stays])))
        if not bool(stays.any()):
            break
        state = state.select(stays)
        goal, rows, left, inside = (tensor[stays] for tensor in (goal, rows, left, inside))
    return found


def _signal(rule: Rule, signals: dict[str, Tensor], lm: CycleForCausalLM) -> Tensor:
    if rule.key not in signals:
        raise UserError(f"exit rule {rule.key!r} cannot be used with this {lm.variant.name!r} model")
    return signals[rule.key]


def _score(logits: Tensor, goal: Tensor) -> Tensor:
    """Loss and correct targets [2, N] of logits [N, T, V]."""
    loss = cross_entropy(logits.flatten(0, 1), goal.flatten(), ignore_index=IGNORED, reduction="none")
    loss = loss.view_as(goal).double().sum(1)
    return torch.stack([loss, (logits.argmax(-1) == goal).double().sum(1)])
