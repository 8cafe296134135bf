"""Leaving early in generation, for every registered variant that is cycled."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from settings import DEFAULT_ID, DEFAULTS, FAMILIES, make, tokens
from torch import Tensor
from transformers.cache_utils import DynamicCache, StaticCache

from bench.errors import UserError
from bench.evaluate.rules import SignalWatch, get_rule
from bench.exits.cache import ExitCache
from bench.exits.generation import EarlyExit, Policy
from bench.model.language_model import CycleForCausalLM

defaults = pytest.mark.parametrize(("name", "options"), DEFAULTS, ids=DEFAULT_ID)
families = pytest.mark.parametrize("family", FAMILIES)
SETTINGS: dict[str, Any] = {"max_new_tokens": 7, "pad_token_id": 0, "return_dict_in_generate": True}
NEW = SETTINGS["max_new_tokens"]


def model(name: str, options: dict[str, Any], family: str = "gpt2") -> CycleForCausalLM:
    """In double precision: a rounding error must not turn a decision."""
    return make(name, options, family).double()


def prompts() -> dict[str, Tensor]:
    """Three prompts, padded on the left to 6 tokens."""
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[0, :3] = mask[1, :1] = 0
    return {"input_ids": tokens(3, 6), "attention_mask": mask}


@torch.no_grad()
def middle_threshold(lm: CycleForCausalLM, key: str) -> float:
    """The median of the last tokens' signals in a pass over other tokens: some leave there and some do not."""
    rule, found = get_rule(key), []
    state = lm.embed(tokens(16, 9, seed=5), with_mass=rule.reads_zero_attention)
    watch = SignalWatch([rule])
    for number in lm.cycles(state):
        if number < lm.schedule.n_cycles:
            found.append(watch.look(lm, state, number)[1][key][:, -1])
    return float(torch.cat(found).median()) if found else 0.0


def rules_of(lm: CycleForCausalLM) -> list[str]:
    """Chance, and a rule on the zero attention or else one that reads logits and remembers them."""
    return ["random", "zero_attention" if lm.prefix is not None else "kl"]


@defaults
@families
def test_recompute_is_generation_without_a_cache(name: str, options: dict[str, Any], family: str) -> None:
    lm, depths = model(name, options, family), set()
    for key in rules_of(lm):
        lm.exits = EarlyExit(key, 0.5 if key == "random" else middle_threshold(lm, key))
        cached = lm.generate(**prompts(), do_sample=False, output_logits=True, **SETTINGS)
        plain = lm.generate(**prompts(), do_sample=False, output_logits=True, use_cache=False, **SETTINGS)
        assert torch.equal(cached.sequences, plain.sequences)
        torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits))
        assert cached.cache.exit_depth.shape == (3, NEW)
        depths |= set(cached.cache.exit_depth.flatten().tolist())
    assert len(depths) > 1 or lm.schedule.n_cycles == 1


@defaults
@pytest.mark.long
def test_a_batch_decides_sequence_by_sequence(name: str, options: dict[str, Any]) -> None:
    lm, batch = model(name, options, "llama"), prompts()
    for kv in ("recompute", "propagate", "share_last", "share_first"):
        lm.exits = EarlyExit("latent_diff", middle_threshold(lm, "latent_diff"), kv)
        together = lm.generate(**batch, do_sample=False, **SETTINGS)
        for row in range(3):
            real = batch["attention_mask"][row].bool()
            one = batch["input_ids"][row, real][None]
            alone = lm.generate(one, attention_mask=torch.ones_like(one), do_sample=False, **SETTINGS)
            assert torch.equal(together.sequences[row, 6:], alone.sequences[0, real.sum() :])
            assert torch.equal(together.cache.exit_depth[row], alone.cache.exit_depth[0])


@defaults
@pytest.mark.parametrize("kv", ["recompute", "share_last"])
def test_never_leaving_is_the_plain_model(name: str, options: dict[str, Any], kv: Policy) -> None:
    lm = model(name, options)
    plain = lm.generate(**prompts(), do_sample=False, **SETTINGS)
    lm.exits = EarlyExit("latent_diff", -torch.inf, kv)
    assert torch.equal(lm.generate(**prompts(), do_sample=False, **SETTINGS).sequences, plain.sequences)


@defaults
@families
def test_propagated_keys_are_those_of_frozen_states(name: str, options: dict[str, Any], family: str) -> None:
    """Against one pass over all tokens in which a token's state is frozen from its exit on."""
    lm = model(name, options, family)
    if lm.recurrence is not None:
        pytest.skip("what it keeps between cycles is not frozen by a mask on states")
    lm.exits = EarlyExit("random", 0.5, "propagate")
    out = lm.generate(tokens(1, 6), attention_mask=torch.ones(1, 6), do_sample=False, output_logits=True, **SETTINGS)
    cycle_of = {end + lm.schedule.n_coda: number for number, end in enumerate(lm.schedule.exits, 1)}
    left = [cycle_of[depth] for depth in out.cache.exit_depth[0].tolist()]
    cycles = torch.tensor([left[0]] * 5 + left)  # the prompt's tokens leave together
    ids = out.sequences[:, :-1]
    state = lm.embed(ids)
    lm.start(state)
    for number in range(lm.schedule.n_cycles):
        state.active = (cycles > number)[None]
        lm.cycle(number, state)
    state.active = None
    logits = lm.lm_head(lm.read_out(state))[0, 5:]
    torch.testing.assert_close(torch.cat(out.logits), logits.float())


@pytest.mark.parametrize("kv", ["share_last", "share_first"])
@families
def test_shared_keys_are_copies_of_computed_ones(kv: Policy, family: str) -> None:
    """Against the full schedule token by token, skipped steps being undone and their slots overwritten."""
    lm = model("htc", {}, family)
    lm.exits = EarlyExit("random", 0.5, kv)
    out = lm.generate(tokens(1, 1), attention_mask=torch.ones(1, 1), do_sample=False, output_logits=True, **SETTINGS)
    lm.exits, cache, schedule = None, DynamicCache(), lm.schedule
    width = len(schedule.cycles[0])
    for place, depth in enumerate(out.cache.exit_depth[0].tolist()):
        left = (depth - 2) // width
        state = lm.embed(out.sequences[:, place : place + 1], cache=cache)
        lm.start(state)
        for number in range(schedule.n_cycles):
            kept = state.hidden
            lm.cycle(number, state)
            if number >= left:
                state.hidden = kept
        for step in schedule.steps[1 + left * width : -1]:
            source = cache.layers[1 + (step.depth - 1) % width + (0 if kv == "share_first" else (left - 1) * width)]
            cache.layers[step.depth].keys[:, :, -1] = source.keys[:, :, -1]
            cache.layers[step.depth].values[:, :, -1] = source.values[:, :, -1]
        torch.testing.assert_close(lm.lm_head(lm.read_out(state))[:, 0].float(), out.logits[place])
    assert len(out.cache.exit_depth.unique()) > 1


@defaults
@pytest.mark.parametrize("exits", [False, True])
@pytest.mark.long
def test_a_static_cache(name: str, options: dict[str, Any], exits: bool) -> None:
    """With exits it makes place for theirs, which grows; without it is used as it is."""
    lm = model(name, options, "llama")
    lm.exits = EarlyExit("latent_norm", middle_threshold(lm, "latent_norm")) if exits else None
    for mode in ({}, {"num_beams": 2}):
        plain = lm.generate(**prompts(), do_sample=False, use_cache=False, **mode, **SETTINGS)
        static = lm.generate(**prompts(), do_sample=False, cache_implementation="static", **mode, **SETTINGS)
        assert torch.equal(static.sequences, plain.sequences)
        assert isinstance(static.cache, ExitCache if exits else StaticCache)


def test_a_draft_model_and_looked_up_drafts() -> None:
    """A verified draft takes tokens back, which a cache with exits cannot; transformers says so."""
    lm, prompt = model("ztt", {}, "llama"), {"input_ids": tokens(1, 6)}
    plain = lm.generate(**prompt, do_sample=False, **SETTINGS).sequences
    for draft in ({"assistant_model": model("htc", {}, "llama")}, {"prompt_lookup_num_tokens": 2}):
        lm.exits = None
        assert torch.equal(lm.generate(**prompt, do_sample=False, **draft, **SETTINGS).sequences, plain)
        lm.exits = EarlyExit("latent_norm", 0.5)
        with pytest.raises(ValueError, match="requires a cache that can be cropped"):
            lm.generate(**prompt, do_sample=False, **draft, **SETTINGS)


@pytest.mark.parametrize("mode", [{"num_beams": 3, "do_sample": False}, {"do_sample": True}], ids=["beams", "sampling"])
def test_beams_and_sampling(mode: dict[str, Any]) -> None:
    lm = model("ztt", {}, "llama")
    lm.exits = EarlyExit("zero_attention", middle_threshold(lm, "zero_attention"))
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(lm.generate(**prompts(), use_cache=use_cache, **mode, **SETTINGS).sequences)
    assert torch.equal(*found)


def test_every_logit_and_depth_of_a_pass() -> None:
    """All positions' logits are those of the model with so many cycles, and they may be asked for a few at a time."""
    lm, x = model("ztt", {}), tokens(5)
    lm.exits = EarlyExit("zero_attention.last", middle_threshold(lm, "zero_attention.last"))
    out, few = lm(x), lm(x, logits_to_keep=2)
    lm.exits = None
    for row in range(5):
        number = lm.schedule.exits.index(int(out.exit_depth[row]) - lm.schedule.n_coda) + 1
        torch.testing.assert_close(out.logits[row], lm(x[row : row + 1], n_cycles=number).logits[0])
    torch.testing.assert_close(few.logits, out.logits[:, -2:])
    assert len(out.exit_depth.unique()) > 1


def test_a_random_rule_draws_anew_for_every_token() -> None:
    lm = model("htc", {})
    lm.exits = EarlyExit("random", 0.5)
    depths = lm.generate(**prompts(), do_sample=False, **SETTINGS).cache.exit_depth
    assert all(len(row.unique()) > 1 for row in depths)


def test_training_and_saving_do_not_know_of_exits(tmp_path: Path) -> None:
    lm, x = model("ztt", {}), tokens()
    full = lm(x).logits
    lm.exits = EarlyExit("zero_attention", 0.0)
    assert not torch.equal(lm(x).logits, full)
    assert torch.equal(lm.train()(x).logits, full)
    lm.save_pretrained(tmp_path)
    assert CycleForCausalLM.from_pretrained(tmp_path).exits is None


def test_errors() -> None:
    with pytest.raises(UserError, match=r"kv policy 'propagte'.*propagate"):
        EarlyExit("latent_diff", 0.5, "propagte")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="exit rule"):
        EarlyExit("latent_dif", 0.5)
    with pytest.raises(UserError, match=r"^unknown exit rule None"):
        EarlyExit(None, 0.5)  # type: ignore[arg-type]
    for threshold in ("0.9", None, math.nan, [0.5, math.nan], [], [[0.5]]):
        with pytest.raises(ValueError, match=r"^threshold: .*allowed: a number, or one for each exit point"):
            EarlyExit("latent_diff", threshold)  # type: ignore[arg-type]
    assert (
        EarlyExit("latent_diff", np.float32(0.5)).threshold
        == 0.5
        == EarlyExit("latent_diff", torch.tensor(0.5)).threshold
    )  # type: ignore[arg-type]
    lm, x = model("htc", {}), tokens()
    points = lm.schedule.n_cycles - 1
    for several in (points - 1, points + 1):
        lm.exits = EarlyExit("latent_diff", [0.5] * several)
        with pytest.raises(ValueError, match=f"threshold: {several} given .*one for each of {points} exits"):
            lm(x)
    for name, value in (("output_exits", True), ("output_zero_attention", True), ("backward_cycles", 1)):
        with pytest.raises(ValueError, match=f"{name}: .* with exits"):
            lm(x, **{name: value})
    right = torch.ones_like(x)
    right[1, -2:] = 0
    lm.exits = EarlyExit("latent_diff", 0.5)
    assert lm(x, attention_mask=right.flip(1)).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"^attention_mask: padding at the end .*allowed: on the left"):
        lm(x, attention_mask=right)
    lm.exits = EarlyExit("zero_attention", 0.5)
    with pytest.raises(UserError, match=r"'zero_attention' cannot be used with this 'htc' model"):
        lm(x)
    lm.exits = None
    cache = lm(x, use_cache=True).cache
    lm.exits = EarlyExit("latent_diff", 0.5)
    with pytest.raises(ValueError, match="filled without exits"):
        lm(x, cache=cache)
