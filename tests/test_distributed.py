"""One cell over two processes: the numbers of one process, its checkpoints, and what happens when a rank fails."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from settings import make

from bench.config import Cell, ModelConfig, TrainConfig, parse
from bench.data.task import get_task
from bench.errors import UserError
from bench.model.language_model import CycleForCausalLM
from bench.model.variant import get_variant
from bench.run.cells import Job, run_job
from bench.run.executors.local import LocalExecutor
from bench.run.going import run_cell
from bench.run.runner import default_jobs
from bench.store.store import Store
from bench.study.plan import Planned
from bench.train import distributed
from bench.train.checkpoints import Every
from bench.train.loop import Training, train

TRAIN = {"steps": 12, "batch_size": 8, "lr": 3e-3, "eval_sequences": 16, "eval_every": 4, "grad_clip": 0.3}
OPTIONS = {"hops": 1, "length": 12, "n_train": 60, "n_valid": 20, "n_test": 20}
TEAM = {"processes": 2}
serve = distributed._serve


def cell(variant: str = "ztt", model: dict[str, Any] | None = None, **train: Any) -> Cell:
    task = get_task("p_hop", OPTIONS)
    return Cell(
        variant=variant,
        options=get_variant(variant).options.model_dump(mode="json"),
        model=ModelConfig(**{"d_model": 16, "n_heads": 2, "n_blocks": 4, "n_cycles": 2, **(model or {})}),
        train=TrainConfig(**{**TRAIN, **train}),
        task="p_hop",
        task_options=task.options.model_dump(mode="json"),
        seed=1,
        fingerprint=task.build().fingerprint,
    )


def timeless(record: Any) -> list[dict[str, float]]:
    return [{key: value for key, value in entry.dump().items() if key != "seconds"} for entry in record.history]


def weights(root: Path, made: Cell) -> dict[str, torch.Tensor]:
    lm = CycleForCausalLM.from_pretrained(Store(root).folder(made.id) / "model")
    assert type(lm) is CycleForCausalLM and lm.config.architectures == ["CycleForCausalLM"]
    return lm.state_dict()


def close(first: list[dict[str, float]], second: list[dict[str, float]]) -> None:
    assert len(first) == len(second) > 1
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("sharding", ["none", "full"])
@pytest.mark.parametrize("variant", ["ztt", "htc"])
@pytest.mark.long
def test_two_processes_give_the_numbers_of_one(tmp_path: Path, variant: str, sharding: str) -> None:
    settings: dict[str, Any] = {"accumulation": 2, "random_cycles": True, "exit_loss": 0.5 * (variant == "ztt")}
    alone, team = cell(variant, **settings), cell(variant, **settings, **TEAM, sharding=sharding)
    one, two = (run_cell(made, Store(tmp_path)) for made in (alone, team))
    close(timeless(one), timeless(two))
    assert timeless(one) != timeless(two), "the sums have another order: else this was one process"
    assert two.metrics == pytest.approx(one.metrics, rel=1e-3)
    found, expected = weights(tmp_path, team), weights(tmp_path, alone)
    for name, tensor in expected.items():
        # A key's bias has hardly a gradient, and AdamW steps by the sign of what rounding leaves of it.
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-3)
    assert not torch.distributed.is_initialized() and not multiprocessing.active_children()


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("sharding", ["none", "full"])
@pytest.mark.long
def test_a_stopped_cell_goes_on_from_its_checkpoint(tmp_path: Path, sharding: str) -> None:
    """With dropout: the random numbers of every rank go on, too. The newest checkpoint is damaged."""
    made = cell(model={"dropout": 0.1}, **TEAM, sharding=sharding)
    whole = run_cell(made, Store(tmp_path / "whole"))

    def stop(step: int, loss: float, speed: float) -> None:
        if step == 8:
            raise StoppedError

    store = Store(tmp_path / "stopped")
    folder = store.folder(made.id) / "checkpoints"
    with pytest.raises(StoppedError):
        run_cell(made, store, stop, Every(None, 3))
    assert not multiprocessing.active_children()
    assert sorted(path.name for path in folder.iterdir()) == ["000000003.safetensors", "000000006.safetensors"]
    (folder / "000000006.safetensors").write_bytes(b"damaged")
    steps: list[int] = []
    again = run_cell(made, store, lambda step, loss, speed: steps.append(step), Every(None, 100))
    assert steps == [4, 8, 10, 12]
    close(timeless(whole), timeless(again))


def _no_memory_on_rank_1(*arguments: Any) -> None:
    def advance(self: Training, loss: torch.Tensor) -> None:
        if self.at.step == 5:
            raise MemoryError("5 GiB are missing")
        taken(self, loss)

    taken, Training.advance = Training.advance, advance  # type: ignore[method-assign]
    serve(*arguments)


def _killed(*arguments: Any) -> None:
    def advance(self: Training, loss: torch.Tensor) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    Training.advance = advance  # type: ignore[method-assign]
    serve(*arguments)


def _killed_at_birth(*arguments: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("sharding", "fate", "reason"),
    [
        ("full", _no_memory_on_rank_1, "rank 1: out of memory: MemoryError: 5 GiB are missing"),
        ("none", _killed, "rank 1: its process was killed by SIGKILL (out of memory?)"),
        ("full", _killed, "rank 1: its process was killed by SIGKILL (out of memory?)"),
        ("none", _killed_at_birth, "rank 1: its process was killed by SIGKILL (out of memory?)"),
    ],
)
@pytest.mark.long
def test_a_rank_that_fails_ends_the_cell_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharding: str, fate: Any, reason: str
) -> None:
    monkeypatch.setattr(distributed, "_serve", fate)
    job = Job(cell(**TEAM, sharding=sharding), "ztt", tmp_path, Every(), 1)
    record = run_job(job, lambda kind, arguments: None)
    assert record is not None
    assert (record.status, record.reason, record.kind) == ("failed", reason, "environment")
    assert not torch.distributed.is_initialized() and not multiprocessing.active_children()


def test_a_loss_that_blows_up_ends_all_ranks(tmp_path: Path) -> None:
    record = run_job(
        Job(cell(**TEAM, lr=10.0, grad_clip=1e9), "ztt", tmp_path, Every(), 1), lambda kind, arguments: None
    )
    assert record is not None and record.kind == "cell"
    assert record.reason.startswith("loss ") and not multiprocessing.active_children()


@pytest.mark.long
def test_worker_processes_run_teams(tmp_path: Path) -> None:
    """Processes of processes: none of them is left when a study is over."""
    made = cell(**TEAM, steps=4)
    with LocalExecutor(1) as executor:
        executor.submit((Job(made, "ztt", tmp_path, Every(), 1),))
        events = [event for _ in iter(lambda: Store(tmp_path).done(made.id), True) for event in executor.poll()]
        assert "start" in {event.kind for event in events}
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 9}, r"train: batch_size = 9 must be a multiple of accumulation x processes = 1 x 2"),
        ({"accumulation": 8}, r"train: batch_size = 8 must be a multiple of accumulation x processes = 8 x 2"),
        ({"processes": 1, "sharding": "full"}, r"train: sharding = 'full' needs processes > 1"),
        ({"compile": True}, r"train: compile = True needs processes = 1, not 2"),
        ({"processes": 0}, r"train\.processes: .* 1 \(got 0\)"),
        ({"sharding": "some"}, r"train\.sharding: .*'none' or 'full'"),
    ],
)
def test_what_does_not_divide_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(TrainConfig, {**TRAIN, **TEAM, **values}, "train")


def test_training_without_a_cell_is_refused_several_processes() -> None:
    made = cell(**TEAM)
    lm, data = make("ztt", {}), get_task("p_hop", OPTIONS).build()
    with pytest.raises(UserError, match=r"train\.processes: 2"):
        train(lm, data, made.train, 0)


def test_cells_at_a_time_count_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    planned = [Planned("ztt", "p_hop", cell(processes=2, threads=4)), Planned("ztt", "p_hop", cell(threads=2))]
    assert default_jobs(planned, 0) == 2 and default_jobs(planned, 8) == 4 and default_jobs(planned[1:], 0) == 8


def test_a_cell_alone_waits_for_no_other_rank_when_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "wait", lambda *_: pytest.fail("it waits"))
    error = RuntimeError("of its own")
    assert distributed.Team().cause(error) is error
