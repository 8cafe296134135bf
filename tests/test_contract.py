"""What every registered variant promises, whatever it is. Nothing here names a variant."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from settings import (
    DEFAULT_ID,
    DEFAULTS,
    EVERY,
    FAMILIES,
    LENGTH,
    VOCAB,
    make,
    shape,
    shares_as_scheduled,
    tokens,
)
from torch.nn.functional import cross_entropy

from bench.config import TrainConfig
from bench.model.costs import (
    cache_bytes,
    costs,
    exit_flops,
    measured_flops,
    non_embedding,
    pass_flops,
    training_flops,
)
from bench.model.counter import flop_counter
from bench.model.language_model import CycleForCausalLM
from bench.model.variant import get_variant
from bench.train.optimizer import make_optimizer

every = pytest.mark.parametrize(("name", "options", "family"), EVERY)
defaults = pytest.mark.parametrize(("name", "options"), DEFAULTS, ids=DEFAULT_ID)
families = pytest.mark.parametrize("family", FAMILIES)


@every
def test_causality(name: str, options: dict[str, Any], family: str) -> None:
    lm, x = make(name, options, family), tokens()
    before = lm(x).logits
    if lm.variant.looks_ahead:
        changes = [
            (lm((x + (torch.arange(LENGTH) == LENGTH - 1) * add) % VOCAB).logits - before) for add in range(VOCAB)
        ]
        assert any(change[:, :-1].abs().max() > 1e-3 for change in changes)
        return
    for changed in (0, LENGTH // 2, LENGTH - 1):
        y = x.clone()
        y[:, changed] = (y[:, changed] + 1) % VOCAB
        after = lm(y).logits
        assert torch.equal(before[:, :changed], after[:, :changed])
        assert not torch.allclose(before[:, changed], after[:, changed])


@every
def test_gradients_reach_every_parameter(name: str, options: dict[str, Any], family: str) -> None:
    """Of the loss that is trained, in training mode."""
    lm, x = make(name, options, family).train(), tokens()
    out = lm(x)
    loss = cross_entropy(out.logits.flatten(0, 1), x.flatten())
    (loss if out.auxiliary_loss is None else loss + out.auxiliary_loss).backward()
    dead = [
        key for key, p in lm.named_parameters() if p.grad is None or not p.grad.flatten(1 if p.dim() > 1 else 0).any()
    ]
    assert not dead


@every
def test_flops_equal_the_counter_to_the_last_one(name: str, options: dict[str, Any], family: str) -> None:
    """What training executes: the model is in training mode (without dropout). Causal attention in full, and as each
    token sees the others.
    """
    lm, batch = make(name, options, family).train(), 3
    x = tokens(batch)
    with flop_counter("full") as full, flop_counter("executed") as executed:
        loss = cross_entropy(lm(x).logits.flatten(0, 1), x.flatten())
        forward = {"full": full.get_total_flops(), "executed": executed.get_total_flops()}
        loss.backward()
    for count, counter in (("full", full), ("executed", executed)):
        lm.model_shape = lm.model_shape.model_copy(update={"flops": count})
        assert batch * pass_flops(lm, LENGTH).forward == forward[count]
        assert batch * training_flops(lm, LENGTH) == counter.get_total_flops()
    assert forward["executed"] < forward["full"]


@defaults
def test_costs_are_those_of_the_model(name: str, options: dict[str, Any]) -> None:
    variant, lm = get_variant(name, options), make(name, options, "llama")
    found = costs(variant, shape(variant, "llama"), VOCAB, LENGTH)
    assert found.forward_flops_per_token * LENGTH == pass_flops(lm, LENGTH).forward
    assert found.train_flops_per_token * LENGTH == training_flops(lm, LENGTH)
    assert found.params_non_embedding == non_embedding(lm)
    assert found.kv_bytes_per_token == -(-cache_bytes(lm, LENGTH) // LENGTH)
    exits = exit_flops(lm, LENGTH)
    assert exits[-1] == found.forward_flops_per_token
    assert list(exits) == sorted(set(exits)) and len(exits) == lm.schedule.n_cycles


@defaults
def test_flops_of_the_long_form_equal_the_counter(name: str, options: dict[str, Any]) -> None:
    lm, length = make(name, options, "llama").train(), 520
    assert pass_flops(lm, length).forward == measured_flops(lm, 1, length)
    assert training_flops(lm, length) == measured_flops(lm, 1, length, training=True)


@defaults
@families
def test_activation_bytes_equal_what_autograd_keeps(name: str, options: dict[str, Any], family: str) -> None:
    variant = get_variant(name, options)
    lm = make(name, options, family, perturb=False)
    weights = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)  # a freed address could be handed out again and hide a tensor
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    lm.train()
    x = torch.zeros(1, LENGTH, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        cross_entropy(lm(x).logits.flatten(0, 1), x.flatten())
    real = sum(size for pointer, size in kept.items() if pointer not in weights)
    found = costs(variant, shape(variant, family), VOCAB, LENGTH).activation_bytes
    assert found == pytest.approx(real, rel=0.02)


@every
def test_kv_bytes_are_those_of_the_cache(name: str, options: dict[str, Any], family: str) -> None:
    variant, lm = get_variant(name, options), make(name, options, family)
    cache = lm(tokens(), use_cache=True).past_key_values
    kept = [tensor for layer in cache.layers if layer.is_initialized for tensor in (layer.keys, layer.values)]
    batch = tokens().shape[0]
    assert len(cache.layers) == variant.cache_slots(lm.schedule)
    assert sum(tensor.nbytes for tensor in kept) == batch * cache_bytes(lm, LENGTH)


@every
def test_round_trip(name: str, options: dict[str, Any], family: str, tmp_path: Path) -> None:
    lm, x = make(name, options, family), tokens()
    lm.save_pretrained(tmp_path)
    loaded = CycleForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(lm(x).logits, loaded(x).logits)
    assert loaded.config.variant == name and loaded.schedule == lm.schedule
    assert not list(tmp_path.glob("*.bin"))


@defaults
@families
def test_shared_blocks_stay_one_storage(name: str, options: dict[str, Any], family: str, tmp_path: Path) -> None:
    lm = make(name, options, family)
    assert shares_as_scheduled(lm)
    lm.save_pretrained(tmp_path)
    loaded = CycleForCausalLM.from_pretrained(tmp_path)
    assert shares_as_scheduled(loaded)
    assert shares_as_scheduled(copy.deepcopy(lm))
    assert shares_as_scheduled(lm.to(torch.float64).to(torch.float32))
    buffer = io.BytesIO()
    torch.save(lm.state_dict(), buffer)
    buffer.seek(0)
    fresh = make(name, options, family)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert shares_as_scheduled(fresh)
    # One update must reach every use of a shared block.
    before = [p.clone() for p in lm.blocks[0].parameters()]
    cross_entropy(lm(tokens()).logits.flatten(0, 1), tokens().flatten()).backward()
    make_optimizer(lm, TrainConfig()).step()
    assert shares_as_scheduled(lm)
    assert any(not torch.equal(a, b) for a, b in zip(before, lm.blocks[0].parameters(), strict=True))


@defaults
@families
def test_same_seed_same_model(name: str, options: dict[str, Any], family: str) -> None:
    first, second = (make(name, options, family, perturb=False) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    second.reset_parameters(1)
    assert not torch.equal(first.tokens.weight, second.tokens.weight)


@defaults
@families
def test_paired_seeds_share_initial_weights_where_shapes_agree(name: str, options: dict[str, Any], family: str) -> None:
    """Against the plain stack of as many steps: what has the same name and shape starts from the same draw."""
    lm = make(name, options, family, perturb=False)
    stack = make("vanilla", {}, family, perturb=False, n_blocks=lm.schedule.depth)
    other = dict(stack.named_parameters())
    shared = [key for key, p in lm.named_parameters() if key in other and other[key].shape == p.shape]
    assert any(key.startswith("blocks.") for key in shared)
    assert all(torch.equal(lm.get_parameter(key), other[key]) for key in shared)


@every
def test_cached_greedy_decoding_equals_decoding_without_cache(name: str, options: dict[str, Any], family: str) -> None:
    lm, x = make(name, options, family), tokens(3, 5)
    if lm.variant.looks_ahead:
        pytest.skip("what it generates is not what it is tested by")
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached = lm.generate(x, use_cache=True, **settings)
    assert torch.equal(cached, lm.generate(x, use_cache=False, **settings))


@defaults
@families
def test_left_padding_changes_nothing(name: str, options: dict[str, Any], family: str) -> None:
    lm, x = make(name, options, family), tokens(2, 6)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), x], 1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(x)], 1)
    logits = lm(padded, attention_mask=mask).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[:, 3:], lm(x).logits, rtol=1e-4, atol=1e-5)


@every
def test_leaving_at_an_exit_point_is_the_model_with_fewer_cycles(
    name: str, options: dict[str, Any], family: str
) -> None:
    """What coda and head give after cycle c is the model run for c cycles, where every cycle ends in an exit point."""
    lm, x = make(name, options, family), tokens()
    if lm.variant.elastic:
        pytest.skip("with fewer cycles it goes the whole way in longer steps")
    cycled = lm.schedule.n_cycles == lm.model_shape.n_cycles
    state = lm.embed(x)
    for number in lm.cycles(state):
        expected = lm(x, n_cycles=number if cycled else None).logits
        torch.testing.assert_close(lm.lm_head(lm.read_out(state)), expected)
    assert torch.equal(lm.lm_head(lm.read_out(state)), lm(x).logits)


@defaults
@pytest.mark.parametrize("family", FAMILIES[-1:])
def test_more_cycles_than_it_was_built_with(name: str, options: dict[str, Any], family: str) -> None:
    """Every variant runs for another number of cycles, and its costs are counted there as well."""
    lm, x = make(name, options, family), tokens(3)
    for n_cycles in (1, 5):
        lm.eval()
        if n_cycles == 1 or lm.variant.cycled:
            assert lm(x, n_cycles=n_cycles).logits.isfinite().all()
        lm.train()
        assert lm.schedule_at(n_cycles).n_blocks == lm.schedule.n_blocks
        forward, training = pass_flops(lm, LENGTH, n_cycles).forward, training_flops(lm, LENGTH, n_cycles)
        assert 3 * forward == measured_flops(lm, 3, LENGTH, n_cycles=n_cycles)
        assert 3 * training == measured_flops(lm, 3, LENGTH, training=True, n_cycles=n_cycles)
