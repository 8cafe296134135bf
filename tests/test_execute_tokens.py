"""Tokens that really leave early, against passes that compute everything, and the FLOPs against what is counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from settings import DEFAULTS, EVERY, FAMILIES, LENGTH, make, tokens
from torch.nn.functional import cross_entropy

from bench.config import IGNORED
from bench.errors import UserError
from bench.evaluate.rules import SignalWatch, get_rule
from bench.exits.execute import execute
from bench.exits.generation import EarlyExit
from bench.model.costs import measured_flops, pass_flops
from bench.model.counter import counted_flops
from bench.model.language_model import CycleForCausalLM

CHOOSES = "mor"  # its tokens by itself
cycled = [
    (name, options) for name, options in DEFAULTS if name != CHOOSES and make(name, options).schedule.n_cycles > 1
]
defaults = pytest.mark.parametrize(("name", "options"), cycled, ids=[name for name, _ in cycled])
N = 3


def data() -> tuple[Any, Any]:
    ids, targets = tokens(N).numpy(), tokens(N, seed=1).numpy()
    targets[::2, :5] = IGNORED
    return ids, targets


@torch.no_grad()
def middle(lm: CycleForCausalLM, key: str) -> list[float]:
    """For each exit point the median of the tokens' signals in a pass over other tokens: some leave and some do not."""
    rule, found = get_rule(key), []
    state = lm.embed(tokens(8, seed=5), with_mass=rule.reads_zero_attention)
    watch = SignalWatch([rule])
    for number in lm.cycles(state):
        if number < lm.schedule.n_cycles:
            found.append(float(watch.look(lm, state, number)[1][key].median()))
    return found


def own_rule(lm: CycleForCausalLM) -> str:
    return "zero_attention" if lm.prefix is not None else "latent_norm"


@defaults
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_it_is_generation_that_propagates_what_left(name: str, options: dict[str, Any], family: str) -> None:
    """Token by token, each with the whole past behind it in a cache, of which the skipped slots were filled."""
    lm, (ids, targets) = make(name, options, family).double(), data()
    key = own_rule(lm)
    threshold = middle(lm, key)
    done = execute(lm, ids, targets, key, threshold, granularity="token")
    cycle_of = {end + lm.schedule.n_coda: number for number, end in enumerate(lm.schedule.exits, 1)}
    lm.exits, cache, logits = EarlyExit(key, threshold, "propagate"), None, []
    for place in range(LENGTH):
        out = lm(torch.from_numpy(ids[:, place : place + 1]), cache=cache, use_cache=True)
        cache = out.cache
        logits.append(out.logits[:, 0])
    assert cache is not None
    assert done.cycle.tolist() == [[cycle_of[depth] for depth in row] for row in cache.exit_depth.tolist()]
    assert len(np.unique(done.cycle)) > 1
    goal = torch.from_numpy(targets)
    loss = cross_entropy(torch.stack(logits, 2).float(), goal, ignore_index=IGNORED, reduction="none").sum(1)
    np.testing.assert_allclose(done.loss, loss, rtol=1e-5)
    assert done.correct.tolist() == (torch.stack(logits, 1).argmax(-1) == goal).sum(1).tolist()
    assert done.scored.tolist() == (targets != IGNORED).sum(1).tolist()


@pytest.mark.parametrize("key", ["confidence", "kl", "patience", "random"])
@pytest.mark.parametrize("name", ["htc", "ztt", "relaxed"])
@torch.no_grad()
def test_it_is_the_whole_computation_with_states_held(name: str, key: str) -> None:
    """Against all tokens computed in every cycle, the new states of those that left being thrown away."""
    lm, (ids, targets), rule = make(name, {}, "llama").double(), data(), get_rule(key)
    threshold = [0.5, 0.5] if key == "random" else middle(lm, key)
    done = execute(lm, ids, targets, key, threshold, granularity="token", batch=2)
    for row in range(N):
        state = lm.embed(torch.from_numpy(ids[row : row + 1]))
        lm.start(state)
        watches = [SignalWatch([rule], torch.tensor([row * LENGTH + place])) for place in range(LENGTH)]
        cycles = torch.full((1, LENGTH), 3)
        for number in (1, 2, 3):
            state.active = cycles >= number
            lm.cycle(number - 1, state)
            logits = lm.lm_head(lm.read_out(state)).float()
            if number == 3:
                break
            for place, watch in enumerate(watches):
                signal = watch.look(lm, state, number, logits)[1][key][0, place]
                if cycles[0, place] == 3 and rule.leaves(signal, threshold[number - 1]):
                    cycles[0, place] = number
        state.active = None
        logits = lm.lm_head(lm.read_out(state)).float()
        assert done.cycle[row].tolist() == cycles[0].tolist()
        goal = torch.from_numpy(targets[row])
        loss = cross_entropy(logits[0], goal, ignore_index=IGNORED, reduction="sum").item()
        assert done.loss[row] == pytest.approx(loss, rel=1e-5)
        assert done.correct[row] == (logits[0].argmax(-1) == goal).sum()


@defaults
def test_all_or_none_leaving_is_what_sequences_do(name: str, options: dict[str, Any]) -> None:
    lm, (ids, targets) = make(name, options).double(), data()
    for each in ([-np.inf, -np.inf], [np.inf, -np.inf], [-np.inf, np.inf]):
        sequences, by_token = (
            execute(lm, ids, targets, "latent_diff", each, granularity=granularity)
            for granularity in ("sequence", "token")
        )
        assert (by_token.cycle == sequences.cycle[:, None]).all()
        np.testing.assert_allclose(by_token.loss, sequences.loss, rtol=1e-9)
        assert by_token.flops.tolist() == sequences.flops.tolist()
        assert by_token.scores == pytest.approx(sequences.scores)


@pytest.mark.parametrize(("name", "options", "family"), EVERY)
@pytest.mark.long
def test_executed_flops_are_the_counted_ones(name: str, options: dict[str, Any], family: str) -> None:
    lm, (ids, targets) = make(name, options, family), data()
    if name == CHOOSES or lm.schedule.n_cycles == 1:
        pytest.skip("no tokens that leave")
    assert pass_flops(lm, LENGTH).forward == measured_flops(lm, 1, LENGTH)
    lm.requires_grad_(False)
    depths: set[int] = set()
    for key in (own_rule(lm), "confidence"):
        threshold, found = middle(lm, key), []
        executed = counted_flops(
            lambda: found.append(execute(lm, ids, targets, key, threshold, granularity="token"))  # noqa: B023
        )
        assert executed == found[0].flops.sum()
        depths |= set(found[0].cycle.flatten().tolist())
    assert len(depths) > 1


@defaults
def test_no_token_leaves_by_what_comes_later(name: str, options: dict[str, Any]) -> None:
    lm, (ids, targets) = make(name, options).double(), data()
    changed, cut = ids.copy(), 7
    changed[:, cut:] = tokens(N, LENGTH - cut, seed=9).numpy()
    moved, rules = (
        False,
        ["latent_diff", "latent_rms", "cosine", "confidence", "kl", "entropy", "entropy_diff", "patience", "random"],
    )
    for key in [*rules, *(["zero_attention", "zero_attention.max"] if lm.prefix is not None else [])]:
        threshold = 0.5 if key == "random" else middle(lm, key)
        before, after = (execute(lm, x, targets, key, threshold, granularity="token").cycle for x in (ids, changed))
        assert (before[:, :cut] == after[:, :cut]).all()
        moved |= bool((before[:, cut:] != after[:, cut:]).any())
    assert moved


def test_what_cannot_leave_by_tokens() -> None:
    lm = make(CHOOSES, {})
    with pytest.raises(UserError, match=r"'mor' chooses the tokens of a cycle by itself \(allowed: sequence\)"):
        execute(lm, *data(), "latent_diff", middle(lm, "latent_diff"), granularity="token")
    with pytest.raises(UserError, match="'zero_attention' cannot be used with this 'htc' model"):
        execute(make("htc", {}), *data(), "zero_attention", 0.5, granularity="token")
