"""Leaving early for real: by sequences, which are dropped from the batch, or by tokens (see ``bench.exits.tokens``).

By sequences it gives for each of them what the trace says (a test). The clock tells what the saved FLOPs are worth.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from bench.config import IGNORED
from bench.errors import InputError, UserError, shown
from bench.evaluate.evaluation import EVAL_BATCH, rule_flops
from bench.evaluate.rules import Rule, SignalWatch, get_rule
from bench.exits.tokens import TokenCycle, tokens_of, upload
from bench.model.costs import token_exit_flops
from bench.model.network import Network
from bench.model.walk import Walk

Granularity = Literal["sequence", "token"]
Threshold = float | Sequence[float]  # one for all exit points, or one for each


@dataclass(frozen=True)
class Executed:
    """What leaving early gave for N sequences.

    Attributes:
        cycle: the cycle each left after, 1, 2, ...: [N], by tokens [N, T].
        loss: [N], summed over the scored targets, nats.
        correct: [N], targets predicted right.
        scored: [N], targets scored.
        flops: [N], executed, forward, each sequence alone.
        seconds: wall-clock time of it all.
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


def numbers_of(threshold: Any) -> Threshold:
    """A threshold, or one for each exit point, from whatever holds numbers. Raises InputError for anything else."""
    values = np.asarray(threshold)
    if values.dtype.kind not in "fiu" or values.ndim > 1 or not values.size or np.isnan(values).any():
        raise InputError(f"threshold: {shown(threshold)} (allowed: a number, or one for each exit point)")
    return [float(value) for value in values] if values.ndim else float(values)


def threshold_at(threshold: Threshold, number: int, points: int) -> float:
    """The threshold after cycle 1, 2, ... Raises InputError where there are several, but not one for each of ``points``
    exit points.
    """
    if isinstance(threshold, int | float):
        return float(threshold)
    if len(threshold) != points:
        raise InputError(f"threshold: {len(threshold)} given (allowed: one, or one for each of {points} exits)")
    return threshold[number - 1]


@torch.no_grad()
def execute(
    lm: Network,
    ids: NDArray[Any],
    targets: NDArray[np.int64],
    rule: str | None,
    threshold: Threshold = 0.0,
    n_cycles: int | None = None,
    batch: int = EVAL_BATCH,
    granularity: Granularity = "sequence",
) -> Executed:
    """Score sequences ids [N, T], or vectors [N, T, F], against targets [N, T], or [N, 1] (-100 is not scored), each
    leaving where the rule says.

    Args:
        rule: key of an exit rule; None: no exits, the whole depth.
        n_cycles: another number than the model was built with.
        batch: sequences that start together.
        granularity: what leaves, a sequence by its pooled signal or a token by its own.

    Raises:
        UserError: if the rule cannot be used with the model, and for tokens if the variant chooses them itself.
    """
    known = None if rule is None else get_rule(rule)
    run = _tokens if granularity == "token" and known is not None else _batch
    if run is _tokens and (lm.model_shape.form.attention == "full" or lm.model_shape.form.judged != "tokens"):
        raise UserError("--granularity: 'token' needs causal attention and targets at tokens (allowed: sequence)")
    if run is _tokens and lm.routes:
        raise UserError(
            f"--granularity: {lm.variant.name!r} chooses the tokens of a cycle by itself (allowed: sequence)"
        )
    training = lm.training
    lm.eval()
    found: list[_Left] = []
    started = time.perf_counter()
    for start in range(0, len(ids), batch):
        part = slice(start, start + batch)
        tokens, goal = (upload(column[part], lm.device) for column in (ids, targets))
        found += run(lm, tokens, goal, np.arange(start, start + len(tokens)), known, threshold, n_cycles)
    loss, correct, *cycles = torch.cat([left.score for left in found], 1).cpu().numpy()
    seconds = time.perf_counter() - started
    lm.train(training)
    order = np.argsort(np.concatenate([left.rows for left in found]))
    cycle = np.concatenate([left.cycle for left in found])[order]
    ran = np.stack(cycles, 1).astype(np.int64)[order] if cycles else None
    flops = executed_flops(lm, known or get_rule("fixed"), cycle, ids.shape[1], n_cycles, ran)
    return Executed(cycle, loss[order], correct[order], (targets != IGNORED).sum(1), flops, seconds)


@dataclass(frozen=True)
class _Left:
    """Sequences that have left together.

    Attributes:
        rows: [N], which they are.
        cycle: that they, or their tokens, left after, [N] or [N, T].
        score: their loss and correct targets [2, N], on the device; where sequences decide on how many tokens a cycle
            runs, these numbers as well [2 + C, N], 0 for a cycle that they did not take.
    """

    rows: NDArray[np.int64]
    cycle: NDArray[np.int64]
    score: Tensor


def executed_flops(
    lm: Network,
    rule: Rule,
    cycle: NDArray[np.int64],
    length: int,
    n_cycles: int | None,
    ran: NDArray[np.int64] | None = None,
) -> NDArray[np.float64]:
    """Forward FLOPs [N] of sequences of ``length`` that, or whose tokens, leave after ``cycle`` ([N] or [N, T]). ran:
    as of ``rule_flops``.
    """
    if cycle.ndim == 1:
        found = rule_flops(lm, rule, length, n_cycles, ran)
        return np.broadcast_to(found, (len(cycle), found.shape[-1]))[np.arange(len(cycle)), cycle - 1] * length
    reads = rule.reads_zero_attention, rule.reads_logits
    return np.array([token_exit_flops(lm, row, *reads, n_cycles) for row in cycle.tolist()], float)


class Gone(NamedTuple):
    """Sequences that leave together.

    Attributes:
        at: [K], which of the batch they are.
        number: the cycle after which.
        logits: [K, T, V], what is predicted then.
        ran: a count [K] for each cycle so far, where sequences decide on how many tokens a cycle runs.
    """

    at: NDArray[np.int64]
    number: int
    logits: Tensor
    ran: list[Tensor]


def leaving(lm: Network, state: Walk, rows: Tensor, rule: Rule | None, threshold: Threshold) -> Iterator[Gone]:
    """Run the sequences of a state that is at its start, each until the rule lets it leave by its pooled signal.

    At an exit point the host waits for the device once, to learn who leaves.

    Args:
        rows: which sequences of the data these are, [B].

    Raises:
        UserError: if the rule cannot be used with the model.
    """
    device, last, at, ran = state.hidden.device, state.schedule.n_cycles, np.arange(len(rows)), list[Tensor]()
    watch = SignalWatch([rule] if rule is not None else [], rows)
    lm.start(state)
    for number in range(1, last + 1):
        state.context.with_mass = rule is not None and rule.reads_zero_attention and number < last
        lm.cycle(number - 1, state)
        if lm.recurrence is not None and (counts := lm.recurrence.ran(number - 1, state)) is not None:
            ran.append(counts)
        logits, leaves = None, np.full(len(at), number == last)
        if rule is not None and number < last:
            logits, signals = watch.look(lm, state, number)
            at_most = threshold_at(threshold, number, last - 1)
            leaves = _host(rule.leaves(rule.pool(_signal(rule, signals, lm), state.real), at_most))
        if not leaves.any():
            continue
        gone, stay = np.flatnonzero(leaves), np.flatnonzero(~leaves)
        index = upload(gone, device)
        if logits is None:
            logits = lm.lm_head(lm.read_out(state if not len(stay) else state.select(index)))
        elif len(stay):
            logits = logits[index]
        yield Gone(at[gone], number, logits.float(), [counts[index] for counts in ran])
        if not len(stay):
            break
        index = upload(stay, device)
        state, at, ran = state.select(index), at[stay], [counts[index] for counts in ran]
        watch.keep(index)


def _batch(
    lm: Network,
    tokens: Tensor,
    goal: Tensor,
    rows: NDArray[np.int64],
    rule: Rule | None,
    threshold: Threshold,
    n_cycles: int | None,
) -> list[_Left]:
    """Score the sequences ``rows`` [B] of the data."""
    device, found = tokens.device, list[_Left]()
    state = lm.embed(tokens, n_cycles=n_cycles)
    for at, number, logits, ran in leaving(lm, state, upload(rows, device), rule, threshold):
        score = _score(logits, goal[upload(at, device)])
        if ran:
            none = torch.zeros_like(score[0])
            score = torch.stack([*score, *ran, *[none] * (state.schedule.n_cycles - number)])
        found.append(_Left(rows[at], np.full(len(at), number), score))
    return found


def _tokens(
    lm: Network,
    tokens: Tensor,
    goal: Tensor,
    rows: NDArray[np.int64],
    rule: Rule | None,
    threshold: Threshold,
    n_cycles: int | None,
) -> list[_Left]:
    """What ``_batch`` gives, with the cycles of the tokens. A sequence is scored when all of them have left."""
    assert rule is not None
    device, length = tokens.device, tokens.shape[1]
    state = lm.embed(tokens, n_cycles=n_cycles)
    last, found = state.schedule.n_cycles, list[_Left]()
    left, inside = np.full(tokens.shape, last), np.ones(tokens.shape, bool)
    # A row of its own for every token: a random rule must not draw the same for all of a sequence.
    watch = SignalWatch([rule], upload((rows[:, None] * length + np.arange(length)).ravel(), device))
    lm.start(state)
    for number in range(1, last + 1):
        state.context.with_mass = rule.reads_zero_attention and number < last
        cycle = TokenCycle(lm, state, inside)
        cycle.run(number - 1, state)
        if number < last:
            own = lm.lm_head(lm.read_out(state).flatten(0, 1)[cycle.at]).float()[:, None] if rule.reads_logits else None
            signal = _signal(rule, watch.look(lm, tokens_of(state, cycle.at), number, own)[1], lm)[:, 0]
            leaves = _host(rule.leaves(signal, threshold_at(threshold, number, last - 1)))
            watch.keep(upload(np.flatnonzero(~leaves), device))
            gone = np.zeros_like(inside)
            gone[inside] = leaves
            left, inside = np.where(gone, number, left), inside & ~gone
        stays = inside.any(1) if number < last else np.zeros(len(rows), bool)
        if stays.all():
            continue
        at = upload(np.flatnonzero(~stays), device)
        logits = lm.lm_head(lm.read_out(state.select(at)))
        found.append(_Left(rows[~stays], left[~stays], _score(logits.float(), goal[at])))
        if not stays.any():
            break
        at = upload(np.flatnonzero(stays), device)
        state, goal = state.select(at), goal[at]
        rows, left, inside = rows[stays], left[stays], inside[stays]
    return found


def _host(leaves: Tensor) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = leaves.cpu().numpy()
    return found


def _signal(rule: Rule, signals: dict[str, Tensor], lm: Network) -> Tensor:
    if rule.key not in signals:
        raise UserError(f"exit rule {rule.key!r} cannot be used with this {lm.variant.name!r} model")
    return signals[rule.key]


def _score(logits: Tensor, goal: Tensor) -> Tensor:
    """Loss and correct targets [2, N] of logits [N, T, V]."""
    loss = cross_entropy(logits.flatten(0, -2), goal.flatten(), ignore_index=IGNORED, reduction="none")
    loss = loss.view_as(goal).double().sum(1)
    return torch.stack([loss, (logits.argmax(-1) == goal).double().sum(1)])
