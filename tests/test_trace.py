"""The exit trace against brute force: what a threshold gives is what each sequence's own exit gives."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from settings import VOCAB, make, tokens
from torch.nn.functional import cross_entropy

from bench.costs import exit_flops, head_flops, measured_flops, step_flops
from bench.evaluate import evaluate
from bench.exits.trace import Trace, with_bits
from bench.model.language_model import IGNORED


def traced(name: str = "ztt", every_exit: bool = True) -> tuple[torch.nn.Module, np.ndarray, np.ndarray, Trace]:
    lm = make(name, {})
    ids = tokens(9).numpy()
    targets = tokens(9, seed=1).numpy()
    targets[::2, :5] = IGNORED
    return lm, ids, targets, evaluate(lm, ids, targets, every_exit)


def test_every_exit_scores_what_the_truncated_model_gives() -> None:
    lm, ids, targets, trace = traced()
    for number in range(1, 4):
        for row in range(len(ids)):
            state = lm.embed(torch.from_numpy(ids[row : row + 1]), with_mass=True)
            lm.walk(lm.schedule.prelude, state)
            for steps in lm.schedule.cycles[:number]:
                lm.walk(steps, state)
            signal = np.mean(
                [state.zero_attention[step.depth].mean().item() for step in lm.schedule.cycles[number - 1]]
            )
            lm.walk(lm.schedule.coda, state)
            logits, goal = lm.lm_head(lm.norm(state.hidden))[0], torch.from_numpy(targets[row])
            loss = cross_entropy(logits, goal, ignore_index=IGNORED, reduction="sum").item()
            assert trace.loss[row, number - 1] == pytest.approx(loss, rel=1e-5)
            assert trace.correct[row, number - 1] == (logits.argmax(-1) == goal).sum().item()
            assert trace.signal[row, number - 1] == pytest.approx(signal, rel=1e-5)
    assert (trace.scored == (targets != IGNORED).sum(1)).all()


def test_full_depth_only_agrees_with_the_last_exit() -> None:
    _, _, _, full = traced(every_exit=False)
    _, _, _, trace = traced()
    np.testing.assert_allclose(full.loss[:, 0], trace.loss[:, -1], rtol=1e-6)


def test_variants_without_zero_tokens_have_exits_but_no_signal() -> None:
    _, _, _, trace = traced("htc")
    assert trace.loss.shape == (9, 3) and np.isnan(trace.signal).all() and np.isnan(trace.zero_attention).all()
    assert trace.curve((1.0, 2.0, 3.0)) == []


def test_zero_attention_is_known_where_there_are_zero_tokens() -> None:
    lm, _, _, trace = traced()
    has = [1 <= step.depth < lm.schedule.depth - 1 for step in lm.schedule.steps]
    assert (~np.isnan(trace.zero_attention) == has).all()
    assert ((trace.zero_attention[has] > 0) & (trace.zero_attention[has] < 1)).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 6), st.floats(0, 1))
def test_leaving_above_a_threshold_is_each_sequences_own_choice(
    seed: int, n: int, cycles: int, threshold: float
) -> None:
    rng = np.random.default_rng(seed)
    scored = rng.integers(1, 5, n).astype(float)
    trace = Trace(
        rng.random((n, cycles)),
        rng.integers(0, 5, (n, cycles)).astype(float),
        scored,
        rng.random((n, cycles)),
        np.zeros(1),
    )
    leave = trace.leave_above(threshold)
    loss = correct = 0.0
    for row in range(n):
        cycle = next((c for c in range(cycles - 1) if trace.signal[row, c] > threshold), cycles - 1)
        assert leave[row] == cycle + 1
        loss += trace.loss[row, cycle]
        correct += trace.correct[row, cycle]
    assert trace.leaving(leave) == pytest.approx({"loss": loss / scored.sum(), "accuracy": correct / scored.sum()})


def test_curve_runs_from_always_leaving_to_never() -> None:
    lm, ids, _, trace = traced()
    flops = exit_flops(lm, ids.shape[1], "cpu", reading=True)
    curve = trace.curve(flops)
    assert (curve[0]["mean_cycles"], curve[-1]["mean_cycles"]) == (1.0, 3.0)
    assert (curve[0]["flops_per_token"], curve[-1]["flops_per_token"]) == (flops[0], flops[-1])
    assert curve[-1]["loss"] == pytest.approx(trace.leaving(3)["loss"])
    assert all(a["flops_per_token"] <= b["flops_per_token"] for a, b in pairwise(curve))
    assert all(sum(point["share"]) == pytest.approx(1) for point in curve)


def test_reading_costs_are_those_of_the_executed_pass() -> None:
    """Everything read at every exit is what FlopCounterMode sees with the zero attention asked for."""
    lm = make("ztt", {"gating": "none"})
    length = 12
    reading = (step_flops(lm, lm.schedule.steps, length, "cpu", with_mass=True) + head_flops(lm, length)).forward
    assert reading == measured_flops(lm, 1, length, output_zero_attention=True)


def test_storage_round_trip() -> None:
    _, _, _, trace = traced()
    loaded = Trace.from_bytes(trace.to_bytes())
    for field in ("loss", "correct", "scored", "signal", "zero_attention"):
        np.testing.assert_array_equal(getattr(loaded, field), getattr(trace, field))


def test_bits_per_byte() -> None:
    assert with_bits({"loss": np.log(2) * 6}, 3.0)["bits_per_byte"] == pytest.approx(2.0)
    assert "bits_per_byte" not in with_bits({"loss": 1.0}, None)


def test_evaluation_leaves_the_model_as_it_was() -> None:
    lm = make("ztt", {}).train()
    before = copy.deepcopy(lm.state_dict())
    evaluate(lm, tokens(3).numpy(), tokens(3).numpy() % VOCAB, True)
    assert lm.training and all(torch.equal(before[key], value) for key, value in lm.state_dict().items())
