"""Losses that read every exit point: their formulas written out, their cost, and that they train what they should."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from settings import DEFAULTS, FAMILIES, LENGTH, halts, make, tokens
from torch.nn.functional import cross_entropy

from bench.config import IGNORED, ModelConfig, TrainConfig
from bench.data.task import TaskData, get_task, task_data
from bench.errors import UserError
from bench.evaluate.evaluation import evaluate
from bench.evaluate.rules import get_rule
from bench.model.costs import (
    cycle_flops,
    head_flops,
    measured_flops,
    meta_model,
    pass_flops,
    step_flops,
    training_flops,
)
from bench.model.counter import counted_flops as counted
from bench.model.language_model import CycleForCausalLM, build_model
from bench.model.losses import exit_losses, halting_chances, halting_penalty
from bench.model.variant import get_variant
from bench.run.status import planned_flops
from bench.study.load import study_from
from bench.study.plan import make_plan
from bench.train.depths import draw_cycles, flops_by_step, mean_step_flops
from bench.train.loop import train

CYCLED = [name for name, _ in DEFAULTS if make(name, {}).schedule.n_cycles > 1]
KINDS = ("gate_cdf", "pondernet", "act")


def targets() -> torch.Tensor:
    goal = tokens(seed=1)
    goal[0, :4] = IGNORED
    return goal


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_formula_token_by_token(kind: Any) -> None:
    """p_t from the gate's own lambdas and the penalties as their papers write them, with plain loops."""
    config = TrainConfig(halting_loss=kind, halting_weight=0.3, halting_prior=0.4)
    lm, ids, goal = make("ztt", {}, halting="gate"), tokens(), targets()
    out = lm(ids, output_exits=True)
    state, total, last = lm.embed(ids), 0.0, 0.0
    logs, lambdas = [], []
    for _ in lm.cycles(state):
        logs.append(lm.lm_head(lm.read_out(state)).log_softmax(-1).tolist())
        lambdas.append(torch.sigmoid(lm.halting.linear(state.hidden)).squeeze(-1).tolist())
    prior = np.array([0.4, 0.4 * 0.6, 0.4 * 0.36])
    prior /= prior.sum()
    for row in range(len(ids)):
        for t in range(LENGTH):
            if goal[row, t] == IGNORED:
                continue
            chances, left = [], 1.0
            for cycle in range(2):
                chances.append(left * lambdas[cycle][row][t])
                left *= 1 - lambdas[cycle][row][t]
            chances.append(left)
            at = [-log[row][t][goal[row, t]] for log in logs]
            penalty = {
                "gate_cdf": sum(p * math.log(p) for p in chances),
                "pondernet": sum(p * math.log(p / q) for p, q in zip(chances, prior, strict=True)),
                "act": sum(p * number for number, p in enumerate(chances, 1)),
            }[kind]
            total += sum(p * loss for p, loss in zip(chances, at, strict=True)) + 0.3 * penalty
            last += at[-1]
    full, loss = exit_losses(out, goal, config)
    assert (full.item(), loss.item()) == (pytest.approx(last, rel=1e-5), pytest.approx(total, rel=1e-5))


def test_fixed_weights_are_a_weighted_mean() -> None:
    lm, ids, goal = make("htc", {}), tokens(), targets()
    out = lm(ids, output_exits=True)
    single = [exit_losses(lm(ids, n_cycles=number), goal, TrainConfig())[0].item() for number in (1, 2, 3)]
    last, loss = exit_losses(out, goal, TrainConfig(exit_loss=0.5))
    assert last.item() == pytest.approx(single[2], rel=1e-5)
    assert loss.item() == pytest.approx((single[2] + 0.25 * (single[0] + single[1])) / 1.5, rel=1e-5)


def test_chances_at_the_ends_have_finite_gradients() -> None:
    """A gate that is sure gives chances of exactly 0 and 1; what it is sure of must not become NaN."""
    lambdas = torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, 1.0]], requires_grad=True)
    chances = halting_chances([lambdas[0], 1 - (1 - lambdas[0]) * (1 - lambdas[1])])
    torch.testing.assert_close(chances.sum(0), torch.ones(3))
    assert chances.T.tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]
    for kind in KINDS:
        lambdas.grad = None
        halting_penalty(chances, TrainConfig(halting_loss=kind)).sum().backward(retain_graph=True)
        assert lambdas.grad is not None and lambdas.grad.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CYCLED)
@pytest.mark.long
def test_training_flops_equal_the_counter_to_the_last_one(name: str, family: str) -> None:
    batch, ids = 2, tokens()
    for halting, config in (
        ("none", TrainConfig(exit_loss=1.0)),
        ("gate", TrainConfig(halting_loss="gate_cdf")),
    ):
        if halting == "gate" and halts(make(name, {}, family)):
            halting = "none"
        lm = make(name, {}, family, halting=halting).train()

        def run(lm: Any = lm, config: Any = config) -> None:
            exit_losses(lm(ids, output_exits=True), ids, config)[1].backward()

        assert counted(run) == batch * training_flops(lm, LENGTH, every_exit=True)
        assert measured_flops(lm, batch, LENGTH) == batch * pass_flops(lm, LENGTH).forward


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("recurrent", {"injection": "parcae"}),
        *((name, {"n_prelude": 0}) for name in ("ztt", "mesh", "anchor")),
        *(("mor", {"n_prelude": 0, "routing": routing}) for routing in ("token", "expert")),
    ],
)
def test_what_gradients_are_not_passed_is_not_counted(name: str, options: dict[str, Any]) -> None:
    lm, ids = make(name, options).train(), tokens()

    def run() -> None:
        cross_entropy(lm(ids, backward_cycles=1).logits.flatten(0, 1), targets().flatten()).backward()

    found = counted(run)
    assert found == 2 * training_flops(lm, LENGTH, backward_cycles=1) < 2 * training_flops(lm, LENGTH)


def test_the_gate_costs_one_column_after_every_cycle_but_the_last() -> None:
    plain, gated = make("htc", {}), make("htc", {}, halting="gate")
    for cycle, more in ((0, 2 * LENGTH * 16), (1, 2 * LENGTH * 16), (2, 0)):
        costs = [cycle_flops(lm, lm.schedule, cycle, LENGTH).forward for lm in (plain, gated)]
        assert costs[1] - costs[0] == more
    every = training_flops(plain, LENGTH, every_exit=True) - training_flops(plain, LENGTH)
    coda = step_flops(plain, plain.schedule.coda, LENGTH) + head_flops(plain, LENGTH)
    assert every == 2 * coda.training


@pytest.mark.parametrize(
    "change",
    [{"random_cycles": True}, {"sequence_cycles": True}, {"cycles_schedule": {"start": 1, "share": 1.0}}],
)
def test_a_budget_counts_the_cycles_that_will_run(change: dict[str, Any]) -> None:
    """To the last where a curriculum gives their numbers, as expected where they are drawn."""
    config = TrainConfig(steps=400, batch_size=4, **change)
    lm = make("htc", {})
    runs = [draw_cycles(config, lm.model_shape.n_cycles, seed) for seed in (20, 21)]
    done = [flops_by_step(lm, config, LENGTH, cycles, [None] * config.steps)[-1] for cycles in runs]
    planned = config.steps * config.batch_size * mean_step_flops(lm, config, LENGTH)
    assert planned == pytest.approx(done[0], rel=0.05 if runs[0] != runs[1] else 1e-12)
    assert abs(planned / (config.steps * config.batch_size * training_flops(lm, LENGTH)) - 1) > 0.1


@pytest.mark.parametrize("change", [{"exit_loss": 0.3}, {"backward_cycles": 1}, {}])
def test_what_is_planned_is_what_will_be_done(change: dict[str, Any]) -> None:
    raw = {
        "name": "planned",
        "question": "q",
        "model": {"d_model": 16, "n_heads": 2, "n_blocks": 4},
        "train": {"steps": 7, "batch_size": 3, **change},
        "tasks": [{"name": "p_hop", "options": {"hops": 1, "n_train": 50, "n_valid": 10, "n_test": 20}}],
        "variants": ["htc"],
        "seeds": 1,
    }
    (planned,) = make_plan(study_from(raw, (), "planned"), "", None).cells
    config, data = planned.cell.train, task_data("p_hop", planned.cell.task_options)
    lm = meta_model(get_variant("htc"), planned.cell.model, data.vocab_size, data.length)
    done = flops_by_step(lm, config, data.length, [None] * config.steps, [None] * config.steps)
    assert planned_flops([planned]) == {("htc", "p_hop"): done[-1]}
    assert (done[-1] == 21 * training_flops(lm, data.length)) == (not change)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gated_model_is_saved_and_loaded(family: str, tmp_path: Any) -> None:
    lm, ids = make("ztt", {}, family, halting="gate"), tokens()
    lm.save_pretrained(tmp_path)
    loaded = CycleForCausalLM.from_pretrained(tmp_path).eval()
    for mine, theirs in zip(*(m(ids, output_exits=True).halting for m in (lm, loaded)), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(lm(ids).logits, lm(ids, output_exits=True).logits)


def test_gradients_reach_the_gate() -> None:
    lm, ids = make("bc", {}, halting="gate"), tokens()
    exit_losses(lm(ids, output_exits=True), ids, TrainConfig(halting_loss="act"))[1].backward()
    assert lm.halting.linear.weight.grad.abs().min() > 0 and lm.halting.linear.bias.grad.abs() > 0


@pytest.fixture(scope="module")
def data() -> TaskData:
    return get_task("p_hop", {"hops": 1, "length": 16, "n_train": 64, "n_valid": 32, "n_test": 32}).build()


def trained(data: TaskData, model: dict[str, Any], **config: Any) -> tuple[Any, list[dict[str, float]], Any]:
    shape = ModelConfig(d_model=16, n_heads=2, n_blocks=3, n_cycles=3, **model)
    lm = build_model(get_variant("htc"), shape, data.vocab_size, data.length)
    lm.reset_parameters(0)
    history = train(lm, data, TrainConfig(batch_size=8, lr=3e-3, eval_sequences=32, **config), 0)
    ids, goal = (np.array(data.valid[name]) for name in ("input_ids", "targets"))
    return lm, history, evaluate(lm, ids, goal, rules=[get_rule(key) for key in ("fixed", "halting.last")])


def test_training_the_exits_makes_them_better(data: TaskData) -> None:
    _, _, plain = trained(data, {}, steps=60)
    _, _, exits = trained(data, {}, steps=60, exit_loss=1.0)
    assert exits.leaving(1)["loss"] < 0.95 * plain.leaving(1)["loss"]


def test_a_price_on_depth_makes_the_gate_halt_sooner(data: TaskData) -> None:
    halted = []
    for weight in (0.0, 3.0):
        _, history, trace = trained(data, {"halting": "gate"}, steps=60, halting_loss="act", halting_weight=weight)
        halted.append(trace.signals["halting.last"][:, 0].mean())
        assert history[-1]["valid_loss"] == pytest.approx(trace.leaving(3)["loss"], rel=1e-5)
    assert halted[1] > halted[0] + 0.1


def test_training_cost_counts_every_exit(data: TaskData) -> None:
    lm, history, _ = trained(data, {}, steps=3, exit_loss=1.0)
    assert history[-1]["flops"] == 3 * 8 * training_flops(lm, data.length, every_exit=True)


def test_what_does_not_go_together_is_refused(data: TaskData) -> None:
    with pytest.raises(UserError, match=r"train\.halting_loss: 'act' needs something that halts"):
        trained(data, {}, steps=1, halting_loss="act")
    raw = {"name": "s", "question": "?", "tasks": ["p_hop"], "variants": ["htc"], "seeds": 1}
    with pytest.raises(UserError, match=r"model\.halting: 'gate' is trained by train\.halting_loss"):
        make_plan(study_from({**raw, "model": {"halting": "gate"}}, [], "s"), "", None)
    for train_config, message in (
        ({"exit_loss": 0.5, "halting_loss": "act"}, "exit_loss = 0.5 must be 0 where halting_loss"),
        ({"exit_loss": 0.5, "backward_cycles": 1}, "backward_cycles = 1 must be none where the loss reads every exit"),
    ):
        with pytest.raises(UserError, match=message):
            study_from({**raw, "train": train_config}, [], "s")
