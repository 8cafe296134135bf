"""Models trained in a stack get what each gets alone; what cannot be stacked is not."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from settings import EVERY, shape

from bench.config import TrainConfig
from bench.data.task import TaskData, get_task
from bench.model.freezing import freeze
from bench.model.language_model import build_model
from bench.model.variant import get_variant
from bench.train.checkpoints import Checkpoints, Every
from bench.train.device import repeatable
from bench.train.loop import Training, gradients, train, train_together
from bench.train.modes import resolved, stackable
from bench.train.packing import run_stacked

OPTIONS = {"hops": 1, "length": 12, "n_train": 50, "n_valid": 10, "n_test": 20}
CONFIG = TrainConfig(steps=12, batch_size=4, accumulation=2, eval_sequences=8, eval_every=6)


@pytest.fixture(scope="module")
def data() -> TaskData:
    return get_task("p_hop", OPTIONS).build()


def model(data: TaskData, name: str, options: dict[str, Any], family: str, seed: int, **changes: Any) -> Any:
    variant = get_variant(name, options)
    if not variant.cycled:
        changes.pop("n_cycles", None)
    lm = build_model(variant, shape(variant, family, **changes), data.vocab_size, data.length)
    lm.reset_parameters(seed)
    return lm


def runs_of(
    data: TaskData,
    config: TrainConfig,
    name: str = "ztt",
    options: Any = (),
    family: str = "llama",
    seeds: int = 3,
    **changes: Any,
) -> list[Training]:
    """Some seeds at two learning rates; changes: of the shape."""
    configs = [config.model_copy(update={"lr": (1 + seed % 2) * config.lr}) for seed in range(seeds)]
    models = [model(data, name, dict(options), family, seed, **changes) for seed in range(seeds)]
    each = enumerate(zip(models, configs, strict=True))
    return [Training(lm, data, own, seed, stacked=True) for seed, (lm, own) in each]


def check_gradients(runs: list[Training]) -> None:
    """All at once and one by one, relative to the whole gradient's size."""
    together = gradients(runs)
    found = [[parameter.grad for parameter in run.lm.parameters()] for run in runs]
    for run, loss, grads in zip(runs, together, found, strict=True):
        run.optimizer.zero_grad(set_to_none=True)
        run.at.stacked = False
        torch.testing.assert_close(gradients([run])[0], loss)
        size = torch.stack([p.grad.norm() for p in run.lm.parameters() if p.grad is not None]).norm()
        for (where, parameter), grad in zip(run.lm.named_parameters(), grads, strict=True):
            if parameter.grad is None:
                assert grad is None or not grad.any(), where
            else:
                assert grad is not None and (grad - parameter.grad).norm() < 2e-6 * size, where
    assert len({float(loss) for loss in together}) == len(runs)


@pytest.mark.parametrize(("name", "options", "family"), EVERY)
@pytest.mark.long
def test_every_variant_has_the_same_gradients_in_a_stack(
    data: TaskData, name: str, options: dict[str, Any], family: str
) -> None:
    runs = runs_of(data, CONFIG.model_copy(update={"accumulation": 1}), name, options, family, seeds=2, n_cycles=2)
    noisy = name == "recurrent" and options.get("start", "noise") != "prelude"
    lm = runs[0].lm
    assert stackable(lm.variant, lm.model_shape, data.vocab_size, data.length, CONFIG) != noisy
    if not noisy:
        check_gradients(runs)


LOSSES = [
    {"exit_loss": 0.5},
    {"halting_loss": "gate_cdf"},
    {"halting_loss": "pondernet"},
    {"halting_loss": "act"},
    {"trained": "additions+norms"},
]


@pytest.mark.parametrize("changes", LOSSES, ids=str)
def test_every_loss(data: TaskData, changes: dict[str, Any]) -> None:
    config = CONFIG.model_copy(update=changes)
    runs = runs_of(data, config, halting="gate" if config.halting_loss != "none" else "none")
    for run in runs:
        freeze(run.lm, config.trained)
    check_gradients(runs)


def test_truncated_gradients(data: TaskData) -> None:
    check_gradients(runs_of(data, CONFIG.model_copy(update={"backward_cycles": 1}), "recurrent", {"start": "prelude"}))


def test_dropout_is_not_stacked(data: TaskData) -> None:
    lm = model(data, "htc", {}, "gpt2", 0, dropout=0.1)
    assert not stackable(lm.variant, lm.model_shape, data.vocab_size, data.length, CONFIG)


def alone(data: TaskData, runs: list[Training]) -> list[list[dict[str, float]]]:
    """The histories that the same runs have one by one."""
    found = []
    for seed, run in enumerate(runs):
        lm = build_model(run.lm.variant, run.lm.model_shape, data.vocab_size, data.length)
        lm.reset_parameters(seed)
        with repeatable(seed, 1):
            found.append(train(lm, data, run.config, seed))
    return found


def assert_near(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for key in set(one) - {"seconds"}:
            assert one[key] == pytest.approx(other[key], rel=1e-4), key


def test_training_together_is_training_alone(data: TaskData) -> None:
    runs = runs_of(data, CONFIG)
    assert [error for _, error in train_together(runs)] == [None] * 3
    for run, history in zip(runs, alone(data, runs), strict=True):
        assert_near(run.at.history, history)
        assert run.at.history != history, "the products have other kernels: else this was no stack"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.long
def test_with_whom_a_model_is_stacked_changes_no_bit(data: TaskData, threads: int) -> None:
    config = CONFIG.model_copy(update={"threads": threads})  # as many stacks
    whole, by_itself, two = runs_of(data, config, seeds=4), runs_of(data, config)[1:2], runs_of(data, config)[1:]
    with repeatable(0, threads):
        for group in (whole, by_itself, two):
            assert all(error is None for _, error in train_together(group))
    for run in (*by_itself, two[0]):
        assert all(map(torch.equal, run.lm.parameters(), whole[1].lm.parameters()))


def test_threads_have_stacks_of_their_own(data: TaskData, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(lms: Any, *rest: Any) -> Any:
        seen.append((threading.get_ident(), torch.get_num_threads(), [id(lm) for lm in lms]))
        return run_stacked(lms, *rest)

    monkeypatch.setattr("bench.train.loop.run_stacked", watched)
    runs = runs_of(data, CONFIG.model_copy(update={"threads": 2, "accumulation": 1}), seeds=5)
    with repeatable(0, 2):
        check_gradients(runs)
        assert torch.get_num_threads() == 2
    assert [len(lms) for _, _, lms in sorted(seen, key=lambda call: -len(call[2]))] == [3, 2]
    assert len({thread for thread, *_ in seen} - {threading.get_ident()}) == 2
    assert {threads for _, threads, _ in seen} == {1}


def test_one_that_blows_up_leaves_the_others_alone(data: TaskData) -> None:
    runs = runs_of(data, CONFIG)
    with torch.no_grad():
        runs[1].lm.norm.weight.fill_(torch.nan)
    ended = dict(train_together(runs))
    assert str(ended[runs[1]]) == "loss is nan within steps 1-6" and next(iter(ended)) is runs[1]
    assert ended[runs[0]] is None and ended[runs[2]] is None
    histories = alone(data, runs)
    assert_near(runs[0].at.history, histories[0])
    assert_near(runs[2].at.history, histories[2])


@pytest.mark.long
def test_a_stack_that_is_too_large_goes_on_in_parts(data: TaskData, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(lms: Any, *rest: Any) -> Any:
        if len(lms) > 2:
            raise torch.OutOfMemoryError("no room")
        return run_stacked(lms, *rest)

    monkeypatch.setattr("bench.train.loop.run_stacked", small)
    runs = runs_of(data, CONFIG)
    with pytest.warns(UserWarning, match="no step of 3 models at once, going on with 1: no room"):
        assert [error for _, error in train_together(runs)] == [None] * 3
    for run, history in zip(runs, alone(data, runs), strict=True):
        assert_near(run.at.history, history)


def test_a_thread_that_fails_leaves_none_behind(data: TaskData, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other stack is waited for: its gradients must not arrive in the steps that follow."""
    ended = list[bool]()

    def first_fails(lms: Any, *rest: Any) -> Any:
        if len(lms) == 2 and not ended and lms[0] is runs[0].lm:
            raise torch.OutOfMemoryError("no room")
        if not ended:
            time.sleep(0.3)
            ended.append(True)
        return run_stacked(lms, *rest)

    monkeypatch.setattr("bench.train.loop.run_stacked", first_fails)
    runs = runs_of(data, CONFIG.model_copy(update={"threads": 2}), seeds=4)
    with repeatable(0, 2):
        with pytest.raises(torch.OutOfMemoryError):
            gradients(runs)
        assert ended and torch.get_num_threads() == 2
        for run in runs:
            run.optimizer.zero_grad(set_to_none=True)
        check_gradients(runs)


class PowerCut(BaseException):
    pass


class CutAt(Checkpoints):
    """The power goes at the first checkpoint, before it is written."""

    def save(self, *_: Any) -> None:
        raise PowerCut


def kept(data: TaskData, folder: Path, cut: int | None = None, stacked: bool = True) -> list[Training]:
    found = []
    for seed, run in enumerate(runs_of(data, CONFIG)):
        kind = CutAt if seed == cut else Checkpoints
        checkpoints = kind(folder / str(seed), str(seed), Every(None, 5))
        found.append(Training(run.lm, data, run.config, seed, checkpoints=checkpoints, stacked=stacked))
    return found


@pytest.mark.parametrize("cut", [0, 1, 2])
@pytest.mark.long
def test_a_killed_pack_goes_on(data: TaskData, tmp_path: Path, cut: int) -> None:
    """To the same bits: those whose checkpoint was not written catch up, and the others are not told to stack again."""
    whole = runs_of(data, CONFIG)
    assert all(error is None for _, error in train_together(whole))
    with pytest.raises(PowerCut):
        list(train_together(kept(data, tmp_path, cut)))
    again = [*kept(data, tmp_path, stacked=False)[:cut], *kept(data, tmp_path)[cut:]]
    assert [run.at.step for run in again] == [5] * cut + [0] * (3 - cut)
    assert all(error is None for _, error in train_together(again))
    for one, other in zip(again, whole, strict=True):
        assert [{**e, "seconds": 0} for e in one.at.history] == [{**e, "seconds": 0} for e in other.at.history]
        assert all(map(torch.equal, one.lm.parameters(), other.lm.parameters()))


def test_a_pack_resumed_from_the_same_step_gives_the_same_bits(data: TaskData, tmp_path: Path) -> None:
    whole = runs_of(data, CONFIG)
    assert all(error is None for _, error in train_together(whole))
    assert all(error is None for _, error in train_together(kept(data, tmp_path)))
    again = kept(data, tmp_path)
    assert [run.at.step for run in again] == [10] * 3
    assert all(error is None for _, error in train_together(again))
    for one, other in zip(again, whole, strict=True):
        assert [{**e, "seconds": 0} for e in one.at.history] == [{**e, "seconds": 0} for e in other.at.history]
        assert all(map(torch.equal, one.lm.parameters(), other.lm.parameters()))


def test_on_a_gpu_larger_steps_are_stacked(data: TaskData) -> None:
    variant = get_variant("htc", {})
    wide = shape(variant, "gpt2", d_model=512)
    for kind, precision, stacked in (("cpu", "float32", False), ("cuda", "bfloat16", True)):
        found = resolved(TrainConfig(), kind, variant, wide, data.vocab_size, data.length)  # type: ignore[arg-type]
        assert (found.device, found.precision, found.stacked) == (kind, precision, stacked)
    huge = shape(variant, "gpt2", d_model=4096)
    assert resolved(TrainConfig(), "cuda", variant, huge, data.vocab_size, data.length).stacked is False
