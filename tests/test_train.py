"""The training loop: what it optimises, how it is scheduled, and that it is repeatable."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from settings import make

from bench.config import TrainConfig
from bench.costs import build_model, costs
from bench.data import TaskData, get_task
from bench.errors import CellError, UserError
from bench.train import learning_rate, make_optimizer, pick_device, repeatable, train
from bench.variant import get_variant

CONFIG = TrainConfig(steps=12, batch_size=8, lr=3e-3, eval_sequences=32)


@pytest.fixture(scope="module")
def data() -> TaskData:
    return get_task("p_hop", {"hops": 1, "length": 16, "n_train": 64, "n_valid": 32, "n_test": 32}).build()


def run(data: TaskData, config: TrainConfig, variant: str = "ztt", seed: int = 0, **changes: Any) -> tuple[Any, Any]:
    shape = make(variant, {}).model_shape.model_copy(update=changes)
    lm = build_model(get_variant(variant), shape, data.vocab_size, data.length)
    lm.reset_parameters(seed)
    flops = costs(get_variant(variant), shape, data.vocab_size, data.length).train_flops_per_token
    with repeatable(seed, 1):
        return lm, train(lm, data, config, seed, flops)


def timeless(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in history]


def test_the_same_cell_twice_gives_the_same_numbers(data: TaskData) -> None:
    (first, a), (second, b) = (run(data, CONFIG, dropout=0.1) for _ in range(2))
    assert timeless(a) == timeless(b)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert timeless(run(data, CONFIG, seed=1)[1]) != timeless(a)


def test_it_learns(data: TaskData) -> None:
    _, history = run(data, CONFIG.model_copy(update={"steps": 150}))
    assert history[-1]["train_loss"] < 0.7 * history[0]["train_loss"]


def test_accumulation_does_not_change_the_gradient(data: TaskData) -> None:
    _, whole = run(data, CONFIG)
    _, split = run(data, CONFIG.model_copy(update={"accumulation": 4}))
    for a, b in zip(timeless(whole), timeless(split), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_history_is_by_step_tokens_and_flops(data: TaskData) -> None:
    _, history = run(data, CONFIG.model_copy(update={"eval_every": 5}))
    assert [entry["step"] for entry in history] == [5, 10, 12]
    lm = make("ztt", {})
    per_token = costs(get_variant("ztt"), lm.model_shape, data.vocab_size, data.length).train_flops_per_token
    for entry in history:
        assert entry["tokens"] == entry["step"] * 8 * 16 and entry["flops"] == entry["tokens"] * per_token
    _, by_flops = run(data, CONFIG.model_copy(update={"eval_every": 100, "eval_every_flops": 3.5 * 8 * 16 * per_token}))
    assert [entry["step"] for entry in by_flops] == [4, 7, 11, 12]


def test_a_loss_that_is_not_finite_stops_the_cell_with_its_reason(data: TaskData) -> None:
    lm = build_model(get_variant("htc"), make("htc", {}).model_shape, data.vocab_size, data.length)
    lm.reset_parameters(0)
    torch.nn.init.constant_(lm.norm.weight, math.inf)
    with pytest.raises(CellError, match=r"loss is nan within steps 1-\d+"):
        train(lm, data, CONFIG, 0, 1.0)


def test_precision_bfloat16_trains(data: TaskData) -> None:
    _, history = run(data, CONFIG.model_copy(update={"precision": "bfloat16", "steps": 3}))
    _, exact = run(data, CONFIG.model_copy(update={"steps": 3}))
    assert history[-1]["valid_loss"] == pytest.approx(exact[-1]["valid_loss"], rel=0.05)
    assert history[-1]["valid_loss"] != exact[-1]["valid_loss"]


def test_compile_trains_to_the_same_numbers(data: TaskData) -> None:
    config = CONFIG.model_copy(update={"steps": 3})
    _, history = run(data, config.model_copy(update={"compile": True}))
    assert timeless(history)[-1] == pytest.approx(timeless(run(data, config)[1])[-1], rel=1e-3)


def test_only_matrices_decay() -> None:
    lm = make("ztt", {"gating": "token"}, "llama", tie_embeddings=False)
    names = {id(p): name for name, p in lm.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in make_optimizer(lm, CONFIG).param_groups)
    assert decayed | plain == set(names.values()) and not decayed & plain
    assert "blocks.0.attention.qkv.weight" in decayed and "gate.hidden.weight" in decayed
    assert {"tokens.weight", "lm_head.weight", "norm.weight", "prefix.key", "gate.logit"} <= plain


@pytest.mark.parametrize("kind", ["cosine", "trapezoid"])
def test_learning_rate_schedules(kind: str) -> None:
    config = TrainConfig(steps=100, lr=1.0, warmup=0.1, cooldown=0.2, min_lr=0.1, lr_schedule=kind)
    rates = [learning_rate(step, config) for step in range(100)]
    assert all(a < b for a, b in pairwise(rates[:11])) and rates[10] == 1.0
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.1, abs=0.05)
    middle = {"cosine": 0.1 + 0.9 * (1 + math.cos(math.pi * 40 / 90)) / 2, "trapezoid": 1.0}[kind]
    assert rates[50] == pytest.approx(middle)


def test_a_device_that_is_not_there_is_named() -> None:
    if torch.cuda.is_available():
        assert pick_device(TrainConfig(device="cuda")).type == "cuda"
    else:
        with pytest.raises(UserError, match=r"train\.device: 'cuda' is not available"):
            pick_device(TrainConfig(device="cuda"))
    assert pick_device(TrainConfig(device="cpu")).type == "cpu"


def test_targets_that_are_not_scored_do_not_train(data: TaskData) -> None:
    """Changing the input where nothing later is scored changes nothing: the loss is that of the scored targets."""
    from bench.data.batches import arrays
    from bench.data.task import make_data

    ids, targets = (column.copy() for column in arrays(data.train))
    targets[:, 8:] = -100
    other = ids.copy()
    other[:, 8:] = (other[:, 8:] + 1) % data.vocab_size
    histories = []
    for inputs in (ids, other):
        splits = {name: (inputs, targets) for name in ("train", "valid", "test")}
        made = make_data(splits, data.vocab_size, data.metric)
        histories.append(timeless(run(replace(made, valid=data.valid), CONFIG)[1]))
    assert histories[0] == histories[1]
    assert np.isfinite(histories[0][-1]["valid_loss"])
