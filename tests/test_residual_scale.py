"""Updates of the residual stream scaled by lambda / (N sqrt(L)), stated here on its own, and what stays as it is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from plain import embed, logits, run_block
from settings import make, shape, tokens
from torch.nn.functional import cross_entropy

from bench.config import Cell, ModelConfig, TrainConfig, parse
from bench.errors import UserError
from bench.model.schedule import residual_scales
from bench.model.variant import get_variant
from bench.run.renaming import former_ids

STORED = "21a0b08931673d7b83f1670a74decf0ee6837d44db2ba98dff3012b731ea988d"
LAMBDA = 1.7


def run(lm: Any, x: torch.Tensor, steps: list[tuple[int, float]]) -> torch.Tensor:
    """Logits of the blocks one after the other, each with its factor."""
    hidden = embed(lm, x)
    for block, scale in steps:
        hidden = run_block(lm, block, hidden, scale=scale)
    return logits(lm, hidden)


@pytest.mark.parametrize("n_cycles", [3, 1, 5], ids=["as built", "fewer cycles", "more cycles"])
def test_every_update_is_scaled_by_the_uses_of_its_block_and_the_number_of_blocks(n_cycles: int) -> None:
    """Built with three cycles: at any other number the factors stay."""
    lm, x = make("htc", {}, residual_scale=LAMBDA), tokens(2, 5)
    once, cycled = LAMBDA / math.sqrt(4), LAMBDA / (3 * math.sqrt(4))
    steps = [(0, once), *[(1, cycled), (2, cycled)] * n_cycles, (3, once)]
    torch.testing.assert_close(lm(x, n_cycles=n_cycles).logits, run(lm, x, steps))


@pytest.mark.parametrize(
    ("name", "blocks", "uses"),
    [("vanilla", 4, [1] * 4), ("bc", 4, [3] * 4), ("albert", 1, [3]), ("middle_sequence", 4, [1, 3, 3, 1])],
)
def test_the_factors_follow_from_the_schedule(name: str, blocks: int, uses: list[int]) -> None:
    variant = get_variant(name)
    schedule = variant.schedule(shape(variant, "gpt2", n_blocks=blocks))
    assert residual_scales(schedule, LAMBDA) == pytest.approx([LAMBDA / (n * math.sqrt(blocks)) for n in uses])


def test_the_factor_is_on_the_update_that_a_gate_merges() -> None:
    lm, x = make("ztt", {"zero_tokens": 0, "gating": "scalar"}, residual_scale=LAMBDA), tokens(2, 5)
    assert lm.gate is not None
    opened = [
        float(logit) for logit in lm.gate.logit.detach().sigmoid()
    ]  # by cycle, then by block, as the rows are made
    once, cycled = LAMBDA / 2, LAMBDA / 6
    inner = [(1 + number % 2, cycled * open) for number, open in enumerate(opened)]
    torch.testing.assert_close(lm(x).logits, run(lm, x, [(0, once), *inner, (3, once)]))


@pytest.mark.parametrize(
    ("name", "options", "strength"),
    [
        ("vanilla", {}, 2.0),
        ("bc", {}, 6.0),
        ("sequence", {}, 6.0),
        ("universal", {}, 6.0),
        ("mesh", {"n_prelude": 0, "n_coda": 0}, 6.0),
    ],
)
def test_a_factor_of_one_is_the_plain_model_to_the_last_bit(
    name: str, options: dict[str, Any], strength: float
) -> None:
    plain, scaled = make(name, options), make(name, options, residual_scale=strength)
    scaled.load_state_dict(plain.state_dict())
    assert set(scaled.residual_scales or ()) == {1.0} and plain.residual_scales is None
    assert torch.equal(plain(tokens()).logits, scaled(tokens()).logits)


def test_weights_are_drawn_as_large_for_any_number_of_cycles() -> None:
    drawn = {cycles: make("bc", {}, perturb=False, n_cycles=cycles, residual_scale=LAMBDA) for cycles in (1, 6)}
    for one, six in zip(drawn[1].parameters(), drawn[6].parameters(), strict=True):
        assert torch.equal(one, six)
    plain = make("bc", {}, perturb=False, n_cycles=6)
    for block, other in zip(drawn[6].blocks, plain.blocks, strict=True):
        torch.testing.assert_close(block.mlp.out.weight, other.mlp.out.weight * math.sqrt(2 * 24))
        assert torch.equal(block.mlp.up.weight, other.mlp.up.weight)


@pytest.mark.parametrize("name", ["htc", "ztt", "mor", "relaxed"])
def test_recomputed_activations_give_the_same_gradients(name: str) -> None:
    found = []
    for again in (False, True):
        lm = make(name, {}, "llama", residual_scale=LAMBDA).train()
        lm.gradient_checkpointing = again
        cross_entropy(lm(tokens()).logits.flatten(0, 1), tokens().flatten()).backward()
        found.append([parameter.grad for parameter in lm.parameters()])
    for kept, made in zip(*found, strict=True):
        assert (kept is None and made is None) or torch.equal(kept, made)


@pytest.mark.parametrize("name", ["htc", "ztt"])
def test_bfloat16_is_near_and_stays_bfloat16(name: str) -> None:
    lm, x = make(name, {}, perturb=False, residual_scale=LAMBDA), tokens()
    whole = lm(x).logits
    with torch.autocast("cpu", torch.bfloat16):
        mixed = lm(x).logits
    torch.testing.assert_close(mixed.float(), whole, atol=0.05, rtol=0.05)
    assert lm.to(torch.bfloat16)(x).logits.dtype == torch.bfloat16


def test_a_stored_cell_keeps_its_id() -> None:
    """One that an earlier version has run."""
    cell = Cell(
        variant="ztt",
        options=get_variant("ztt").options.model_dump(mode="json"),
        model=ModelConfig(d_model=16, n_heads=2, n_blocks=3, n_cycles=2),
        train=TrainConfig(steps=30, batch_size=8, lr=3e-3),
        task="p_hop",
        task_options={"n_train": 500, "n_valid": 100, "n_test": 100, "seed": 0}
        | {"hops": 1, "length": 12, "alphabet": 4, "dense": True},
        seed=1,
        fingerprint="deaf78f16c3b88a2ca7fb175cc643c8c1106a07311d65f13ab901db8ed760f92",
    )
    assert STORED in former_ids(cell, {})
    told = cell.model_dump(mode="json")
    assert told["model"].pop("residual_scale", 0) is None and Cell.model_validate(told).id == cell.id
    others = [cell.model_copy(update={"model": cell.model.model_copy(update={"residual_scale": x})}) for x in (1.0, 2)]
    assert len({cell.id, *(other.id for other in others)}) == 3
    assert Cell.model_validate_json(others[0].model_dump_json()).id == others[0].id


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "much"])
def test_a_strength_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match=r"model\.residual_scale"):
        parse(ModelConfig, {"residual_scale": value}, "model")
