"""Cells killed anywhere go on to the same bits; damaged checkpoints are set aside."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from settings import make

from bench.config import Cell, ModelConfig, TrainConfig
from bench.data.task import TaskData, get_task
from bench.errors import UserError
from bench.model.language_model import build_model
from bench.model.variant import get_variant
from bench.run.cells import Job, run_job
from bench.run.executors.local import worker_context
from bench.run.lease import LeaseWatch
from bench.store.store import Store
from bench.train.checkpoints import Checkpoints, Every, Position
from bench.train.device import repeatable
from bench.train.loop import train

CONFIG = TrainConfig(steps=8, batch_size=4, accumulation=2, eval_sequences=8, eval_every=3, random_cycles=True)
OPTIONS = {"hops": 1, "length": 12, "n_train": 50, "n_valid": 10, "n_test": 20}


@pytest.fixture(scope="module")
def data() -> TaskData:
    return get_task("p_hop", OPTIONS).build()


class KilledError(Exception):
    pass


class KilledAt(Checkpoints):
    """Dies after the step ``moment``, with or without its checkpoint written."""

    moment, written = 0, True

    def save(self, position: Position, lm: Any, optimizer: Any) -> None:
        if position.step == self.moment and not self.written:
            raise KilledError
        super().save(position, lm, optimizer)
        if position.step == self.moment:
            raise KilledError


def run(data: TaskData, checkpoints: Checkpoints | None, config: TrainConfig = CONFIG) -> tuple[Any, Any]:
    """The history without times, and the weights."""
    shape = make("ztt", {}).model_shape.model_copy(update={"dropout": 0.1})
    lm = build_model(get_variant("ztt"), shape, data.vocab_size, data.length)
    lm.reset_parameters(0)
    with repeatable(0, 1):
        history = train(lm, data, config, 0, checkpoints=checkpoints)
    history = [{key: value for key, value in entry.items() if key != "seconds"} for entry in history]
    return history, {name: tensor.clone() for name, tensor in lm.state_dict().items()}


def same(first: tuple[Any, Any], second: tuple[Any, Any]) -> bool:
    return first[0] == second[0] and all(torch.equal(first[1][name], second[1][name]) for name in first[1])


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.long
def test_it_goes_on_to_the_same_bits_from_every_step(data: TaskData, tmp_path: Path, written: bool) -> None:
    whole = run(data, None)
    for moment in range(1, CONFIG.steps + 1):
        killed = KilledAt(tmp_path / str(moment), "a", Every(None, 1))
        killed.moment, killed.written = moment, written
        with pytest.raises(KilledError):
            run(data, killed)
        again = Checkpoints(tmp_path / str(moment), "a", Every(None, 1))
        assert again.due(1)
        assert same(run(data, again), whole), moment
        assert len(list((tmp_path / str(moment)).iterdir())) == 2


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _huge(path: Path) -> None:
    path.write_bytes(b"\xff" * 64)


@pytest.mark.parametrize("damage", [_cut, _flip, _empty, _huge])
@pytest.mark.parametrize("how_many", [1, 2])
def test_damaged_checkpoints_are_set_aside(data: TaskData, tmp_path: Path, damage: Any, how_many: int) -> None:
    whole = run(data, None)
    killed = KilledAt(tmp_path, "a", Every(None, 3))
    killed.moment = 6
    with pytest.raises(KilledError):
        run(data, killed)
    newest = sorted(tmp_path.iterdir(), reverse=True)
    assert [path.name for path in newest] == ["000000006.safetensors", "000000003.safetensors"]
    for path in newest[:how_many]:
        damage(path)
    assert same(run(data, Checkpoints(tmp_path, "a", Every(None, 100))), whole)
    assert len(list(tmp_path.glob("*.corrupt"))) == how_many


def test_a_checkpoint_of_another_cell_or_model_is_not_taken(data: TaskData, tmp_path: Path) -> None:
    whole = run(data, None)
    run(data, Checkpoints(tmp_path, "b", Every(None, 5)))
    assert same(run(data, Checkpoints(tmp_path, "a", Every(None, 100))), whole)
    lm = make("htc", {})
    before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    run(data, Checkpoints(tmp_path, "c", Every(None, 5)))
    optimizer = torch.optim.AdamW(lm.parameters())
    assert Checkpoints(tmp_path, "c", Every()).load(lm, optimizer) == Position()
    assert all(torch.equal(before[name], tensor) for name, tensor in lm.state_dict().items())


def test_a_disk_that_refuses_a_checkpoint_does_not_stop_the_cell(data: TaskData, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder would be")
    assert same(run(data, Checkpoints(tmp_path / "checkpoints", "a", Every(None, 2))), run(data, None))


@pytest.mark.parametrize(("text", "expected"), [("90s", Every(90.0)), ("2m", Every(120.0)), ("500", Every(None, 500))])
def test_how_often(text: str, expected: Every) -> None:
    assert Every.parse(text) == expected


@pytest.mark.parametrize("text", ["", "0", "-1", "1h", "s", "1.5", "ten", "1e3"])
def test_how_often_must_be_told_right(text: str) -> None:
    with pytest.raises(UserError, match="--checkpoint-every"):
        Every.parse(text)


def _cell(data: TaskData) -> Cell:
    return Cell(
        variant="ztt",
        options=get_variant("ztt").options.model_dump(mode="json"),
        model=ModelConfig(d_model=16, n_heads=2, n_blocks=3, n_cycles=2, dropout=0.1),
        train=CONFIG.model_copy(update={"steps": 60}),
        task="p_hop",
        task_options=get_task("p_hop", OPTIONS).options.model_dump(mode="json"),
        seed=1,
        fingerprint=data.fingerprint,
    )


def _work(cell: Cell, root: Path, lease: int) -> None:
    run_job(Job(cell, "ztt", root, Every(None, 4), lease), lambda kind, arguments: None)


@pytest.mark.long
def test_killed_processes_leave_what_one_that_lived_leaves(data: TaskData, tmp_path: Path) -> None:
    cell, moments, kills = _cell(data), random.Random(0), 0
    outcomes = []
    for name, wanted in (("whole", 0), ("killed", 4)):
        store = Store(tmp_path / name)
        folder = store.folder(cell.id)
        while not store.done(cell.id):
            number = LeaseWatch().free(folder)
            assert number is not None
            process = worker_context().Process(target=_work, args=(cell, store.root, number))
            process.start()
            if kills < wanted:
                kept = lambda: list(folder.glob("checkpoints/0*"))  # noqa: B023, E731
                known = set(kept())
                while process.is_alive() and set(kept()) <= known:  # it has got somewhere
                    time.sleep(0.002)
                time.sleep(0.03 * moments.random())
                if process.is_alive() and process.pid is not None:
                    os.kill(process.pid, signal.SIGKILL)
                    kills += 1
            process.join()
        record = store.record(cell.id)
        assert record is not None
        text = (folder / "log.txt").read_text()
        assert text.count("INFO begins") == kills + 1 and text.count("INFO done") == 1
        assert text.count("goes on from its checkpoint") == kills
        files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        content = {file: path.read_bytes() for file, path in files.items() if not file.endswith((".json", "log.txt"))}
        told = record.dump()
        for entry in told["history"]:
            del entry["seconds"]
        outcomes.append((content, {key: value for key, value in told.items() if key not in ("timing",)}))
    assert kills >= 2
    assert {"trace.npz", "model/model.safetensors"} <= set(outcomes[0][0])
    assert not [name for name in outcomes[1][0] if "checkpoint" in name or "lease" in name or name.startswith(".")]
    assert outcomes[0] == outcomes[1]
