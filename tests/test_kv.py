"""Keys and values that the cycles of a block share: the formula stated here on its own, and all that the contract asks
for. ``mor`` is refused.
"""

from __future__ import annotations

import pytest
import test_contract as contract
import test_execute_tokens as by_token
import test_generation as generation
import torch
from plain import embed, keys_and_values, logits, run_block
from settings import LENGTH, SHARED, make, shape, tokens

from bench.config import Cell, ModelConfig, TrainConfig
from bench.errors import InputError, UserError
from bench.exits.execute import execute
from bench.exits.generation import EarlyExit
from bench.model.costs import cache_bytes, meta_model
from bench.model.variant import get_variant, variants
from bench.study.shapes import relevant
from bench.train.loop import loss_of
from bench.train.packing import run_stacked

VARIANTS = ["bc", "ztt", "relaxed", "recurrent", "universal"]
several = pytest.mark.parametrize("name", VARIANTS)


def test_later_cycles_read_what_the_first_has_made() -> None:
    lm, x = make("htc", {}, kv="first"), tokens(2, 5)
    hidden, made = run_block(lm, 0, embed(lm, x)), {}
    for cycle in range(3):
        for block in (1, 2):
            if cycle == 0:
                made[block] = keys_and_values(lm, block, hidden)
            hidden = run_block(lm, block, hidden, keys=made[block])
    torch.testing.assert_close(lm(x).logits, logits(lm, run_block(lm, 3, hidden)))
    assert not torch.allclose(lm(x).logits, make("htc", {})(x).logits, atol=1e-3)


@several
def test_what_is_shared_keeps_the_contract(name: str) -> None:
    contract.test_causality(name, {}, SHARED)
    contract.test_gradients_reach_every_parameter(name, {}, SHARED)
    contract.test_flops_equal_the_counter_to_the_last_one(name, {}, SHARED)
    contract.test_cached_greedy_decoding_equals_decoding_without_cache(name, {}, SHARED)
    contract.test_leaving_at_an_exit_point_is_the_model_with_fewer_cycles(name, {}, SHARED)
    contract.test_more_cycles_than_it_was_built_with(name, {}, SHARED)
    contract.test_left_padding_changes_nothing(name, {}, SHARED)


@pytest.mark.long
@several
def test_what_is_shared_keeps_the_contract_of_exits(name: str) -> None:
    generation.test_recompute_is_generation_without_a_cache(name, {}, SHARED)
    if make(name, {}).schedule.n_cycles > 1:
        by_token.test_it_is_generation_that_propagates_what_left(name, {}, SHARED)
        lm, (ids, targets) = make(name, {}, SHARED).double(), by_token.data()
        done = execute(lm, ids, targets, "latent_diff", by_token.middle(lm, "latent_diff"))
        for row, cycle in enumerate(done.cycle):
            alone = execute(lm, ids[row : row + 1], targets[row : row + 1], None, n_cycles=int(cycle))
            assert alone.loss[0] == pytest.approx(done.loss[row], rel=1e-6)
            assert alone.flops[0] == done.flops[row]


@pytest.mark.parametrize("kv", ["first", "last"])
@several
def test_the_cache_holds_one_cycle_and_its_bytes_are_counted(name: str, kv: str) -> None:
    lm = make(name, {}, "llama", kv=kv)
    cache = lm(tokens(), use_cache=True).past_key_values
    kept = [tensor for layer in cache.layers if layer.is_initialized for tensor in (layer.keys, layer.values)]
    told = cache_bytes(lm, LENGTH)
    assert sum(tensor.nbytes for tensor in kept) == len(tokens()) * told
    own = cache_bytes(make(name, {}, "llama"), LENGTH)
    extra = 4 * LENGTH * sum(lm.variant.remembered(lm.schedule))
    assert (told - extra) * lm.schedule.depth == (own - extra) * lm.schedule.n_blocks


@several
def test_a_cache_of_the_last_cycle_changes_generation_alone(name: str) -> None:
    """The new token sees of the prompt what its last cycle has made, in every cycle."""
    lm, own, x = make(name, {}, kv="last"), make(name, {}), tokens(2, 6)
    assert torch.equal(lm(x).logits, own(x).logits)
    first, second = (model(x[:, :5], use_cache=True).past_key_values for model in (lm, own))
    for step in own.schedule.steps:
        last = max(other.depth for other in own.schedule.steps if other.block == step.block)
        layer = lm.schedule.first_use[step.block]
        torch.testing.assert_close(first.layers[layer].keys, second.layers[last].keys)
        for field in ("keys", "values"):  # what an own cache holds, in all cycles
            setattr(second.layers[step.depth], field, getattr(first.layers[layer], field).clone())
    found, expected = (model(x[:, 5:], cache=cache).logits for model, cache in ((lm, first), (own, second)))
    torch.testing.assert_close(found, expected)


def test_leaving_early_with_a_cache_of_the_last_cycle() -> None:
    lm, x = make("ztt", {}, kv="last"), tokens(2, 6)
    lm.exits = EarlyExit("random", 0.5)
    with pytest.raises(InputError, match=r"kv: 'recompute' with model\.kv = 'last'"):
        lm(x, use_cache=True)
    found = []
    for kv in ("propagate", "share_last"):
        lm.exits = EarlyExit("random", 0.5, kv)  # type: ignore[arg-type]
        found.append(lm.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=4, do_sample=False))
    assert torch.equal(*found)
    lm.exits = EarlyExit("latent_diff", -torch.inf, "share_last")
    never = lm.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=4, do_sample=False)
    lm.exits = None
    assert torch.equal(lm.generate(x, max_new_tokens=4, do_sample=False), never)


@pytest.mark.parametrize("name", ["htc", "relaxed"])
def test_it_is_trained_in_stacks_recomputed_and_in_bfloat16(name: str) -> None:
    lm, x, losses = make(name, {}, SHARED).train(), tokens(4), loss_of(TrainConfig(), None)
    whole = losses(lm, x, x, 4.0)[0]
    whole.backward()
    kept = [parameter.grad.clone() for parameter in lm.parameters()]
    lm.zero_grad()
    lm.gradient_checkpointing = True
    losses(lm, x, x, 4.0)[0].backward()
    for grad, parameter in zip(kept, lm.parameters(), strict=True):
        assert torch.equal(grad, parameter.grad)
    lm.gradient_checkpointing = False
    stacked, _ = run_stacked([lm, lm], losses, torch.stack([x, x]), torch.stack([x, x]), torch.full((2,), 4.0))
    torch.testing.assert_close(stacked, whole.detach().expand(2))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(losses(lm, x, x, 4.0)[0], whole.detach(), rtol=0.05, atol=0.05)


def test_it_is_refused_where_cycles_run_on_different_tokens() -> None:
    for name in variants.names():
        variant = get_variant(name)
        model = shape(variant, "llama", kv="first")
        if name in ("mor", "gated_kv"):
            with pytest.raises(UserError, match=rf"model\.kv: 'first' with '{name}'"):
                meta_model(variant, model, 19, 12)
        else:
            meta_model(variant, model, 19, 12)


def test_a_variant_without_cycles_has_nothing_to_share() -> None:
    assert relevant(get_variant("vanilla"), ModelConfig(kv="first")).kv == "own"
    assert relevant(get_variant("htc"), ModelConfig(kv="first")).kv == "first"
    told = {"variant": "htc", "options": {}, "train": {}, "task": "p_hop", "task_options": {}, "seed": 0}
    first, second = (Cell(**told, model={"kv": kv}, fingerprint="f").id for kv in ("own", "first"))  # type: ignore[arg-type]
    assert first != second and first == Cell(**told, model={}, fingerprint="f").id  # type: ignore[arg-type]
