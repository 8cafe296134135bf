"""Sequences that really leave early against each of them run alone, and the FLOPs against what is counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from settings import DEFAULT_ID, DEFAULTS, LENGTH, make, tokens
from torch.nn.functional import cross_entropy

from bench.config import IGNORED
from bench.errors import UserError
from bench.evaluate.rules import SignalWatch, get_rule
from bench.exits.execute import execute
from bench.model.costs import exit_flops, measured_flops, pass_flops, read_out_flops
from bench.model.counter import counted_flops
from bench.model.language_model import CycleForCausalLM

defaults = pytest.mark.parametrize(("name", "options"), DEFAULTS, ids=DEFAULT_ID)
N = 6
RULES = ("latent_diff", "confidence.last", "patience", "zero_attention", "random")


def data() -> tuple[Any, Any]:
    ids, targets = tokens(N).numpy(), tokens(N, seed=1).numpy()
    targets[::2, :5] = IGNORED
    return ids, targets


@torch.no_grad()
def signals(lm: CycleForCausalLM, key: str) -> np.ndarray:
    """[N, C - 1] of every sequence passed alone and whole; empty if the rule cannot be used with the model."""
    rule, found = get_rule(key), np.zeros((N, lm.schedule.n_cycles - 1))
    for row in range(N):
        watch = SignalWatch([rule], torch.tensor([row]))
        state = lm.embed(torch.from_numpy(data()[0][row : row + 1]), with_mass=rule.reads_zero_attention)
        for number in lm.cycles(state):
            if number < lm.schedule.n_cycles:
                signal = watch.look(lm, state, number)[1].get(key)
                if signal is None:
                    return np.empty(0)
                found[row, number - 1] = rule.pool(signal)
    return found


@defaults
@pytest.mark.long
def test_every_sequence_leaves_as_it_would_alone(name: str, options: dict[str, Any]) -> None:
    lm = make(name, options).double()
    (ids, targets), last = data(), lm.schedule.n_cycles
    for key in RULES:
        rule, found = get_rule(key), signals(lm, key)
        if last == 1 or not found.size:
            continue
        seen = np.unique(found)
        each = [float(np.median(found[:, at])) for at in range(last - 1)]  # one threshold for every exit point
        for threshold in (float((seen[0] + seen[-1]) / 2), each):
            gone = np.concatenate([rule.leaves(found, np.asarray(threshold)), np.ones((N, 1), bool)], 1)
            expected = gone.argmax(1) + 1
            done = execute(lm, ids, targets, key, threshold, batch=4)
            assert (done.cycle == expected).all()
            for row in range(N):
                x, goal = torch.from_numpy(ids[row : row + 1]), torch.from_numpy(targets[row])
                number = int(expected[row])
                if lm.variant.elastic:  # fewer cycles would go the whole way
                    logits = lm(x, output_exits=True).exit_logits[number - 1][0]
                else:
                    logits = lm(x, n_cycles=number).logits[0]
                loss = cross_entropy(logits.float(), goal, ignore_index=IGNORED, reduction="sum").item()
                assert done.loss[row] == pytest.approx(loss, rel=1e-5)
                assert done.correct[row] == (logits.argmax(-1) == goal).sum()
            assert (done.scored == (targets != IGNORED).sum(1)).all()


def test_without_a_rule_nothing_leaves() -> None:
    lm, (ids, targets) = make("htc", {}).train(), data()
    done = execute(lm, ids, targets, None)
    assert (done.cycle == 3).all() and done.scores["mean_cycles"] == 3 and done.seconds > 0 and lm.training
    assert (execute(lm, ids, targets, None, n_cycles=5).cycle == 5).all()
    assert execute(lm, ids, targets, None, n_cycles=5).scores["loss"] != done.scores["loss"]


@defaults
@pytest.mark.parametrize("key", ["fixed", "zero_attention", "confidence"])
@pytest.mark.long
def test_executed_flops_are_the_counted_ones(name: str, options: dict[str, Any], key: str) -> None:
    """A sequence that leaves after cycle c costs what is counted for it; what a rule reads to decide is paid once."""
    lm, (ids, targets) = make(name, options), data()
    if key == "zero_attention" and lm.prefix is None:
        pytest.skip("no zero tokens")
    if pass_flops(lm, LENGTH).forward != measured_flops(lm, 1, LENGTH):
        pytest.skip("counted as in training, where less is executed")
    lm.requires_grad_(False)
    rule, last = get_rule(key), lm.schedule.n_cycles
    plain = exit_flops(lm, LENGTH, reading=rule.reads_zero_attention)
    read = read_out_flops(lm, lm.schedule, LENGTH).forward
    for number in range(1, last + 1):
        # A threshold for every exit point: never before, always there.
        thresholds = [np.inf if at < number else -np.inf for at in range(1, last)]
        executed = counted_flops(lambda: execute(lm, ids[:1], targets[:1], key, thresholds))  # noqa: B023
        again = read * (number - 1) if rule.reads_logits else 0
        assert executed == plain[number - 1] * LENGTH + again


def test_a_rule_that_cannot_be_used() -> None:
    with pytest.raises(UserError, match=r"'zero_attention' cannot be used with this 'htc' model"):
        execute(make("htc", {}), *data(), "zero_attention", 0.5)
