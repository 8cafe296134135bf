"""The exit trace against brute force: the exact curve is what every threshold gives, one by one."""

from __future__ import annotations

import copy
import math
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from settings import EVERY, VOCAB, make, tokens

from bench.config import IGNORED
from bench.errors import UserError
from bench.evaluate.evaluation import by_cycles, evaluate, rule_flops
from bench.evaluate.rules import SignalWatch, all_rules, get_rule
from bench.evaluate.trace import Trace, with_bits
from bench.model.costs import exit_flops, pass_flops
from bench.model.counter import counted_flops

HALTS = "gpt2, a gate that halts"
RULES = ("confidence", "entropy", "patience", "random")


def invented(seed: int, n: int, cycles: int, coarse: bool) -> Trace:
    """Random scores and signals; coarse: with many ties, among signals and scores."""
    rng = np.random.default_rng(seed)
    signals = {key: rng.random((n, cycles)).astype(np.float32) for key in RULES}
    if coarse:
        signals = {key: np.floor(signal * 4) for key, signal in signals.items()}
    signals["fixed"] = np.broadcast_to(np.arange(1.0, cycles + 1), (n, cycles))
    loss = rng.integers(0, 4, (n, cycles)) / 2 if coarse else rng.random((n, cycles))
    flops = {key: np.cumsum(rng.random(cycles) + 0.1) for key in (*RULES, "fixed")}
    scored = rng.integers(3, 6, n).astype(float)
    correct = rng.integers(0, 4, (n, cycles)).astype(float)
    return Trace(loss, correct, scored, np.zeros(1), signals, flops, 3.0)


traces = st.builds(invented, st.integers(0, 2**32 - 1), st.integers(1, 25), st.integers(1, 6), st.booleans())


def by_hand(trace: Trace, key: str, threshold: float) -> list[int]:
    """The cycle after which each sequence leaves."""
    above = get_rule(key).leave == "above"
    found = []
    for signal in trace.signals[key]:
        early = [c for c, s in enumerate(signal[:-1], 1) if (s >= threshold if above else s <= threshold)]
        found.append(early[0] if early else trace.n_cycles)
    return found


@settings(max_examples=60, deadline=None)
@given(traces)
def test_the_curve_is_exact_at_every_threshold(trace: Trace) -> None:
    """Each entry is what leaving at its threshold gives, and every signal seen is one of the entries' thresholds or
    changes nothing against the next stricter one.
    """
    for key in (*RULES, "fixed"):
        curve, cost = trace.curve(key), trace.flops[key]
        thresholds = curve["threshold"]
        assert np.isinf(thresholds[-1]) and len(set(thresholds)) == len(thresholds)
        for number, threshold in enumerate(thresholds):
            cycle = by_hand(trace, key, threshold)
            assert trace.leave(key, threshold).tolist() == cycle
            rows = range(len(cycle))
            loss = sum(trace.loss[row, cycle[row] - 1] for row in rows) / trace.scored.sum()
            correct = sum(trace.correct[row, cycle[row] - 1] for row in rows) / trace.scored.sum()
            expected = {"threshold": threshold, "flops_per_token": np.mean([cost[c - 1] for c in cycle])}
            expected |= {"mean_cycles": np.mean(cycle), **with_bits({"loss": loss, "accuracy": correct}, 3.0)}
            assert {name: column[number] for name, column in curve.items()} == pytest.approx(expected, abs=1e-12)
            assert trace.score(key, threshold) == pytest.approx({k: v for k, v in expected.items() if k != "threshold"})
            share = np.bincount(np.array(cycle) - 1, minlength=trace.n_cycles) / len(cycle)
            assert trace.shares(key, np.array([threshold]))[0] == pytest.approx(share)
        outcomes = {tuple(by_hand(trace, key, t)) for t in thresholds}
        seen = np.unique(trace.signals[key][:, :-1])
        assert {tuple(by_hand(trace, key, t)) for t in seen} <= outcomes
        assert all(a < b for a, b in pairwise(curve["mean_cycles"]))


@settings(max_examples=60, deadline=None)
@given(traces, st.lists(st.floats(-0.5, 4.5), min_size=1, max_size=8))
def test_any_threshold_is_looked_up_in_the_curve(trace: Trace, thresholds: list[float]) -> None:
    """Between the signals and beyond them too, against the same threshold given for each exit point."""
    for key in (*RULES, "fixed"):
        beside = [float(np.nextafter(s, d)) for s in trace.signals[key][0] for d in (np.float32(-9), np.float32(9))]
        for threshold in [*thresholds, *beside, *map(float, trace.signals[key][-1]), -math.inf, math.inf]:
            assert trace.leave(key, threshold).tolist() == by_hand(trace, key, threshold)
            each = np.full(max(1, trace.n_cycles - 1), threshold)[: trace.n_cycles - 1]
            assert trace.score(key, threshold) == pytest.approx(trace.score(key, each), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(traces)
def test_a_threshold_for_each_exit_point(trace: Trace) -> None:
    each = np.linspace(0.2, 0.8, max(1, trace.n_cycles - 1))[: trace.n_cycles - 1]
    for row, left in enumerate(trace.leave("entropy", each)):
        early = [c for c in range(trace.n_cycles - 1) if trace.signals["entropy"][row, c] <= each[c]]
        assert left == (early[0] + 1 if early else trace.n_cycles)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_the_oracle_bounds_every_way_of_leaving(seed: int, n: int, cycles: int, coarse: bool) -> None:
    """All assignments of exits to sequences: none lies above the line through the oracle's points."""
    trace = invented(seed, n, cycles, coarse)
    for key, metric, sign in (("oracle", "accuracy", 1), ("oracle.loss", "loss", -1)):
        curve, cost = trace.curve(key), trace.flops["fixed"]
        assert all(a < b for a, b in pairwise(curve["flops_per_token"]))
        best = max(sign * trace.leaving(np.array(cycle))[metric] for cycle in product(range(1, cycles + 1), repeat=n))
        assert sign * curve[metric][-1] == pytest.approx(best)
        for cycle in product(range(1, cycles + 1), repeat=n):
            flops = np.mean([cost[c - 1] for c in cycle])
            bound = np.interp(flops, curve["flops_per_token"], sign * curve[metric])
            assert sign * trace.leaving(np.array(cycle))[metric] <= bound + 1e-12
        for number, threshold in enumerate(curve["threshold"]):
            scores = {name: float(column[number]) for name, column in curve.items() if name != "threshold"}
            assert trace.score(key, threshold) == pytest.approx(scores)
            share = trace.shares(key, np.array([threshold]))[0]
            assert share @ np.arange(1, cycles + 1) == pytest.approx(scores["mean_cycles"])


def test_random_is_what_many_draws_give_on_average() -> None:
    """The expectation at a threshold against 2000 copies of each sequence with signals of their own."""
    trace = invented(3, 4, 4, False)
    many = Trace(*(np.repeat(a, 2000, 0) for a in (trace.loss, trace.correct, trace.scored)), trace.zero_attention)
    signal = np.random.default_rng(0).random(many.loss.shape)
    many = Trace(many.loss, many.correct, many.scored, many.zero_attention, {"random": signal}, trace.flops, 3.0)
    chance = trace.at_random()
    for number in (0, 16, 32, 48, 64):
        found = many.score("random", chance["threshold"][number])
        for name, value in found.items():
            assert value == pytest.approx(chance[name][number], rel=0.03)
    for number, cycle in ((0, 1), (-1, 4)):
        assert chance["mean_cycles"][number] == cycle
        assert chance["loss"][number] == pytest.approx(trace.leaving(cycle)["loss"])


@pytest.mark.parametrize("count", ["full", "executed"])
@pytest.mark.parametrize(("name", "options"), [("ztt", {"gating": "none"}), ("bc", {})])
@pytest.mark.long
def test_a_rules_flops_are_those_of_really_leaving(name: str, options: dict[str, Any], count: Any) -> None:
    """What PyTorch's counter sees when a sequence is run, looked at after every cycle, and left."""
    lm, ids = make(name, options, halting="gate", flops=count), tokens(1)
    for rule in all_rules():
        if rule.reads_zero_attention and lm.prefix is None:
            continue
        for leave, expected in enumerate(rule_flops(lm, rule, ids.shape[1]), 1):

            def run(leave: int = leave, rule: Any = rule) -> None:
                state, watch = lm.embed(ids, with_mass=rule.reads_zero_attention), SignalWatch([rule])
                logits = None
                for number in lm.cycles(state):
                    if number < lm.schedule.n_cycles:
                        logits, _ = watch.look(lm, state, number)
                    if number == leave:
                        break
                if logits is None or leave == lm.schedule.n_cycles:
                    lm.lm_head(lm.read_out(state))

            assert counted_flops(run, count) == expected * ids.shape[1], (rule.key, leave)


def test_full_depth_only_agrees_with_the_last_exit() -> None:
    lm, ids, targets = make("ztt", {}), tokens(9).numpy(), tokens(9, seed=1).numpy()
    targets[::2, :5] = IGNORED
    full, trace = evaluate(lm, ids, targets), evaluate(lm, ids, targets, rules=all_rules())
    assert full.loss.shape == (9, 1) and full.rules == [] and trace.loss.shape == (9, 3)
    np.testing.assert_allclose(full.loss[:, 0], trace.loss[:, -1], rtol=1e-6)
    np.testing.assert_array_equal(full.correct[:, 0], trace.correct[:, -1])


@pytest.mark.parametrize("name", ["vanilla", "bc", "ztt"])
def test_every_number_of_cycles_is_the_model_run_so(name: str) -> None:
    lm, ids, targets = make(name, {}), tokens(5).numpy(), tokens(5, seed=1).numpy()
    _, found = by_cycles(lm, ids, targets, 5)
    assert [entry["cycles"] for entry in found] == [1, 2, 3, 4, 5]
    for entry in found:
        number = entry["cycles"]
        alone = evaluate(lm, ids, targets, n_cycles=number).leaving(1)
        assert {key: entry[key] for key in alone} == pytest.approx(alone, rel=1e-5)
        assert entry["flops_per_token"] * 12 == pass_flops(lm, 12, number).forward


@pytest.mark.parametrize(("name", "options", "family"), [*EVERY, *(pytest.param(n, {}, HALTS) for n in ("htc", "ztt"))])
@pytest.mark.parametrize("most", [1, 5])
def test_one_pass_gives_the_trace_of_the_model_as_it_was_built(
    name: str, options: dict[str, Any], family: str, most: int
) -> None:
    lm = make(name, options, halting="gate") if family == HALTS else make(name, options, family)
    ids, targets = tokens(5).numpy(), tokens(5, seed=1).numpy()
    rules = all_rules() if lm.schedule.n_cycles > 1 else []
    trace, found = by_cycles(lm, ids, targets, most if lm.variant.cycled else 1, rules)
    alone = evaluate(lm, ids, targets, rules=rules)
    for field, value in vars(alone).items():
        if isinstance(value, dict):
            assert list(getattr(trace, field)) == list(value)
            assert all((getattr(trace, field)[key] == column).all() for key, column in value.items())
        else:
            np.testing.assert_array_equal(getattr(trace, field), value)
    for entry in found:
        told = evaluate(lm, ids, targets, n_cycles=entry["cycles"]).leaving(1)
        assert {key: entry[key] for key in told} == pytest.approx(told, rel=1e-5)


def test_zero_attention_is_known_where_there_are_zero_tokens() -> None:
    lm = make("ztt", {})
    trace = evaluate(lm, tokens(9).numpy(), tokens(9).numpy(), rules=all_rules())
    has = [1 <= step.depth < lm.schedule.depth - 1 for step in lm.schedule.steps]
    assert (~np.isnan(trace.zero_attention) == has).all()
    assert ((trace.zero_attention[has] > 0) & (trace.zero_attention[has] < 1)).all()


def test_storage_round_trip() -> None:
    trace = evaluate(make("ztt", {}), tokens(9).numpy(), tokens(9).numpy(), rules=all_rules())
    for stored in (trace, Trace(**{**vars(trace), "bytes_per_token": 4.5})):
        loaded = Trace.from_bytes(stored.to_bytes())
        assert vars(loaded).keys() == vars(stored).keys() and loaded.bytes_per_token == stored.bytes_per_token
        for field in ("loss", "correct", "scored", "zero_attention"):
            np.testing.assert_array_equal(getattr(loaded, field), getattr(stored, field))
        for group in ("signals", "flops"):
            mine, theirs = getattr(stored, group), getattr(loaded, group)
            assert mine.keys() == theirs.keys() and all((mine[key] == theirs[key]).all() for key in mine)
        assert loaded.score("entropy", 1.0) == stored.score("entropy", 1.0)


def test_plain_exits_cost_what_the_schedule_says() -> None:
    lm = make("ztt", {})
    trace = evaluate(lm, tokens(3).numpy(), tokens(3).numpy(), rules=all_rules())
    for name in ("fixed", "random", "latent_diff"):
        assert tuple(trace.flops[name]) == exit_flops(lm, 12)
    assert trace.flops["kl"][0] == trace.flops["fixed"][0] and (trace.flops["kl"] > trace.flops["fixed"])[1:].all()


def test_bits_per_byte() -> None:
    assert with_bits({"loss": np.log(2) * 6}, 3.0)["bits_per_byte"] == pytest.approx(2.0)
    assert "bits_per_byte" not in with_bits({"loss": 1.0}, None)


def test_evaluation_leaves_the_model_as_it_was() -> None:
    lm = make("ztt", {}).train()
    before = copy.deepcopy(lm.state_dict())
    evaluate(lm, tokens(3).numpy(), tokens(3).numpy() % VOCAB, rules=all_rules())
    assert lm.training and all((before[key] == value).all() for key, value in lm.state_dict().items())


def test_a_rule_the_trace_does_not_have_is_named() -> None:
    with pytest.raises(UserError, match=r"unknown exit rule of the trace 'halting'"):
        invented(0, 3, 3, False).leave("halting", 0.5)
