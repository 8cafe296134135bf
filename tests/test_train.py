"""The training loop: what it optimises, how it is scheduled, and that it is repeatable."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from settings import make, tokens
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.config import CyclesSchedule, TrainConfig
from bench.data.task import TaskData, get_task
from bench.errors import CellError, UserError
from bench.model.costs import costs, training_flops
from bench.model.language_model import build_model
from bench.model.variant import get_variant, variants
from bench.train import loop
from bench.train.depths import draw_cycles, scheduled_cycles, sequence_cycles
from bench.train.device import pick_device, repeatable
from bench.train.loop import learning_rate, train
from bench.train.optimizer import make_optimizer

CONFIG = TrainConfig(steps=12, batch_size=8, lr=3e-3, eval_sequences=32)


@pytest.fixture(scope="module")
def data() -> TaskData:
    return get_task("p_hop", {"hops": 1, "length": 16, "n_train": 64, "n_valid": 32, "n_test": 32}).build()


def run(data: TaskData, config: TrainConfig, variant: str = "ztt", seed: int = 0, **changes: Any) -> tuple[Any, Any]:
    shape = make(variant, {}).model_shape.model_copy(update=changes)
    lm = build_model(get_variant(variant), shape, data.vocab_size, data.length)
    lm.reset_parameters(seed)
    with repeatable(seed, 1):
        return lm, train(lm, data, config, seed)


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


def test_slow_steps_are_told_before_their_loss_is_read(data: TaskData, monkeypatch: pytest.MonkeyPatch) -> None:
    """And that changes no number."""
    told, config = list[tuple[int, float | None]](), CONFIG.model_copy(update={"eval_every": 12})
    monkeypatch.setattr(loop, "SIGN", 0.0)
    lm = build_model(get_variant("ztt"), make("ztt", {}).model_shape, data.vocab_size, data.length)
    lm.reset_parameters(0)
    with repeatable(0, 1):
        history = train(lm, data, config, 0, lambda step, loss, speed: told.append((step, loss)))
    assert timeless(history) == timeless(run(data, config)[1])
    assert [step for step, _ in told] == list(range(1, config.steps + 1))
    assert [step for step, loss in told if loss is not None] == [10, 12]


def test_accumulation_does_not_change_the_gradient(data: TaskData) -> None:
    _, whole = run(data, CONFIG)
    _, split = run(data, CONFIG.model_copy(update={"accumulation": 4}))
    for a, b in zip(timeless(whole), timeless(split), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_without_clipping_gradients_are_as_they_are(data: TaskData) -> None:
    free, wide, clipped = (
        timeless(run(data, CONFIG.model_copy(update={"grad_clip": clip}))[1]) for clip in (None, 1e30, 0.01)
    )
    assert free == wide != clipped


def test_history_is_by_step_tokens_and_flops(data: TaskData) -> None:
    _, history = run(data, CONFIG.model_copy(update={"eval_every": 5}))
    assert [entry["step"] for entry in history] == [5, 10, 12]
    lm = make("ztt", {})
    per_token = costs(get_variant("ztt"), lm.model_shape, data.vocab_size, data.length).train_flops_per_token
    for entry in history:
        assert entry["tokens"] == entry["step"] * 8 * 16 and entry["flops"] == pytest.approx(
            entry["tokens"] * per_token, rel=1e-12
        )
    _, by_flops = run(data, CONFIG.model_copy(update={"eval_every": 100, "eval_every_flops": 3.5 * 8 * 16 * per_token}))
    assert [entry["step"] for entry in by_flops] == [4, 7, 11, 12]


def test_random_cycles_are_paired_counted_and_follow_their_law(data: TaskData) -> None:
    config = CONFIG.model_copy(update={"random_cycles": True})
    drawn = draw_cycles(config, 3, seed=0)
    assert drawn == draw_cycles(config, 3, seed=0) != draw_cycles(config, 3, seed=1)
    many = np.array(draw_cycles(config.model_copy(update={"steps": 20000}), 8, 0), dtype=float)
    # A Poisson count of a rate with mean 8 and variance 8^2 (e^(1/4) - 1), plus one.
    assert many.mean() == pytest.approx(9, rel=0.02) and many.var() == pytest.approx(8 + 64 * math.expm1(0.25), rel=0.1)
    lm, history = run(data, config)
    per_step = [8 * training_flops(lm, data.length, count) for count in drawn]
    assert history[-1]["flops"] == sum(per_step) and len(set(per_step)) > 1


def test_cycles_of_sequences_are_drawn_paired_and_counted_as_the_longest(data: TaskData) -> None:
    config = CONFIG.model_copy(update={"sequence_cycles": True, "accumulation": 2})
    counts = np.stack([sequence_cycles(config, 3, 0, step) for step in range(config.steps)])
    assert counts.shape == (config.steps, config.batch_size) and counts.min() == 1
    many = sequence_cycles(config.model_copy(update={"batch_size": 20000}), 8, 1, 5)
    assert many.mean() == pytest.approx(8, rel=0.02) and many.var() == pytest.approx(8, rel=0.05)
    drawn = draw_cycles(config, 3, 0)
    assert drawn == counts.max(1).tolist() and draw_cycles(config, 3, 1) != drawn
    lm, history = run(data, config)
    assert history[-1]["flops"] == sum(8 * training_flops(lm, data.length, count) for count in drawn)
    whole = run(data, config.model_copy(update={"accumulation": 1}))[1]
    assert history[-1]["valid_loss"] == pytest.approx(whole[-1]["valid_loss"], rel=1e-4)


def test_a_curriculum_goes_from_its_start_to_its_end(data: TaskData) -> None:
    config = TrainConfig(steps=12, cycles_schedule=CyclesSchedule(share=0.75))
    assert [scheduled_cycles(config, 3, step) for step in range(12)] == [1] * 3 + [2] * 3 + [3] * 6
    assert draw_cycles(config, 3, 0) == draw_cycles(config, 3, 1) == [1] * 3 + [2] * 3 + [3] * 6
    down = TrainConfig(steps=4, cycles_schedule=CyclesSchedule(start=4, end=1, share=1.0))
    assert [scheduled_cycles(down, 9, step) for step in range(4)] == [4, 3, 2, 1]
    random = TrainConfig(steps=8000, random_cycles=True, cycles_schedule=CyclesSchedule(start=2, end=8, share=0.5))
    drawn = np.array(draw_cycles(random, 3, 0), float)
    assert drawn[:500].mean() == pytest.approx(3, rel=0.1) and drawn[4000:].mean() == pytest.approx(9, rel=0.05)
    lm, history = run(data, CONFIG.model_copy(update={"cycles_schedule": CyclesSchedule(share=1.0)}))
    steps = [8 * training_flops(lm, data.length, 1 + step // 4) for step in range(12)]
    assert history[-1]["flops"] == sum(steps)


def test_gradients_may_flow_through_the_last_cycles_only() -> None:
    """Before the cut the block's earlier uses get no gradient: it is that of the last uses alone."""
    lm, x = make("bc", {}), tokens()
    lm(x, labels=x, backward_cycles=1).loss.backward()
    cut = lm.blocks[0].mlp.up.weight.grad.clone()
    lm.zero_grad()
    state = lm.embed(x)
    with torch.no_grad():
        for done in lm.cycles(state):
            if done == 2:
                break
    lm.walk(lm.schedule.cycles[2], state)
    cross_entropy(lm.lm_head(lm.read_out(state))[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
    torch.testing.assert_close(cut, lm.blocks[0].mlp.up.weight.grad)


def test_a_cut_that_would_leave_the_prelude_untrained_is_refused(data: TaskData) -> None:
    with pytest.raises(UserError, match=r"train\.backward_cycles: 1 leaves the embeddings of 'bc' without a gradient"):
        run(data, CONFIG.model_copy(update={"backward_cycles": 1}), "bc")
    with pytest.raises(UserError, match=r"train\.backward_cycles: 1 leaves the prelude of 'htc' without a gradient"):
        run(data, CONFIG.model_copy(update={"backward_cycles": 1}), "htc")


def test_a_loss_that_is_not_finite_stops_the_cell_with_its_reason(data: TaskData) -> None:
    lm = build_model(get_variant("htc"), make("htc", {}).model_shape, data.vocab_size, data.length)
    lm.reset_parameters(0)
    torch.nn.init.constant_(lm.norm.weight, math.inf)
    with pytest.raises(CellError, match=r"loss is nan within steps 1-\d+"):
        train(lm, data, CONFIG, 0)


def test_precision_bfloat16_trains(data: TaskData) -> None:
    _, history = run(data, CONFIG.model_copy(update={"precision": "bfloat16", "steps": 3}))
    _, exact = run(data, CONFIG.model_copy(update={"steps": 3}))
    assert history[-1]["valid_loss"] == pytest.approx(exact[-1]["valid_loss"], rel=0.05)
    assert history[-1]["valid_loss"] != exact[-1]["valid_loss"]


@pytest.mark.long
def test_compile_trains_to_the_same_numbers(data: TaskData) -> None:
    config, shape = CONFIG.model_copy(update={"steps": 3}), {"n_blocks": 3, "n_cycles": 3}
    counters.clear()
    lm, history = run(data, config.model_copy(update={"compile": True, "random_cycles": True}), "htc", **shape)
    expected = run(data, config.model_copy(update={"random_cycles": True}), "htc", **shape)[1]
    assert timeless(history)[-1] == pytest.approx(timeless(expected)[-1], rel=1e-3)
    # Attention and MLP, in training and in validation (other sizes): not for each of the blocks and of the cycles.
    assert 2 <= counters["stats"]["unique_graphs"] <= 6
    assert not any("forward" in vars(module) for module in lm.modules()), "taken back at the end"


@pytest.mark.parametrize("variant", variants.names())
@pytest.mark.long
def test_activation_checkpointing_changes_no_number(data: TaskData, variant: str) -> None:
    config = CONFIG.model_copy(update={"steps": 3, "random_cycles": variant == "recurrent", "backward_cycles": None})
    kept, again = (
        run(data, config.model_copy(update={"activation_checkpointing": on}), variant, dropout=0.1)
        for on in (False, True)
    )
    assert timeless(kept[1]) == timeless(again[1])
    for expected, found in zip(kept[0].parameters(), again[0].parameters(), strict=True):
        assert torch.equal(expected, found)


class Made(TorchDispatchMode):
    """Remembers the tensors that are made, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.tensors += [weakref.ref(leaf) for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        return out

    def living(self) -> int:
        """Bytes, of every storage once."""
        storages = [tensor.untyped_storage() for ref in self.tensors if (tensor := ref()) is not None]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_activation_checkpointing_keeps_less() -> None:
    lm = make("ztt", {}).train()
    living = []
    for lm.gradient_checkpointing in (False, True):
        with Made() as made:
            out = lm(tokens(batch=8))
            living.append(made.living())
        del out
    assert living[1] < 0.6 * living[0]


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


@pytest.mark.parametrize(("variant", "why"), [("mor", "gives tokens"), ("sequence", "within one pass")])
def test_sequences_have_no_numbers_of_cycles_where_they_would_not_run_them(
    data: TaskData, variant: str, why: str
) -> None:
    with pytest.raises(UserError, match=rf"train.sequence_cycles: True with '{variant}', which .*{why}.*allowed: off"):
        run(data, CONFIG.model_copy(update={"sequence_cycles": True}), variant)
    lm = make(variant, {})
    with pytest.raises(UserError, match=f"^sequence_cycles with '{variant}', which .*{why}"):
        lm(tokens(2, 8), sequence_cycles=torch.tensor([1, 2]))
