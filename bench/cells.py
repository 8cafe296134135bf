"""One cell: run it, and run it as a job that nobody else runs and whose failure is a record."""

from __future__ import annotations

import errno
import logging
import math
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.checkpoint import Checkpoints, Every
from bench.config import RESULTS_SCHEMA, Cell
from bench.environment import environment
from bench.errors import CellError, UserError
from bench.lease import BEAT, Lease, LeaseLostError
from bench.store import Store, atomic_write
from bench.usage import Usage

Report = Callable[[int, float, float], None]
WatchHistory = Callable[[dict[str, float]], None]
Tell = Callable[[str, tuple[Any, ...]], None]
"""Called with an event of a cell: ``start`` (label, steps), ``update`` (step, loss, tokens per second), or ``found``:
it has a record that another process has made."""

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}
log = logging.getLogger("cyclebench.cell")


def run_cell(
    cell: Cell,
    store: Store,
    report: Report | None = None,
    every: Every | None = None,
    watch: WatchHistory | None = None,
) -> dict[str, Any]:
    """Train and test one cell, from its last checkpoint if there is one; store its model, trace and result, and return
    the result.

    report: called with the step, the mean loss since the last call and tokens per second; every: how often to write a
    checkpoint; watch: called with every entry of the history; what it raises ends the cell without a result.
    Raises CellError with a reason if training cannot go on or the data are not those the cell was planned with.
    """
    import torch

    from bench.costs import costs
    from bench.exits.record import examine
    from bench.freezing import freeze
    from bench.plan import task_data
    from bench.pretrained.share import save_checkpoint
    from bench.pretrained.start import initial_model
    from bench.slices import further_scores
    from bench.train import autocast, pick_device, repeatable, train
    from bench.variant import get_variant

    started, folder = time.time(), store.folder(cell.id)
    _sweep(folder)
    data = task_data(cell.task, cell.task_options)
    if data.fingerprint != cell.fingerprint:
        raise CellError(f"the data have changed: fingerprint {data.fingerprint[:12]}, planned {cell.fingerprint[:12]}")
    variant, device = get_variant(cell.variant, cell.options), pick_device(cell.train)
    with repeatable(cell.seed, cell.train.threads):
        lm = initial_model(cell, data, store)
        vocab, positions, trained = lm.config.vocab_size, lm.config.max_position_embeddings, cell.train.trained
        cost = costs(variant, cell.model, vocab, data.length, device.type, positions, trained)
        freeze(lm, trained)
        lm.to(device)  # type: ignore[arg-type]
        torch.manual_seed(cell.seed)  # dropout: the same stream whatever the variant's initialisation has drawn
        checkpoints = Checkpoints(folder / "checkpoints", cell.id, every or Every())
        history = train(lm, data, cell.train, cell.seed, report, checkpoints, watch)
        with autocast(cell.train, device):
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
        "environment": environment(cell),
    }
    with _whole_folder(folder / "model") as target:
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
    """Run a job's cell and return its record; whatever goes wrong becomes the cell's failure record.

    None if another process holds the cell. A record that another process has made in the meantime is returned as it is.
    """
    store, cell = Store(job.root), job.cell
    try:
        lease = Lease.take(store.folder(cell.id), job.lease, job.beat)
        if lease is None:
            return None
        with lease, cell_log(store.folder(cell.id)):
            tell("start", (job.label, cell.train.steps))
            found = store.record(cell.id)
            if found is not None and (found["status"] == "done" or found.get("at") != job.failed):
                tell("found", ())
                return found
            return _run(job, store, lease, tell)
    except LeaseLostError:
        return None
    except OSError as error:  # not even a lease can be written
        return failure(cell, *_reason(error))


def _run(job: Job, store: Store, lease: Lease, tell: Tell) -> dict[str, Any]:
    cell = job.cell
    lease.note(label=job.label, steps=cell.train.steps, step=0, tokens_per_second=None)

    first: list[tuple[int, float]] = []

    def report(step: int, loss: float, speed: float) -> None:
        lease.check()
        first.append((step, time.monotonic()))
        done, since = first[0]
        left = (time.monotonic() - since) / (step - done) * (cell.train.steps - step) if step > done else None
        lease.note(step=step, tokens_per_second=speed, seconds_left=left)
        del first[1:]
        tell("update", (step, loss, speed))

    log.info("begins: %s, process %d, lease %d", job.label, os.getpid(), lease.number)
    try:
        with Usage() as usage:
            record = run_cell(cell, store, report, job.every)
        with suppress(OSError):
            store.write_usage(cell.id, usage.samples)
    except LeaseLostError as error:
        log.error("stops: %s", error)
        raise
    except SystemExit:
        log.warning("stopped from outside")
        raise
    except Exception as error:
        if store.done(cell.id):  # it was taken over unnoticed, and finished
            raise LeaseLostError from error
        record = failure(cell, *_reason(error))
        log.error("failed: %s", record["reason"])
        with suppress(OSError):  # on a full disk: the caller still learns of it
            store.write_failure(cell.id, record)
    else:
        log.info("done in %.1f s", record["timing"]["seconds"])
    return record


def _reason(error: Exception) -> tuple[str, str, str | None]:
    """Why a cell failed, in one line; whether of itself or of its environment; the traceback where it is of use."""
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
        "environment": environment(cell),
    }


@contextmanager
def cell_log(folder: Path) -> Iterator[None]:
    """What happens to a cell, and every warning of a library meanwhile, goes to its ``log.txt``."""
    handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk must not stop the cell
    loggers = (log, logging.getLogger("py.warnings"))
    logging.captureWarnings(True)
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(handler)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for logger in loggers:
            logger.removeHandler(handler)
        with suppress(OSError):
            handler.close()


def _sweep(folder: Path) -> None:
    """Remove what killed writers have left half written."""
    for path in (*folder.glob(".[!l]*"), *folder.glob("checkpoints/.*")):  # not of the lease: that one is being renewed
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """A folder that appears under its name only when it is complete."""
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
