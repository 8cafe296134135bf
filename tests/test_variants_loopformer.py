"""LoopFormer against its published equations, which are stated here on their own."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from plain import embed, logits, run_block
from settings import LENGTH, make, shape, tokens
from torch.nn.functional import cross_entropy, layer_norm, linear, silu

from bench.config import EvalConfig, Objective, TrainConfig, parse
from bench.data.batches import arrays
from bench.data.task import task_data
from bench.errors import UserError
from bench.evaluate.evaluation import evaluate
from bench.evaluate.record import examine
from bench.model.costs import training_flops
from bench.model.counter import counted_flops
from bench.model.language_model import CycleForCausalLM, build_model
from bench.model.losses import short_way
from bench.model.variant import get_variant
from bench.study.schema import Study
from bench.train.depths import draw_shortcuts, mean_step_flops
from bench.train.loop import Training, gradients, loss_of


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


@pytest.mark.parametrize("n_cycles", [2, 3, 8])
def test_the_second_pass_goes_the_whole_way_in_fewer_steps(n_cycles: int) -> None:
    """Their number is uniform from 1 to n - 1; each but the last is uniform among those that leave room."""
    rng = np.random.default_rng(0)
    drawn = [short_way(n_cycles, rng.integers) for _ in range(4000)]
    assert all(sum(way) == n_cycles and min(way) >= 1 for way in drawn)
    counts = np.bincount([len(way) for way in drawn], minlength=n_cycles)[1:]
    assert len(counts) == n_cycles - 1 and counts / 4000 == pytest.approx(1 / (n_cycles - 1), abs=0.03)
    firsts = np.bincount([way[0] for way in drawn if len(way) == 2], minlength=n_cycles)[1:]
    if n_cycles > 2:
        assert firsts / firsts.sum() == pytest.approx(1 / (n_cycles - 1), abs=0.06)


@pytest.mark.parametrize("way", [(3,), (1, 2), (2, 1)])
def test_its_loss_and_its_distance_are_added(way: tuple[int, ...]) -> None:
    """L + 0.1 L' + 0.1 mean (stop(x) - x')^2, x being what the head reads."""
    lm, x = model().train(), tokens(2, 5)
    targets = torch.cat([x[:, 1:], torch.full((2, 1), -100)], 1)
    losses, count = loss_of(TrainConfig(shortcut_loss=0.1), None, way), 8
    loss, full = losses(lm, x, targets, float(count))
    states = [layer_norm(go(lm, x, steps), (16,), lm.norm.weight, lm.norm.bias) for steps in ([1 / 3] * 3, _of(way))]
    each = [cross_entropy((s @ lm.tokens.weight.T).flatten(0, 1), targets.flatten()) for s in states]
    far = (states[0] - states[1]).square().mean()
    assert full.item() == pytest.approx(each[0].item(), rel=1e-4)
    assert loss.item() == pytest.approx((each[0] + 0.1 * each[1] + 0.1 * far).item(), rel=1e-4)


def _of(way: tuple[int, ...]) -> list[float]:
    return [part / sum(way) for part in way]


def test_no_gradient_flows_through_the_first_pass_to_the_distance() -> None:
    lm, x = model().double().train(), tokens(2, 5)
    (_, far) = lm(x, shortcut=(1, 2)).shortcut
    found = torch.autograd.grad(far, lm.blocks[0].mlp.up.weight)[0]
    with torch.no_grad():
        state = lm.embed(x)
        for _ in lm.cycles(state):
            pass
        whole = lm.read_out(state)
    state = lm.embed(x, n_cycles=2)
    state.way = (1, 2)
    for _ in lm.cycles(state):
        pass
    alone = (lm.read_out(state) - whole).square().mean()
    torch.testing.assert_close(found, torch.autograd.grad(alone, lm.blocks[0].mlp.up.weight)[0])


@pytest.mark.parametrize("name", ["loopformer", "htc", "vanilla"])
def test_the_second_pass_is_counted_to_the_last_flop_and_drawn_from_the_seed(name: str) -> None:
    data = task_data("p_hop", {"hops": 1, "length": LENGTH, "n_train": 16, "n_valid": 4, "n_test": 4})
    variant = get_variant(name)
    config = TrainConfig(steps=4, batch_size=2, device="cpu", shortcut_loss=0.1)
    histories = []
    for accumulation in (1, 2):
        lm = build_model(variant, shape(variant, "gpt2", n_cycles=4, activation="gelu"), data.vocab_size, data.length)
        lm.reset_parameters(0)
        run = Training(lm, data, config.model_copy(update={"accumulation": accumulation}), 0)
        counted = counted_flops(lambda run=run: run.advance(gradients([run])[0])) if accumulation == 1 else 0
        assert counted in (0, run.flops[0])
        for _ in range(config.steps - (accumulation == 1)):
            run.advance(gradients([run])[0])
        histories.append([p.detach().clone() for p in lm.parameters()])
    torch.testing.assert_close(histories[0], histories[1], rtol=1e-3, atol=1e-4)
    cycles = [None] * config.steps
    drawn = draw_shortcuts(config, lm, cycles, 0)
    assert drawn == run.shortcuts and (set(drawn) == {None}) == (name == "vanilla")
    if name != "vanilla":
        many = [None] * 30
        assert draw_shortcuts(config, lm, many, 0)[:4] == drawn != draw_shortcuts(config, lm, many, 1)[:4]
        once = training_flops(lm, LENGTH)
        assert once < mean_step_flops(lm, config, LENGTH) < 2 * once


def test_labels_train_the_second_pass_too() -> None:
    lm, x = model().train(), tokens(2, 5)
    plain = lm(x, labels=x).loss
    lm.train_for(Objective(shortcut_loss=0.1))
    torch.manual_seed(0)
    found = lm(x, labels=x)
    torch.manual_seed(0)
    way = short_way(3, lambda low, high: int(torch.randint(low, high, ())))
    targets = torch.cat([x[:, 1:], torch.full((2, 1), -100)], 1)
    assert found.loss.item() == pytest.approx(
        loss_of(TrainConfig(shortcut_loss=0.1), None, way)(lm, x, targets, 8.0)[0].item(), rel=1e-5
    )
    assert found.loss.item() > plain.item()
    assert lm.eval()(x, labels=x).shortcut is None


def test_the_name_stands_for_what_is_published() -> None:
    raw = {"name": "s", "question": "?", "tasks": ["p_hop"], "seeds": 1, "model": {"n_blocks": 2, "n_cycles": 2}}
    rows = ["loopformer", {"name": "loopformer", "label": "without", "train": {"shortcut_loss": 0.0}}]
    study = Study.model_validate({**raw, "variants": rows})
    for found in (study, Study.model_validate(study.model_dump(mode="json"))):
        weights = [found.cell_train(entry, found.tasks[0]).shortcut_loss for entry in found.variants]
        assert weights == [0.1, 0.0] and [entry.name for entry in found.variants] == ["loopformer"] * 2


@pytest.mark.parametrize(
    "other", [{"exit_loss": 1.0}, {"sequence_cycles": True}, {"backward_cycles": 1}, {"cuda_graphs": True}]
)
def test_what_it_cannot_be_trained_with_is_told(other: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="shortcut_loss"):
        parse(TrainConfig, {"shortcut_loss": 0.1, **other}, "train")
