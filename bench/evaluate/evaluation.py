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
    schedule = lm.schedule_at(n_cycles)
    found = _columns(lm, ids, targets, every_exit or bool(rules), rules, n_cycles, schedule.n_cycles)
    return _trace(lm, found, rules, ids.shape[1], n_cycles)


@torch.no_grad()
def _columns(
    lm: Network,
    ids: NDArray[Any],
    targets: NDArray[np.int64],
    every_exit: bool,
    rules: Sequence[Rule],
    n_cycles: int | None,
    watched: int,
) -> dict[str, NDArray[np.float64]]:
    """``_batch`` for all sequences."""
    training = lm.training
    lm.eval()
    found: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
    for start in range(0, len(ids), EVAL_BATCH):
        pulse()
        tokens = torch.from_numpy(ids[start : start + EVAL_BATCH]).to(lm.device)
        goal = torch.from_numpy(targets[start : start + EVAL_BATCH]).to(lm.device)
        rows = torch.arange(start, start + len(tokens), device=lm.device)
        for name, column in _batch(lm, tokens, goal, rows, every_exit, rules, n_cycles, watched).items():
            found[name].append(column)
    lm.train(training)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _trace(
    lm: Network, found: dict[str, NDArray[np.float64]], rules: Sequence[Rule], length: int, n_cycles: int | None
) -> Trace:
    """The trace of what ``_columns`` found. Raises ValueError for a signal that is NaN."""
    signals = {rule.key: found[rule.key].astype(np.float32) for rule in rules if rule.key in found}
    for key, signal in signals.items():
        if lost := int(np.isnan(signal).any(1).sum()):
            raise ValueError(f"exit rule {key!r}: its signal is NaN for {lost:,} of {len(signal):,} sequences")
    ran = found["ran"].astype(np.int64) if "ran" in found else None
    flops = {get_rule(key).name: rule_flops(lm, get_rule(key), length, n_cycles, ran) for key in signals}
    return Trace(found["loss"], found["correct"], found["scored"], found["masses"].mean(0), signals, flops, ran=ran)


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


def by_cycles(
    lm: Network, ids: NDArray[Any], targets: NDArray[np.int64], max_cycles: int, rules: Sequence[Rule] = ()
) -> tuple[Trace, list[dict[str, float]]]:
    """The trace of the model as it was built, as ``evaluate`` gives it, and ``cycles``, ``flops_per_token`` (forward),
    ``loss`` and ``accuracy`` of the model run for 1, 2, ... cycles, more than it was built with if ``max_cycles`` says
    so. One pass tells all of it where each cycle ends at an exit point and the variant is not ``elastic``.
    """
    numbers, length, own = range(1, max_cycles + 1), ids.shape[1], lm.schedule.n_cycles
    most = max(own, max_cycles)
    longest = lm.schedule_at(most)
    if longest.n_cycles == most and longest.goes_on(lm.schedule) and not lm.variant.elastic:
        found = _columns(lm, ids, targets, True, rules, most, own)
        seen = found.get("ran")
        ran = [None if seen is None else seen[:, :number].astype(np.int64) for number in numbers]
        whole = Trace(found["loss"], found["correct"], found["scored"], found["masses"])
        scores = [whole.leaving(number) for number in numbers]
        first = {name: found[name][:, :own] for name in ("loss", "correct", "ran") if name in found}
        trace = _trace(lm, found | first, rules, length, None)
    else:
        trace = evaluate(lm, ids, targets, rules=rules)
        traces = [evaluate(lm, ids, targets, n_cycles=number) for number in numbers]
        scores, ran = [at.leaving(1) for at in traces], [at.ran for at in traces]
    flops = [depth_flops(lm, length, number, tokens) for number, tokens in zip(numbers, ran, strict=True)]
    return trace, [
        {"cycles": number, "flops_per_token": cost, **score}
        for number, cost, score in zip(numbers, flops, scores, strict=True)
    ]


def _batch(
    lm: Network,
    tokens: Tensor,
    goal: Tensor,
    rows: Tensor,
    every_exit: bool,
    rules: Sequence[Rule],
    n_cycles: int | None,
    watched: int,
) -> dict[str, NDArray[np.float64]]:
    """The trace's arrays for a batch, and under each rule's key its signals [B, watched] at the first so many exit
    points; masses: zero attention [B, S] of the S steps of a pass that ends there.
    """
    state = lm.embed(tokens, with_mass=bool(rules), n_cycles=n_cycles)
    schedule, watch = state.schedule, SignalWatch(rules, rows)
    columns: dict[str, list[Tensor]] = defaultdict(list)
    nothing = torch.full((len(goal),), torch.nan, dtype=torch.double, device=goal.device)
    found: dict[str, Tensor] = {}
    for number in lm.cycles(state):
        if lm.recurrence is not None and (ran := lm.recurrence.ran(number - 1, state)) is not None:
            columns["ran"].append(ran)
        if not every_exit and number < schedule.n_cycles:
            continue
        at = state
        if number == watched < schedule.n_cycles and lm.halting is not None:
            at = state.branch()  # of a pass that ends here all tokens have halted
            at.memory["halting"] = torch.ones_like(at.memory["halting"])
        logits, signals = watch.look(lm, at, number) if number <= watched else (None, {})
        if logits is None:
            logits = lm.lm_head(lm.read_out(at)).float()
        loss = cross_entropy(logits.flatten(0, 1), goal.flatten(), ignore_index=IGNORED, reduction="none")
        columns["loss"].append(loss.view_as(goal).double().sum(1))
        columns["correct"].append((logits.argmax(-1) == goal).double().sum(1))
        for rule in rules:
            if rule.key in signals:
                with named(rule):
                    columns[rule.key].append(rule.pool(signals[rule.key], state.real))
        if number == watched:
            steps = (*schedule.steps[: schedule.exits[number - 1]], *schedule.coda)
            masses = [at.zero_attention.get(step.depth) for step in steps]
            each = [nothing if mass is None else state.mean_mass(mass).double() for mass in masses]
            found["masses"] = torch.stack(each, 1)
            state.context.with_mass = False  # nobody looks further
    found |= {name: torch.stack(parts, 1).double() for name, parts in columns.items()}
    found["scored"] = (goal != IGNORED).double().sum(1)
    return {name: tensor.cpu().numpy() for name, tensor in found.items()}
