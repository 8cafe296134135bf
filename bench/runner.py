"""Cells to results: run one cell, and run a study's cells in worker processes."""

from __future__ import annotations

import math
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from bench.config import RESULTS_SCHEMA, Cell
from bench.errors import CellError, UserError
from bench.plan import Plan, Planned
from bench.progress import Progress
from bench.store import Store, atomic_write

Notify = Callable[..., None]


def run_cell(cell: Cell, store: Store, report: Callable[[int, float, float], None] | None = None) -> dict[str, Any]:
    """Train and test one cell, store its model, trace and result, and return the result.

    Raises CellError with a reason if training cannot go on or the data are not those the cell was planned with.
    """
    import torch

    from bench.costs import build_model, costs
    from bench.exits.record import examine
    from bench.plan import task_data
    from bench.slices import further_scores
    from bench.train import autocast, pick_device, repeatable, train
    from bench.variant import get_variant

    started = time.time()
    data = task_data(cell.task, cell.task_options)
    if data.fingerprint != cell.fingerprint:
        raise CellError(f"the data have changed: fingerprint {data.fingerprint[:12]}, planned {cell.fingerprint[:12]}")
    variant, device = get_variant(cell.variant, cell.options), pick_device(cell.train)
    cost = costs(variant, cell.model, data.vocab_size, data.length, device.type, data.max_length)
    with repeatable(cell.seed, cell.train.threads):
        lm = build_model(variant, cell.model, data.vocab_size, data.max_length)
        lm.reset_parameters(cell.seed)
        lm.to(device)  # type: ignore[arg-type]
        torch.manual_seed(cell.seed)  # dropout: the same stream whatever the variant's initialisation has drawn
        history = train(lm, data, cell.train, cell.seed, report)
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
    folder = store.folder(cell.id)
    with _whole_folder(folder / "model") as target:
        lm.save_pretrained(target)
        if data.save_tokenizer is not None:
            data.save_tokenizer(target)
    atomic_write(folder / "trace.npz", trace.to_bytes())
    atomic_write(folder / "trace_valid.npz", found.valid.to_bytes())
    store.write_cell(cell.id, record["cell"])
    store.write_result(cell.id, record)  # last: its presence says that everything else is there
    return record


def run_study(
    plan: Plan, store: Store, jobs: int | None, on_record: Callable[[dict[str, Any], Planned], None]
) -> dict[str, dict[str, Any]]:
    """Run the cells that are not done yet, ``jobs`` at a time, and return the records of all of the study's cells.

    jobs: None takes as many processes as the cells' threads leave room for on the CPU, one on a GPU. on_record is
    called in this process for every cell of the study that has a record, as soon as there is one.
    """
    store.write_manifest(plan.study.name, plan.manifest)
    unique = {planned.cell.id: planned for planned in plan.cells}
    todo = [planned for id, planned in unique.items() if not store.done(id)]
    with Progress(len(unique)) as progress:
        progress.skip(len(unique) - len(todo))
        for id in set(unique) - {planned.cell.id for planned in todo}:
            record = store.record(id)
            if record is not None:
                on_record(record, unique[id])
        if todo:
            _run_in_processes(todo, store, jobs or default_jobs(todo), progress, on_record)
    return store.results(unique)


def default_jobs(todo: list[Planned]) -> int:
    """Worker processes for these cells: the cores divided by a cell's threads, at least one."""
    import torch

    if torch.cuda.is_available() and any(planned.cell.train.device != "cpu" for planned in todo):
        return 1
    return max(1, min(len(todo), (os.cpu_count() or 1) // max(planned.cell.train.threads for planned in todo)))


def _run_in_processes(
    todo: list[Planned],
    store: Store,
    jobs: int,
    progress: Progress,
    on_record: Callable[[dict[str, Any], Planned], None],
) -> None:
    context = multiprocessing.get_context("spawn")  # fork after torch has started threads can hang
    with context.Manager() as manager:
        events = manager.Queue()
        listener = threading.Thread(target=_listen, args=(events, progress), daemon=True)
        listener.start()
        pool = ProcessPoolExecutor(jobs, context, initializer=_start_worker)
        try:
            futures: dict[Future[dict[str, Any]], Planned] = {
                pool.submit(
                    _work,
                    planned.cell,
                    store.root,
                    events,
                    f"{planned.variant} {planned.task} seed {planned.cell.seed}",
                ): planned
                for planned in todo
            }
            for future in as_completed(futures):
                on_record(future.result(), futures[future])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise
        else:
            pool.shutdown()
        finally:
            events.put(None)
            listener.join(timeout=5)


def _listen(events: Any, progress: Progress) -> None:
    while (event := events.get()) is not None:
        name, arguments = event
        getattr(progress, name)(*arguments)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and the terminal to the progress bars."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _work(cell: Cell, root: Path, events: Any, label: str) -> dict[str, Any]:
    """Run one cell in a worker process; whatever goes wrong becomes the cell's failure record."""
    store = Store(root)
    events.put(("start", (cell.id, label, cell.train.steps)))
    try:
        record = run_cell(cell, store, lambda step, loss, speed: events.put(("update", (cell.id, step, loss, speed))))
    except (CellError, UserError) as error:
        record = _failure(cell, str(error), None)
    except Exception as error:
        record = _failure(cell, f"{type(error).__name__}: {error}".splitlines()[0], traceback.format_exc())
    if record["status"] == "failed":
        store.write_failure(cell.id, record)
        events.put(("finish", (cell.id, f"failed: {record['reason']}", True)))
    else:
        scores = record["metrics"]
        name = "bits_per_byte" if "test_bits_per_byte" in scores else "accuracy"
        text = f"{name.replace('_', ' ')} {scores[f'test_{name}']:.3f}, {record['timing']['seconds']:.1f} s"
        events.put(("finish", (cell.id, text, False)))
    return record


def _failure(cell: Cell, reason: str, trace: str | None) -> dict[str, Any]:
    return {
        "schema": RESULTS_SCHEMA,
        "status": "failed",
        "id": cell.id,
        "cell": cell.model_dump(mode="json"),
        "reason": reason,
        "traceback": trace,
        "environment": environment(cell),
    }


@contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """A folder that appears under its name only when it is complete."""
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)


def environment(cell: Cell) -> dict[str, Any]:
    """Where a cell ran: what may explain a difference between two machines."""
    import torch
    import transformers

    from bench.train import pick_device

    device = pick_device(cell.train)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": cell.train.threads,
        "git": git_revision(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


@lru_cache(maxsize=1)
def git_revision() -> str | None:
    """The commit the engine runs from, with ``-dirty`` if it was changed since; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
