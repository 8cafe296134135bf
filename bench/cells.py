"""One cell: run it, and run it as a job that nobody else runs and whose failure is a record."""

from __future__ import annotations

import errno
import logging
import math
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.checkpoint import Checkpoints, Every, cell_logger
from bench.config import RESULTS_SCHEMA, Cell
from bench.environment import environment
from bench.errors import CellError, RankError, UserError
from bench.lease import BEAT, Lease, LeaseLostError
from bench.store import Store, atomic_write, whole_folder
from bench.usage import Usage

if TYPE_CHECKING:
    from bench.distributed import Team

Report = Callable[[int, float, float], None]
WatchHistory = Callable[[dict[str, float]], None]
Tell = Callable[[str, tuple[Any, ...]], None]
"""Called with an event of a cell: ``start`` (label, steps), ``update`` (step, loss, tokens per second), or ``found``:
it has a record that another process has made."""
TellOf = Callable[[str, str, tuple[Any, ...]], None]
"""The same with the cell's id in front."""

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}


def run_cell(
    cell: Cell,
    store: Store,
    report: Report | None = None,
    every: Every | None = None,
    watch: WatchHistory | None = None,
    stacked: bool = False,
) -> dict[str, Any]:
    """Train and test one cell, from its last checkpoint if there is one; store its model, trace and result, and return
    the result.

    report: called with the step, the mean loss since the last call and tokens per second; every: how often to write a
    checkpoint; watch: called with every entry of the history; what it raises ends the cell without a result; stacked:
    with the last digits that it has in a pack.
    Raises CellError with a reason if training cannot go on or the data are not those the cell was planned with.
    """
    from bench.distributed import Team
    from bench.train import repeatable, train_together

    with repeatable(cell.seed, cell.train.threads), Team(cell, store.root) as team:
        try:
            going = Going(cell, store, report, every, watch, stacked, team)
            ((_, error),) = train_together([going.training])
        except Exception as found:
            error = found
        if error is not None:
            raise team.cause(error)
        return going.finish()


class Going:
    """A cell between its start and its result; to be used under ``bench.train.repeatable``. Arguments and what is
    raised: as of ``run_cell``.
    """

    def __init__(
        self,
        cell: Cell,
        store: Store,
        report: Report | None = None,
        every: Every | None = None,
        watch: WatchHistory | None = None,
        stacked: bool = False,
        team: Team | None = None,
    ) -> None:
        """team: of the cell's processes, which is started here."""
        import torch

        from bench.costs import costs
        from bench.data.prepared import cell_data
        from bench.distributed import ALONE
        from bench.freezing import freeze
        from bench.pretrained.start import initial_model
        from bench.train import Training, pick_device
        from bench.variant import get_variant

        self.cell, self.store, self.started = cell, store, time.time()
        self.folder, team = store.folder(cell.id), team or ALONE
        team.start()
        if team.rank == 0:
            _sweep(self.folder)
        self.data = data = cell_data(cell, store)
        variant, device = get_variant(cell.variant, cell.options), pick_device(cell.train)
        torch.manual_seed(cell.seed)
        lm = initial_model(cell, data, store)
        vocab, positions, trained = lm.config.vocab_size, lm.config.max_position_embeddings, cell.train.trained
        self.cost = costs(variant, cell.model, vocab, data.length, device.type, positions, trained)
        freeze(lm, trained)
        lm.to(device)  # type: ignore[arg-type]
        # Dropout: the same stream whatever the variant's initialisation has drawn, and another one for every rank.
        torch.manual_seed(team.seed(cell.seed))
        checkpoints = Checkpoints(self.folder / "checkpoints", cell.id, every or Every(), team)
        self.training = Training(lm, data, cell.train, cell.seed, report, checkpoints, watch, team, stacked)

    def finish(self) -> dict[str, Any]:
        """Test the trained model, store what the cell leaves and return its result."""
        from bench.exits.record import examine
        from bench.pretrained.share import save_checkpoint
        from bench.slices import further_scores
        from bench.train import autocast

        cell, store, folder, data, lm, cost = self.cell, self.store, self.folder, self.data, self.training.lm, self.cost
        started, history = self.started, self.training.at.history
        with autocast(cell.train, lm.device):
            found = examine(lm, data, cell.evaluation)
            further, slices = further_scores(lm, data, found.test)
        trace = found.test
        scores = trace.leaving(trace.n_cycles)
        tokens = cell.train.steps * cell.train.batch_size * data.length
        train_seconds = history[-1]["seconds"]
        record: dict[str, Any] = {
            "schema": RESULTS_SCHEMA,
            "status": "done",
            "id": cell.id,
            "cell": cell.model_dump(mode="json"),
            "schedule": str(lm.schedule),
            "metrics": {**{f"test_{name}": value for name, value in scores.items()}, **further},
            "slices": slices,
            "costs": {
                **{k: v for k, v in asdict(cost).items() if k not in ("additions", "exit_flops_per_token")},
                "train_flops": history[-1]["flops"],  # executed
            },
            "additions": {label: asdict(addition) for label, addition in cost.additions.items()},
            "history": history,
            "exits": found.exits,
            "cycles": found.cycles,
            "zero_attention": [
                {"step": step.depth, "block": step.block, "cycle": step.cycle, "mean": float(mean)}
                for step, mean in zip(lm.schedule.steps, trace.zero_attention, strict=True)
                if not math.isnan(mean)
            ]
            or None,
            "timing": {
                "started": started,
                "train_seconds": train_seconds,
                "seconds": time.time() - started,
                "tokens_per_second": tokens / train_seconds,
            },
            "environment": environment(cell.train),
            "stacked": self.training.at.stacked,
        }
        shutil.rmtree(folder / "model", ignore_errors=True)  # of a try that died before its result
        with whole_folder(folder / "model", folder) as target:
            save_checkpoint(lm, target, data.tokenizer(), _lineage(cell), data.length, _scores(cell, record))
        atomic_write(folder / "trace.npz", trace.to_bytes())
        atomic_write(folder / "trace_valid.npz", found.valid.to_bytes())
        store.write_cell(cell.id, record["cell"])
        store.write_result(cell.id, record)  # last: its presence says that everything else is there
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return record


def _lineage(cell: Cell) -> dict[str, Any]:
    """Where a cell's model comes from, for its card."""
    init, train = cell.init, cell.train
    return {
        "starts from": "random weights" if init is None else init.source,
        **({"digest of the source": init.digest} if init is not None and init.digest else {}),
        **({"sharing of its blocks": init.sharing} if init is not None and init.sharing else {}),
        "trained on": f"{cell.task} {cell.task_options} (fingerprint {cell.fingerprint[:12]})",
        "training": f"{train.steps} steps of {train.batch_size} sequences, {train.trained}, seed {cell.seed}",
        "cell": cell.id,
    }


def _scores(cell: Cell, record: dict[str, Any]) -> list[dict[str, Any]]:
    cost = record["costs"]["forward_flops_per_token"]
    metrics = {name.removeprefix("test_"): value for name, value in record["metrics"].items()}
    return [
        {"task": cell.task, "metric": name, "value": value, "cycles": cell.model.n_cycles, "flops_per_token": cost}
        for name, value in metrics.items()
    ]


@dataclass(frozen=True)
class Job:
    """What a worker, here or on another machine, needs to run a cell.

    lease: the number of the lease it must take; failed: the time of the failure that was known when the job was made.
    """

    cell: Cell
    label: str
    root: Path
    every: Every
    lease: int
    failed: float | None = None
    beat: float = BEAT


def work(job: Job, tell: Tell) -> dict[str, Any] | None:
    """Run a job's cell alone and return its record; see ``work_together``."""
    return dict(work_together((job,), lambda _, kind, arguments: tell(kind, arguments)))[job.cell.id]


def work_together(jobs: Sequence[Job], tell: TellOf) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Run the cells of jobs, trained together, and yield the id and the record of each as it ends; whatever goes wrong
    becomes the failure record of the cell it went wrong in.

    None if another process holds a cell. A record that another process has made in the meantime is yielded as it is.
    """
    with ExitStack() as stack:
        members = []
        for job in jobs:
            member = stack.enter_context(_Member(job, partial(tell, job.cell.id)))
            record = member.take()
            if member.held is None or record is not None:
                yield member.end(record)
            else:
                members.append(member)
        yield from _run(members)


class _Member:
    """A job on its way: its lease, its log and what it tells; a context manager that gives the lease back."""

    def __init__(self, job: Job, tell: Tell) -> None:
        self.job, self.cell, self.tell, self.store = job, job.cell, tell, Store(job.root)
        self.log = cell_logger(job.cell.id)
        self.held: Lease | None = None
        self._stack, self._first = ExitStack(), list[tuple[int, float]]()

    def __enter__(self) -> _Member:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def take(self) -> dict[str, Any] | None:
        """Take the lease; returns the record that is there already, or that of a disk that refuses the lease."""
        folder = self.store.folder(self.cell.id)
        try:
            lease = Lease.take(folder, self.job.lease, self.job.beat)
            if lease is None:
                return None
            self._stack.enter_context(lease)
            self._stack.enter_context(cell_log(folder, self.cell.id))
            self.held = lease
            self.tell("start", (self.job.label, self.cell.train.steps))
            found = self.store.record(self.cell.id)
        except OSError as error:  # not even a lease can be written
            return failure(self.cell, *reason_of(error))
        if found is not None and (found["status"] == "done" or found.get("at") != self.job.failed):
            self.tell("found", ())
            return found
        lease.note(label=self.job.label, steps=self.cell.train.steps, step=0, tokens_per_second=None)
        self.log.info("begins: %s, process %d, lease %d", self.job.label, os.getpid(), lease.number)
        return None

    def report(self, step: int, loss: float, speed: float) -> None:
        """Renew what others see of the cell. Raises LeaseLostError if it is no longer ours."""
        assert self.held is not None
        self.held.check()
        self._first.append((step, time.monotonic()))
        done, since = self._first[0]
        left = (time.monotonic() - since) / (step - done) * (self.cell.train.steps - step) if step > done else None
        self.held.note(step=step, tokens_per_second=speed, seconds_left=left)
        del self._first[1:]
        self.tell("update", (step, loss, speed))

    def end(self, record: dict[str, Any] | None) -> tuple[str, dict[str, Any] | None]:
        """Give the cell back."""
        self._stack.close()
        return self.cell.id, record

    def finish(self, going: Going) -> dict[str, Any] | None:
        """Test and store what has been trained."""
        try:
            record = going.finish()
        except Exception as error:
            return self.fail(error)
        self.log.info("done in %.1f s", record["timing"]["seconds"])
        return record

    def fail(self, error: Exception) -> dict[str, Any] | None:
        """The failure's record; None if another process has the cell."""
        if isinstance(error, LeaseLostError):
            self.log.error("stops: %s", error)
            return None
        if self.store.done(self.cell.id):  # it was taken over unnoticed, and finished
            return None
        record = failure(self.cell, *reason_of(error))
        self.log.error("failed: %s", record["reason"])
        with suppress(OSError):  # on a full disk: the caller still learns of it
            self.store.write_failure(self.cell.id, record)
        return record


def _run(members: Sequence[_Member]) -> Iterator[tuple[str, dict[str, Any] | None]]:
    from bench.distributed import Team
    from bench.train import repeatable, train_together

    if not members:
        return
    first, going = members[0].cell, dict[Any, tuple[_Member, Going]]()
    try:
        with (
            Usage() as usage,
            repeatable(first.seed, first.train.threads),
            Team(first, members[0].store.root) as team,
        ):
            for member in members:
                try:
                    one = Going(
                        member.cell, member.store, member.report, member.job.every, None, len(members) > 1, team
                    )
                except Exception as error:
                    yield member.end(member.fail(team.cause(error)))
                else:
                    going[one.training] = member, one
            for training, ending in train_together(list(going)):
                member, one = going.pop(training)
                record = member.finish(one) if ending is None else member.fail(team.cause(ending))
                usage.take()
                with suppress(OSError):
                    if record is not None and record["status"] == "done":
                        member.store.write_usage(member.cell.id, usage.samples)
                yield member.end(record)
    except SystemExit:
        for member, _ in going.values():
            member.log.warning("stopped from outside")
        raise


def reason_of(error: Exception) -> tuple[str, str, str | None]:
    """Why a cell failed, in one line; whether of itself or of its environment; the traceback where it is of use."""
    if isinstance(error, RankError):
        return error.reason, error.kind, error.trace
    text = (f"{type(error).__name__}: {error}".splitlines() or [type(error).__name__])[0]
    if isinstance(error, CellError | UserError):
        return str(error), "cell", None
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return f"out of memory: {text}", "environment", traceback.format_exc()
    full = isinstance(error, OSError) and error.errno in DISK
    if full or any(os.strerror(number) in str(error) for number in DISK):  # libraries wrap it in errors of their own
        return f"the disk refuses to be written: {text}", "environment", traceback.format_exc()
    return text, "cell", traceback.format_exc()


def failure(cell: Cell, reason: str, kind: str, trace: str | None = None) -> dict[str, Any]:
    """The record of a failed cell.

    kind: ``cell`` if it would fail again (its loss is not finite, its code is wrong), ``environment`` if it may not (no
    memory, no room on the disk, a killed process).
    """
    return {
        "schema": RESULTS_SCHEMA,
        "status": "failed",
        "id": cell.id,
        "cell": cell.model_dump(mode="json"),
        "reason": reason,
        "kind": kind,
        "at": time.time(),
        "traceback": trace,
        "environment": environment(cell.train),
    }


@contextmanager
def cell_log(folder: Path, id: str) -> Iterator[None]:
    """What happens to a cell, and every warning of a library meanwhile, goes to its ``log.txt``."""
    handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk must not stop the cell
    warned = logging.getLogger("py.warnings")
    logging.captureWarnings(True)
    for logger in (cell_logger(id), warned):
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in (cell_logger(id), warned):
            logger.removeHandler(handler)
        logging.captureWarnings(bool(warned.handlers))  # of the other cells of the pack
        with suppress(OSError):
            handler.close()


def _sweep(folder: Path) -> None:
    """Remove what killed writers have left half written."""
    for path in (*folder.glob(".[!l]*"), *folder.glob("checkpoints/.*")):  # not of the lease: that one is being renewed
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
