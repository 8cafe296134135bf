"""Exit rules: their formulas written out again, and that the trace says what really leaving does."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from settings import DEFAULTS, LENGTH, VOCAB, halts, make, tokens
from torch.nn.functional import cross_entropy

from bench.config import IGNORED
from bench.errors import UserError
from bench.evaluate.evaluation import evaluate
from bench.evaluate.rules import Prediction, Rule, SignalWatch, View, all_rules, get_rule, register, rules
from bench.evaluate.usable import usable_rules

N, CYCLES = 6, 3
KEYS = [rule.key for rule in all_rules()]
CYCLED = [name for name, _ in DEFAULTS if make(name, {}).schedule.n_cycles == CYCLES]


def model(name: str, seed: int = 0, **changes: Any) -> Any:
    lm = make(name, {}, **changes)
    if not halts(lm):
        lm = make(name, {}, halting="gate", **changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # large enough for the exit points to disagree
        for parameter in lm.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return lm


def data(seed: int = 0) -> tuple[Any, Any]:
    ids, targets = tokens(N, seed=seed).numpy(), tokens(N, seed=seed + 1).numpy()
    targets[::2, :5] = IGNORED
    return ids, targets


class Reference:
    """The signals of one sequence, from the definitions, in float64."""

    def __init__(self, row: int) -> None:
        self.row, self.states, self.probs, self.streak = row, [], [], np.zeros(LENGTH)

    def at(self, lm: Any, state: Any, number: int, before: Any, logits: Any) -> dict[str, float]:
        x, h = state.hidden[0].double().numpy(), before[0].double().numpy()
        p = torch.softmax(logits.double(), -1).numpy()
        old = self.probs[-1] if self.probs else np.full_like(p, 1 / VOCAB)
        self.probs.append(p)

        def entropy(q: Any) -> Any:
            return -(q * np.log(q)).sum(-1)

        if number > 1:
            self.streak = np.where(p.argmax(-1) == old.argmax(-1), self.streak + 1, 0)
        norm = np.linalg.norm
        by_token = {
            "confidence": p.max(-1),
            "entropy": entropy(p),
            "kl": (old * np.log(old / p)).sum(-1),
            "entropy_diff": abs(entropy(p) - entropy(old)),
            "patience": self.streak,
            "latent_diff": norm(x - h, axis=-1) / norm(x, axis=-1),
            "latent_norm": norm(x - h, axis=-1),
            "cosine": 1 - (x * h).sum(-1) / np.maximum(norm(x, axis=-1) * norm(h, axis=-1), 1e-8),  # a state may be 0
            "halting": state.memory["halting"][0].double().numpy(),
        }
        masses = [
            state.zero_attention[step.depth][0].double().numpy()
            for step in lm.schedule.cycles[number - 1]
            if step.depth in state.zero_attention
        ]
        if masses:
            by_token["zero_attention"] = np.mean(masses, (0, 1))
        found = {key: values.mean() for key, values in by_token.items()}
        found |= {f"{key}.last": values[-1] for key, values in by_token.items()}
        found["latent_rms"] = math.sqrt(((x - h) ** 2).mean())
        found["latent_rms.last"] = math.sqrt(((x - h)[-1] ** 2).mean())
        if masses:
            found["zero_attention.max"] = np.max(masses)
        found["fixed"] = number
        found["random"] = np.random.default_rng([0xE817, number]).random(N, dtype=np.float32)[self.row]
        return found


def walked(lm: Any, ids: Any, targets: Any, row: int) -> list[tuple[dict[str, float], float, int]]:
    """Signals, loss and right predictions of one sequence at every exit point, by plain loops."""
    found, reference = [], Reference(row)
    for number in range(1, CYCLES + 1):
        states = []
        for upto in (number - 1, number):
            state = lm.embed(torch.from_numpy(ids[row : row + 1]), with_mass=True)
            if lm.recurrence is None:
                lm.walk(lm.schedule.prelude, state)
                for cycle in range(upto):
                    lm.walk(lm.schedule.cycles[cycle], state)
                    lm.halting(cycle, state)
            elif upto:
                next(n for n in lm.cycles(state) if n == upto)
            else:
                lm.walk(lm.schedule.prelude, state)
                lm.recurrence.begin(state)
            states.append(state)
        logits = lm.lm_head(lm.read_out(states[1]))[0]
        goal = torch.from_numpy(targets[row])
        loss = cross_entropy(logits, goal, ignore_index=IGNORED, reduction="sum").item()
        signals = reference.at(lm, states[1], number, states[0].hidden, logits)
        found.append((signals, loss, int((logits.argmax(-1) == goal).sum())))
    return found


def test_rules_are_tried_on_a_model_that_is_initialised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever memory held before: PyTorch's deterministic mode fills it with what is no number."""
    monkeypatch.setattr(rules, "_found", dict(rules.items()))
    seen = []

    @register("tried")
    class Tried(Rule):
        leave = "above"

        def signal(self, view: View, previous: torch.Tensor | None) -> torch.Tensor:
            seen.append(view.hidden)
            return view.hidden.norm(dim=-1)

    torch.use_deterministic_algorithms(True)
    try:
        lm = model("ztt")
        assert "tried" in usable_rules(lm.variant, lm.model_shape) and seen[0].isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("name", CYCLED)
def test_the_trace_records_what_the_definitions_give(name: str, family: str) -> None:
    lm, (ids, targets) = model(name, family=family), data()
    trace = evaluate(lm, ids, targets, rules=all_rules())
    usable = {key for key in KEYS if not key.startswith("zero_attention") or lm.prefix is not None}
    assert set(trace.signals) == usable and set(trace.rules) == usable | {"oracle", "oracle.loss"}
    assert usable_rules(lm.variant, lm.model_shape) == trace.rules
    for row in range(N):
        for cycle, (signals, loss, correct) in enumerate(walked(lm, ids, targets, row)):
            assert trace.loss[row, cycle] == pytest.approx(loss, rel=1e-5)
            assert trace.correct[row, cycle] == correct
            for key, values in trace.signals.items():
                assert values[row, cycle] == pytest.approx(signals[key], rel=1e-3, abs=1e-5), (key, row, cycle)
    assert (trace.scored == (targets != IGNORED).sum(1)).all()


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(CYCLED), st.sampled_from(KEYS), st.integers(0, 3), st.floats(0, 1))
@torch.no_grad()
def test_a_threshold_in_the_trace_is_really_leaving_by_it(name: str, key: str, seed: int, where: float) -> None:
    """Sequence by sequence: run, look at every exit point, leave if the rule says so."""
    lm, (ids, targets), rule = model(name, seed), data(seed), get_rule(key)
    trace = evaluate(lm, ids, targets, rules=[rule])
    if key not in trace.signals:
        return
    seen = np.unique(trace.signals[key][:, :-1])
    gaps = np.diff(seen) > 1e-4 * (1 + abs(seen[:-1]))  # a threshold must not stand within rounding of a signal
    middles = [seen[0] - 1, *((seen[:-1] + seen[1:]) / 2)[gaps], seen[-1] + 1]
    threshold = float(middles[round(where * (len(middles) - 1))])
    left, loss, correct = [], 0.0, 0
    for row in range(N):
        state = lm.embed(torch.from_numpy(ids[row : row + 1]), with_mass=rule.reads_zero_attention)
        watch = SignalWatch([rule], torch.tensor([row]))
        for number in lm.cycles(state):
            if number == CYCLES or bool(rule.leaves(rule.pool(watch.look(lm, state, number)[1][key]), threshold)):
                break
        logits, goal = lm.lm_head(lm.read_out(state))[0], torch.from_numpy(targets[row])
        loss += cross_entropy(logits, goal, ignore_index=IGNORED, reduction="sum").item()
        correct += int((logits.argmax(-1) == goal).sum())
        left.append(number)
    assert trace.leave(key, threshold).tolist() == left
    cost, scored = trace.flops[rule.name], (targets != IGNORED).sum()
    costs = np.broadcast_to(cost, (N, CYCLES))  # of all sequences alike, but where each chooses its tokens
    spent = [costs[row, number - 1] for row, number in enumerate(left)]
    expected = {"flops_per_token": np.mean(spent), "mean_cycles": np.mean(left)}
    assert trace.score(key, threshold) == pytest.approx(
        {**expected, "loss": loss / scored, "accuracy": correct / scored}, rel=1e-5
    )


def signals_of(lm: Any, ids: Any, n_cycles: int | None = None) -> dict[str, list[torch.Tensor]]:
    state, watch = lm.embed(ids, with_mass=True, n_cycles=n_cycles), SignalWatch(all_rules())
    found: dict[str, list[torch.Tensor]] = {}
    for number in lm.cycles(state):
        for key, signal in watch.look(lm, state, number)[1].items():
            found.setdefault(key, []).append(signal)
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", CYCLED)
def test_no_signal_sees_later_tokens(name: str) -> None:
    lm, ids = model(name), tokens(2)
    before = signals_of(lm, ids)
    for changed in (1, LENGTH - 1):
        other = ids.clone()
        other[:, changed] = (other[:, changed] + 1) % VOCAB
        after = signals_of(lm, other)
        for key, values in before.items():
            for old, new in zip(values, after[key], strict=True):
                torch.testing.assert_close(old[:, :changed], new[:, :changed], rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", CYCLED)
def test_no_signal_sees_later_cycles(name: str) -> None:
    """What an exit point shows is the same whether one, two or four further cycles follow or none are ever run."""
    lm, ids = model(name), tokens(2)
    if lm.variant.elastic:
        pytest.skip("each cycle goes a part of the way that their number tells")
    whole = signals_of(lm, ids)
    for total in (2, 3, 5):
        for key, values in signals_of(lm, ids, n_cycles=total).items():
            known = min(total, CYCLES) - 1  # the last cycle is never looked at to decide
            assert all(torch.equal(a, b) for a, b in zip(values[:known], whole[key][:known], strict=True))


def test_no_rule_can_see_labels() -> None:
    """Neither the view nor what makes it is given any; and other labels leave every signal as it is."""
    assert not {"labels", "targets", "goal"} & {
        *inspect.signature(SignalWatch.look).parameters,
        *View.__dataclass_fields__,
    }
    lm, (ids, targets) = model(CYCLED[0]), data()
    first, second = (evaluate(lm, ids, goal, rules=all_rules()) for goal in (targets, targets[::-1].copy()))
    assert first.signals.keys() == second.signals.keys()
    assert all((second.signals[key] == values).all() for key, values in first.signals.items())


@torch.no_grad()
@pytest.mark.parametrize("key", KEYS)
def test_signals_stay_in_their_range(key: str) -> None:
    rule = get_rule(key)
    trace = evaluate(model("ztt"), *data(), rules=[rule])
    assert (trace.signals[key] >= rule.low - 1e-6).all() and (trace.signals[key] <= rule.high + 1e-6).all()


@torch.no_grad()
def test_a_batch_that_shrinks_goes_on_as_if_it_had_not() -> None:
    lm, ids = model("ztt"), tokens(N)
    whole, kept = signals_of(lm, ids), torch.tensor([1, 2, 5])
    state, watch = lm.embed(ids, with_mass=True), SignalWatch(all_rules())
    steps = lm.cycles(state)
    next(steps)
    watch.look(lm, state, 1)
    watch.keep(kept)
    state.hidden, state.embedded = state.hidden[kept], state.embedded[kept]
    state.memory["halting"] = state.memory["halting"][kept]
    next(steps)
    for key, signal in watch.look(lm, state, 2)[1].items():
        torch.testing.assert_close(signal, whole[key][1][kept], rtol=1e-5, atol=1e-6)


def test_padding_is_not_pooled() -> None:
    signal, real = torch.tensor([[9.0, 1.0, 3.0], [5.0, 2.0, 9.0]]), torch.tensor([[0, 1, 1], [1, 1, 0]])
    assert get_rule("latent_diff").pool(signal, real).tolist() == [2.0, 3.5]
    assert get_rule("latent_diff.last").pool(signal, real).tolist() == [3.0, 2.0]
    assert get_rule("zero_attention.max").pool(signal, real).tolist() == [3.0, 5.0]
    assert get_rule("latent_rms").pool(signal, real).tolist() == pytest.approx([math.sqrt(5), math.sqrt(14.5)])


def test_patience_counts_cycles_without_a_change() -> None:
    rule, previous, signals, then = get_rule("patience"), None, [], None
    for token in (2, 2, 2, 1, 1):
        now = Prediction(torch.eye(3)[token].log_softmax(-1)[None, None])
        view = View(1, torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), now, then, None, None, torch.arange(1))
        previous, then = rule.signal(view, previous), now
        signals.append(previous.item())
    assert signals == [0, 1, 2, 0, 1]


def test_names_are_checked() -> None:
    assert {"zero_attention", "halting", "fixed", "random"} <= set(rules.names())
    assert all(get_rule(key).key == key for key in KEYS)
    with pytest.raises(UserError, match=r"unknown exit rule 'entrpy'; did you mean 'entropy'"):
        get_rule("entrpy")
    with pytest.raises(UserError, match=r"unknown aggregate of rule entropy 'max'.* \(allowed: last, mean\)"):
        get_rule("entropy.max")
    with pytest.raises(UserError, match="exit rule name 'kl' is taken"):

        @register("kl")
        class Other(Rule):
            """Another."""

            leave = "above"
