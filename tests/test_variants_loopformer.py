"""LoopFormer against its published equations, which are stated here on their own."""

from __future__ import annotations

import math

import pytest
import torch
from plain import embed, logits, run_block
from settings import LENGTH, make, tokens
from torch.nn.functional import linear, silu

from bench.config import EvalConfig
from bench.data.batches import arrays
from bench.data.task import task_data
from bench.evaluate.evaluation import evaluate
from bench.evaluate.record import examine
from bench.model.language_model import CycleForCausalLM, build_model
from bench.model.variant import get_variant


def embedding(layers: torch.nn.Sequential, value: float) -> torch.Tensor:
    """256 cosines and sines of a number, then two layers with SiLU between."""
    angles = [value * math.exp(-math.log(10000) * k / 128) for k in range(128)]
    waves = torch.tensor([*map(math.cos, angles), *map(math.sin, angles)])
    first, _, second = layers
    return linear(silu(linear(waves, first.weight, first.bias)), second.weight, second.bias)


def go(lm: CycleForCausalLM, x: torch.Tensor, way: list[float]) -> torch.Tensor:
    """The state after steps of these lengths."""
    part, hidden, t = lm.recurrence, embed(lm, x), 0.0
    for d in way:
        c = embedding(part.time, t) + embedding(part.step, d)
        told = linear(silu(c), part.modulation.weight, part.modulation.bias).view(4, 4, 16)
        for block in range(4):
            s, g = (dict(zip(("attention", "mlp"), told[block, at : at + 2], strict=True)) for at in (0, 2))

            def reads(branch: str, z: torch.Tensor, s: dict[str, torch.Tensor] = s) -> torch.Tensor:
                return z * (1 + s[branch])

            def gives(branch: str, update: torch.Tensor, g: dict[str, torch.Tensor] = g) -> torch.Tensor:
                return g[branch] * update

            hidden = run_block(lm, block, hidden, reads=reads, gives=gives)
        t += d
    return hidden


def model() -> CycleForCausalLM:
    lm = make("loopformer", {})
    with torch.no_grad():
        lm.recurrence.modulation.weight.mul_(0.1)  # else a rounding grows from cycle to cycle
    return lm


@torch.no_grad()
@pytest.mark.parametrize("n_cycles", [1, 2, 3, 5])
def test_any_number_of_cycles_goes_the_whole_way_in_equal_steps(n_cycles: int) -> None:
    lm, x = model(), tokens(2, 5)
    hidden = go(lm, x, [1 / n_cycles] * n_cycles)
    torch.testing.assert_close(lm(x, n_cycles=n_cycles).logits, logits(lm, hidden), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_leaving_early_is_to_stop_on_the_way() -> None:
    lm, x = model(), tokens(2, 5)
    state = lm.embed(x)
    for number in lm.cycles(state):
        found = lm.lm_head(lm.read_out(state))
        torch.testing.assert_close(found, logits(lm, go(lm, x, [1 / 3] * number)), rtol=1e-4, atol=1e-5)


def test_it_starts_as_no_block_at_all() -> None:
    lm, x = make("loopformer", {}, perturb=False), tokens()
    torch.testing.assert_close(lm(x).logits, logits(lm, embed(lm, x)))


def test_the_tested_cycles_are_those_of_the_model_run_for_so_many() -> None:
    data = task_data("p_hop", {"hops": 1, "length": LENGTH, "n_train": 8, "n_valid": 4, "n_test": 8})
    lm = build_model(get_variant("loopformer"), model().model_shape, data.vocab_size, data.length)
    lm.reset_parameters(0)
    torch.nn.init.normal_(lm.recurrence.modulation.weight, std=0.1)
    found = examine(lm, data, EvalConfig(max_cycles=4))
    for point in found.cycles:
        assert point.loss == evaluate(lm, *arrays(data.test), n_cycles=point.cycles).leaving(1)["loss"]
    assert len({point.loss for point in found.cycles}) == 4
    assert found.exits is not None and found.exits.points[-1].loss == pytest.approx(found.cycles[2].loss)
    assert found.exits.points[0].loss != pytest.approx(found.cycles[0].loss)
