"""What the harness costs: everything around the training as a share of it, and skipping finished cells."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.data.task import TaskData, task_data
from bench.model.language_model import build_model
from bench.model.variant import get_variant
from bench.perf.timing import Row, quartiles
from bench.run.cells import Job, cell_log, run_job
from bench.run.lease import Lease
from bench.run.progress import Progress
from bench.run.runner import Running, run_study
from bench.run.usage import Usage
from bench.store.digests import sealed
from bench.store.store import Store
from bench.store.tracking import MlflowTracker
from bench.study.load import load_study
from bench.study.plan import Plan, Planned, make_plan
from bench.train.checkpoints import Checkpoints, Every
from bench.train.device import repeatable
from bench.train.loop import train

TITLE = "the harness: lease, log, checkpoints, progress and MLflow as a share of training; skipping finished cells"
STEPS, CELLS, MOST = 200, 5000, 10


def rows(device: torch.device, rounds: int, steps: int = STEPS, cells: int = CELLS) -> list[Row]:
    """The overhead, and the seconds of seeing that nothing is to be done."""
    rounds = min(rounds, MOST)
    seconds = overhead(steps, rounds, Every(10.0), device)
    row: Row = {"what": f"around {steps} steps of a quick study's cell, processor time", "rounds": rounds}
    row |= {"seconds": float(np.median(seconds[:, 0]))} | quartiles(seconds[:, 1] / seconds[:, 0], "share")
    skip: Row = {"what": f"{cells:,} finished cells seen and skipped, processor time"}
    return [row, skip | {"seconds": skipping(cells, device)}]


def overhead(steps: int, rounds: int, every: Every, device: torch.device) -> NDArray[np.float64]:
    """Processor seconds [rounds, 2] of the quick study's ZTT cell as a worker trains it: the training, all the rest.

    The rest is timed itself: it is far less than two trainings differ by on a shared machine. What other threads do is
    all part of it, since the training has one.
    """
    planned = quick_cell(steps, device)
    cell, found = planned.cell, np.zeros((rounds, 2))
    data = task_data(cell.task, cell.task_options)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "runs")
        short = quick_cell(10, device)  # a record of the same size, sooner
        record = run_job(Job(short.cell, "perf", store.root, every, 1), lambda *_: None)
        assert record is not None and record.status == "done", record
        tracker = MlflowTracker(f"sqlite:///{folder}/mlflow.db", store)
        tracker.study(quick_plan(10, device).manifest.but(study="perf"))
        for turn in range(rounds):
            lm = build_model(get_variant(cell.variant, cell.options), cell.model, data.vocab_size, data.max_length)
            lm.reset_parameters(cell.seed)
            lm.to(device)  # type: ignore[arg-type]
            with repeatable(cell.seed, cell.train.threads):
                start = time.process_time()
                training = _managed(lm, data, planned, Path(folder) / str(turn), every)
                tracker.log(record.but(id=f"{turn}"), short)
                found[turn] = training, time.process_time() - start - training
    return found


def _managed(lm: Any, data: TaskData, planned: Planned, folder: Path, every: Every) -> float:
    """Train under a lease, with a log, usage samples, progress and checkpoints; processor seconds of the training."""
    cell, lease, meter = planned.cell, Lease.take(folder, 1), _Meter()
    assert lease is not None
    with lease, cell_log(folder, cell.id), Usage(), Progress(1) as progress:
        progress.start(cell.id, "perf", cell.train.steps)

        def report(step: int, loss: float | None, speed: float) -> None:
            lease.check()
            lease.note(step=step, tokens_per_second=speed)
            progress.update(cell.id, step, loss, speed)

        checkpoints = Checkpoints(folder / "checkpoints", cell.id, every)
        for name in ("due", "load", "save"):
            setattr(checkpoints, name, meter.timed(getattr(checkpoints, name)))
        start = time.thread_time()
        train(lm, data, cell.train, cell.seed, meter.timed(report), checkpoints)
        return time.thread_time() - start - meter.seconds


class _Meter:
    """Adds up the processor seconds of what its thread calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same, and its time is added."""

        def run(*given: Any) -> Any:
            start = time.thread_time()
            try:
                return call(*given)
            finally:
                self.seconds += time.thread_time() - start

        return run


def quick_cell(steps: int, device: torch.device) -> Planned:
    """The quick study's ZTT cell on p-hop with so many steps."""
    made = quick_plan(steps, device)
    return next(planned for planned in made.cells if (planned.variant, planned.task) == ("ztt", "p_hop"))


def quick_plan(steps: int, device: torch.device) -> Plan:
    """The quick study at one seed, with so many steps on p-hop."""
    changes = [f"tasks.p_hop.train.steps={steps}", f"train.device={device.type}", "train.threads=1", "seeds=1"]
    return make_plan(load_study("quick", changes), "", None)


def skipping(cells: int, device: torch.device) -> float:
    """Processor seconds to see that so many finished cells, of the size the quick study leaves, need nothing."""
    planned = quick_cell(10, device)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        record = run_job(Job(planned.cell, "perf", store.root, Every(), 1), lambda *_: None)
        many = [planned.cell.model_copy(update={"seed": seed}) for seed in range(1, cells + 1)]
        assert record is not None
        told = record.dump()
        for cell in many:
            store.folder(cell.id).mkdir()
            (store.folder(cell.id) / "result.json").write_bytes(sealed({**told, "id": cell.id}))
        study = load_study("quick")
        plan = Plan(
            study, tuple(Planned("ztt", "p_hop", cell) for cell in many), quick_plan(10, device).manifest.but(cells=[])
        )
        start = time.process_time()
        run_study(plan, store, Running(), lambda *_: None)
        return time.process_time() - start
