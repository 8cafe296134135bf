"""The one evaluation loop."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from bench.config import IGNORED
from bench.evaluate.rules import Rule, SignalWatch, get_rule, named
from bench.evaluate.trace import Trace
from bench.model.costs import cycle_flops, exit_flops, pass_flops
from bench.model.network import Network
from bench.processes import pulse

EVAL_BATCH = 64  # sequences; fixed, so that float sums do not depend on a setting


@torch.no_grad()
def evaluate(
    lm: Network,
    ids: NDArray[Any],
    targets: NDArray[np.int64],
    every_exit: bool = False,
    rules: Sequence[Rule] = (),
    n_cycles: int | None = None,
) -> Trace:
    """Score sequences ids [N, T], or vectors [N, T, F], against targets [N, T], or [N, 1] (-100 is not scored).

    Args:
        every_exit: score what coda and head give at the end of every cycle; otherwise only the full depth, as one
            column.
        rules: whose signals are recorded at every exit point (those that the model can be used with), for which the
            zero attention is read.
        n_cycles: another number of cycles than the model was built with.
    """
    training = lm.training
    lm.eval()
    found: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
    for start in range(0, len(ids), EVAL_BATCH):
        pulse()
        tokens = torch.from_numpy(ids[start : start + EVAL_BATCH]).to(lm.device)
        goal = torch.from_numpy(targets[start : start + EVAL_BATCH]).to(lm.device)
        rows = torch.arange(start, start + len(tokens), device=lm.device)
        for name, column in _batch(lm, tokens, goal, rows, every_exit or bool(rules), rules, n_cycles).items():
            found[name].append(column)
    lm.train(training)
    whole = {name: np.concatenate(parts) for name, parts in found.items()}
    loss, correct, scored, masses = (whole.pop(name) for name in ("loss", "correct", "scored", "masses"))
    ran = whole.pop("ran").astype(np.int64) if "ran" in whole else None
    signals = {key: column.astype(np.float32) for key, column in whole.items()}
    for key, signal in signals.items():
        if lost := int(np.isnan(signal).any(1).sum()):
            raise ValueError(f"exit rule {key!r}: its signal is NaN for {lost:,} of {len(signal):,} sequences")
    flops = {get_rule(key).name: rule_flops(lm, get_rule(key), ids.shape[1], n_cycles, ran) for key in signals}
    return Trace(loss, correct, scored, masses.mean(0), signals, flops, ran=ran)


def rule_flops(
    lm: Network, rule: Rule, length: int, n_cycles: int | None = None, ran: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """Executed forward FLOPs per token [C] of a sequence that a rule lets leave after cycle 1, 2, ...: what the rule
    reads at every exit point up to there is counted. After the last cycle no rule is asked.

    ran: tokens [N, C] that each cycle ran on of each sequence, where these decide that; the FLOPs are then [N, C].
    """
    reads = rule.reads_zero_attention, rule.reads_logits
    plain = np.array(exit_flops(lm, length, *reads, n_cycles))
    if ran is None:
        return plain
    schedule, before = lm.schedule_at(n_cycles), np.full(len(ran), length)
    more = np.zeros(ran.shape)  # than a cycle costs on as many tokens as in training
    for cycle, now in enumerate(ran.T):
        mass = rule.reads_zero_attention and cycle + 1 < schedule.n_cycles
        pairs, which = np.unique(np.stack([before, now], 1), axis=0, return_inverse=True)
        usual = cycle_flops(lm, schedule, cycle, length, mass).forward
        each = [cycle_flops(lm, schedule, cycle, length, mass, ran=(a, b)).forward for a, b in pairs.tolist()]
        more[:, cycle] = (np.array(each) - usual)[which]
        before = now
    found: NDArray[np.float64] = (np.rint(plain * length) + more.cumsum(1)) / length
    return found


def depth_flops(lm: Network, length: int, n_cycles: int | None, ran: NDArray[np.int64] | None) -> float:
    """Executed forward FLOPs per token at full depth: mean over sequences whose cycles ran on ``ran`` tokens [N, C]."""
    if ran is None:
        return pass_flops(lm, length, n_cycles).forward / length
    return float(rule_flops(lm, get_rule("fixed"), length, n_cycles, ran)[:, -1].mean())


def by_cycles(lm: Network, ids: NDArray[Any], targets: NDArray[np.int64], max_cycles: int) -> list[dict[str, float]]:
    """``cycles``, ``flops_per_token`` (forward), ``loss`` and ``accuracy`` of the model run for 1, 2, ... cycles, more
    than it was trained with if ``max_cycles`` says so: one pass tells all where each cycle ends at an exit point and
    the variant is not ``elastic``.
    """
    numbers, length = range(1, max_cycles + 1), ids.shape[1]
    if lm.schedule_at(max_cycles).n_cycles == max_cycles and not lm.variant.elastic:
        trace = evaluate(lm, ids, targets, every_exit=True, n_cycles=max_cycles)
        scores = [trace.leaving(number) for number in numbers]
        ran = [None if trace.ran is None else trace.ran[:, :number] for number in numbers]
    else:
        traces = [evaluate(lm, ids, targets, n_cycles=number) for number in numbers]
        scores, ran = [trace.leaving(1) for trace in traces], [trace.ran for trace in traces]
    flops = [depth_flops(lm, length, number, seen) for number, seen in zip(numbers, ran, strict=True)]
    return [
        {"cycles": number, "flops_per_token": cost, **found}
        for number, cost, found in zip(numbers, flops, scores, strict=True)
    ]


def _batch(
    lm: Network,
    tokens: Tensor,
    goal: Tensor,
    rows: Tensor,
    every_exit: bool,
    rules: Sequence[Rule],
    n_cycles: int | None,
) -> dict[str, NDArray[np.float64]]:
    """The trace's arrays for a batch, and under each rule's key its signals [B, C]; masses: zero attention [B, S]."""
    state = lm.embed(tokens, with_mass=bool(rules), n_cycles=n_cycles)
    schedule, watch = state.schedule, SignalWatch(rules, rows)
    columns: dict[str, list[Tensor]] = defaultdict(list)
    for number in lm.cycles(state):
        if lm.recurrence is not None and (ran := lm.recurrence.ran(number - 1, state)) is not None:
            columns["ran"].append(ran)
        if not every_exit and number < schedule.n_cycles:
            continue
        logits, signals = watch.look(lm, state, number)
        if logits is None:
            logits = lm.lm_head(lm.read_out(state)).float()
        loss = cross_entropy(logits.flatten(0, 1), goal.flatten(), ignore_index=IGNORED, reduction="none")
        columns["loss"].append(loss.view_as(goal).double().sum(1))
        columns["correct"].append((logits.argmax(-1) == goal).double().sum(1))
        for rule in rules:
            if rule.key in signals:
                with named(rule):
                    columns[rule.key].append(rule.pool(signals[rule.key], state.real))
    nothing = torch.full((len(goal),), torch.nan, dtype=torch.double, device=goal.device)
    masses = [state.zero_attention.get(step.depth) for step in schedule.steps]
    found = {name: torch.stack(parts, 1).double() for name, parts in columns.items()}
    found["masses"] = torch.stack([nothing if mass is None else state.mean_mass(mass).double() for mass in masses], 1)
    found["scored"] = (goal != IGNORED).double().sum(1)
    return {name: tensor.cpu().numpy() for name, tensor in found.items()}
