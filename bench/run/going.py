"""One cell from its start to its result."""

from __future__ import annotations

import math
import os
import shutil
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.config import RESULTS_SCHEMA, Cell
from bench.data.prepared import cell_data
from bench.evaluate.evaluation import depth_flops
from bench.evaluate.record import examine
from bench.evaluate.slices import further_scores
from bench.model.costs import costs
from bench.model.freezing import freeze
from bench.model.variant import get_variant
from bench.pretrained.share import save_checkpoint
from bench.processes import pulse
from bench.run.initial import initial_model
from bench.run.lease import Lease, hold
from bench.run.settings import code_of, settings_of
from bench.store.files import atomic_write, whole_folder
from bench.store.records import Added, Configuration, CostRecord, HistoryEntry, Record, Timing, ZeroAttention
from bench.store.store import Store
from bench.store.versions import MODEL, TRACES, former_of_cell, left_by
from bench.train.checkpoints import Checkpoints, Every
from bench.train.device import autocast, environment_of, pick_device, repeatable
from bench.train.distributed import ALONE, Team
from bench.train.loop import Report, Training, WatchHistory, train_together


def run_cell(
    cell: Cell,
    store: Store,
    report: Report | None = None,
    every: Every | None = None,
    watch: WatchHistory | None = None,
    stacked: bool | None = None,
) -> Record:
    """Train and test one cell, from its last checkpoint if there is one; store its model, trace and result, and return
    the result. Waits until no other process holds the cell.

    Args:
        report: see ``bench.train.loop.Report``.
        every: how often to write a checkpoint.
        watch: called with every entry of the history; what it raises ends the cell without a result.
        stacked: whether in a stack, None as the cell says; another mode gives other last digits.

    Raises:
        CellError: with a reason if training cannot go on or the data are not those the cell was planned with.
    """
    with (
        hold(store.folder(cell.id)) as lease,
        repeatable(cell.seed, cell.train.threads),
        Team(cell, store.root, run_rank) as team,
    ):
        try:
            going = Going(cell, store, lease, report, every, watch, stacked, team)
            ((_, error),) = train_together([going.training])
        except Exception as found:
            error = found
        if error is not None:
            raise team.cause(error)
        return going.finish()


class Going:
    """A cell between its start and its result; to be used under ``repeatable``. Arguments and what is raised: as of
    ``run_cell``.
    """

    def __init__(
        self,
        cell: Cell,
        store: Store,
        lease: Lease | None,
        report: Report | None = None,
        every: Every | None = None,
        watch: WatchHistory | None = None,
        stacked: bool | None = None,
        team: Team | None = None,
        started: float | None = None,
    ) -> None:
        """lease: of the cell; None in a process that writes nothing; team: of the cell's processes, which is started
        here; started: when the cell began, in seconds since 1970, None for now.
        """
        self.cell, self.store, self.lease, self.started = cell, store, lease, started or time.time()
        self.folder, team = store.folder(cell.id), team or ALONE
        team.start()
        self.data = data = cell_data(cell, store)
        variant, device = get_variant(cell.variant, cell.options), pick_device(cell.train)
        torch.manual_seed(cell.seed)
        lm = initial_model(cell, data, store)
        vocab, positions, trained = lm.config.vocab_size, lm.config.max_position_embeddings, cell.train.trained
        self.cost = costs(variant, cell.model, vocab, data.length, positions, trained)
        freeze(lm, trained)
        lm.to(device)  # type: ignore[arg-type]
        # Dropout: the same stream whatever the variant's initialisation has drawn, and another one for every rank.
        torch.manual_seed(team.seed(cell.seed))
        room = lease.room if lease is not None else self.folder
        checkpoints = Checkpoints(self.folder / "checkpoints", cell.id, every or Every(), team, room)
        self.training = Training(lm, data, cell.train, cell.seed, report, checkpoints, watch, team, stacked)

    def finish(self) -> Record:
        """Test the trained model, store what the cell leaves and return its result. Raises LeaseLostError or OSError if
        another process has taken the cell meanwhile; then nothing of it appears any more.
        """
        cell, store, folder, data, lm, cost = self.cell, self.store, self.folder, self.data, self.training.lm, self.cost
        assert self.lease is not None
        room, started, history = self.lease.room, self.started, self.training.at.history
        with autocast(cell.train, lm.device):
            found = examine(lm, data, cell.evaluation)
            further, slices = further_scores(lm, data, found.test)
        trace, valid = found.test, found.valid
        scores, known = trace.leaving(trace.n_cycles), valid.leaving(valid.n_cycles)
        tokens = cell.train.steps * cell.train.batch_size * data.length
        train_seconds = history[-1]["seconds"]
        told = {key: value for key, value in asdict(cost).items() if key != "additions"}
        if trace.ran is not None:
            told["forward_flops_per_token"] = depth_flops(lm, data.length, None, trace.ran)
        zero = zip(lm.schedule.steps, trace.zero_attention.tolist(), strict=True)
        record = Record(
            schema=RESULTS_SCHEMA,
            status="done",
            id=cell.id,
            cell=Configuration.of(cell),
            schedule=str(lm.schedule),
            metrics={**{f"test_{name}": value for name, value in scores.items()}, **further},
            valid_metrics={f"valid_{name}": value for name, value in known.items()},
            slices=slices,
            costs=CostRecord(**told, train_flops=history[-1]["flops"]),  # executed
            additions={label: Added(**asdict(addition)) for label, addition in cost.additions.items()},
            history=[HistoryEntry.model_validate(entry) for entry in history],
            exits=found.exits,
            cycles=found.cycles,
            loops=found.loops,
            **({} if trace.ran is None else {"ran": (trace.ran.mean(0) / data.length).tolist()}),
            zero_attention=[
                ZeroAttention(step=step.depth, block=step.block, cycle=step.cycle, mean=mean)
                for step, mean in zero
                if not math.isnan(mean)
            ]
            or None,
            timing=Timing(
                started=started,
                train_seconds=train_seconds,
                seconds=time.time() - started,
                tokens_per_second=tokens / train_seconds,
            ),
            environment=environment_of(cell.train),
            stacked=self.training.at.stacked,
            settings=settings_of(cell),
            code=code_of(cell),
            former=former_of_cell(folder).ids,
        )
        pulse()
        self.lease.check()
        with suppress(FileNotFoundError):  # of a try that died before its result
            os.rename(folder / MODEL, room / "before")
        with whole_folder(folder / MODEL, room) as target:
            rows, names = _scores(cell, record), data.class_names
            save_checkpoint(lm, target, data.tokenizer(), _lineage(cell, record), data.length, rows, names)
        for name, found_trace in zip(TRACES, (trace, valid), strict=True):
            atomic_write(folder / name, found_trace.to_bytes(), room)
        store.write_cell(cell.id, cell, room)
        record = record.but(files=left_by(folder))
        store.write_result(cell.id, record, room)  # last: its presence says that everything else is there
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return record


def run_rank(cell: Cell, root: Path, team: Team) -> Exception | None:
    """Go through a cell's training as one of its other processes; what has ended it too early."""
    with team, repeatable(cell.seed, cell.train.threads):
        ((_, error),) = train_together([Going(cell, Store(root), None, team=team).training])
        return error


def _lineage(cell: Cell, record: Record) -> dict[str, Any]:
    """Where a cell's model comes from, for its card."""
    init, train, task_options = cell.init, cell.train, record.settings["task_options"]
    return {
        "starts from": "random weights" if init is None else init.source,
        **({"digest of the source": init.digest} if init is not None and init.digest else {}),
        **({"sharing of its blocks": init.sharing} if init is not None and init.sharing else {}),
        "trained on": f"{cell.task} {task_options} (fingerprint {cell.fingerprint[:12]})",
        "training": f"{train.steps} steps of {train.batch_size} sequences, {train.trained}, seed {cell.seed}",
        "cell": cell.id,
    }


def _scores(cell: Cell, record: Record) -> list[dict[str, Any]]:
    cost = record.costs.forward_flops_per_token
    metrics = {name.removeprefix("test_"): value for name, value in record.metrics.items()}
    return [
        {"task": cell.task, "metric": name, "value": value, "cycles": cell.model.n_cycles, "flops_per_token": cost}
        for name, value in metrics.items()
    ]
