"""A study's sweep: its searches in worker processes, progress, and the result."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any

from bench.errors import UserError
from bench.plugins import pack
from bench.processes import become_worker, worker_context
from bench.run.progress import Progress
from bench.store.environment import environments
from bench.store.manifest import SWEPT, CellRow, Manifest, SweepResult, ThresholdRow
from bench.store.store import Store
from bench.store.tracker import Tracker
from bench.study.plan import make_plan
from bench.study.schema import Study
from bench.sweep import budgets, thresholds
from bench.sweep.storage import done, open_storage, running, shown_url


def run_sweep(
    study: Study, store: Store, url: str, jobs: int | None, tracker: Tracker, command: str, revision: str | None
) -> SweepResult:
    """Run the trials that are still wanting, ``jobs`` processes at a time, and write ``sweeps/<study>.json``.

    Several commands, on several machines, may do this at once on one storage: each adds to the same trials. Raises
    UserError if the study has no ``sweep``, or no trained cell whose thresholds could be swept.
    """
    if study.sweep is None:
        raise UserError(f"study {study.name!r} has no sweep: add sweep.thresholds or sweep.budgets to it")
    open_storage(url, closely=True)  # wrong addresses are told, and tables made, before there are workers
    jobs = jobs or os.cpu_count() or 1
    result = SweepResult(
        study=study.name,
        question=study.question,
        max_flops=study.sweep.max_flops,
        storage=shown_url(url),
        command=command,
        git=revision,
        tasks=[],
        thresholds=[],
        budgets=[],
        environment=[],
    )
    manifest: Manifest
    if study.sweep.thresholds is not None:
        manifest, threshold_jobs = _threshold_jobs(study, store, url)
        result.tasks = manifest.tasks
        tracker.begin(manifest)
        for found in _searched(threshold_jobs, jobs):
            result.thresholds.append(found)
            tracker.add_search(found)
        order = {job.name: number for number, job in enumerate(threshold_jobs)}
        result.thresholds.sort(key=lambda row: order[row.study])
    if study.sweep.budgets is not None:
        manifest, budget_jobs = _budget_jobs(study, store, url, command, revision)
        result.tasks = manifest.tasks
        _trained(budget_jobs, jobs)
        result.budgets = [budgets.row(job) for job in budget_jobs]
        rows = {
            id: CellRow(variant=row.variant, task=row.task, seed=row.seed, id=id)
            for row in result.budgets
            for id in row.cells
        }
        manifest = manifest.but(cells=[*rows.values()])
        store.write_manifest(manifest.study, manifest)
    swept = dict.fromkeys(id for found in result.thresholds for id in found.cells)
    swept |= dict.fromkeys(id for row in result.budgets for id in row.cells)
    result.environment = environments(record for id in swept if (record := store.record(id)))
    tracker.complete(store.manifest(study.name) or manifest, [store.write_sweep(result)])
    return result


def _threshold_jobs(study: Study, store: Store, url: str) -> tuple[Manifest, list[thresholds.ThresholdJob]]:
    """A search for every variant, task and rule; the cells are those of the study's last run."""
    sweep = study.sweep
    assert sweep is not None and sweep.thresholds is not None
    manifest = store.manifest(study.name)
    metrics = {task.label: task for task in manifest.tasks} if manifest else {}
    groups: dict[tuple[str, str], list[str]] = {}
    for cell in manifest.cells if manifest else []:
        if store.done(cell.id):
            groups.setdefault((cell.variant, cell.task), []).append(cell.id)
    if manifest is None or not groups:
        raise UserError(f"study {study.name!r} has no trained cells to sweep (run: cyclebench run {study.name})")
    missing = len(manifest.cells) - sum(map(len, groups.values()))
    if missing:
        print(f"{missing} of the study's cells are not done and left out", file=sys.stderr)
    jobs = []
    for (variant, task), ids in groups.items():
        trace = thresholds.traces(store, tuple(ids[:1]), "valid")[0]
        for rule in thresholds.tunable(trace, sweep.thresholds.rules):
            what = [ids, rule, sweep.thresholds.per_cycle, sweep.max_flops, sweep.seed]
            jobs.append(
                thresholds.ThresholdJob(
                    name=_name(study, variant, task, rule, what=what),
                    variant=variant,
                    task=task,
                    rule=rule,
                    ids=tuple(ids),
                    metric=metrics[task].metric,
                    higher_is_better=metrics[task].higher_is_better,
                    spec=sweep.thresholds,
                    max_flops=sweep.max_flops,
                    seed=sweep.seed,
                    root=store.root,
                    url=url,
                )
            )
    if not jobs:
        raise UserError(f"sweep.thresholds: no cell of {study.name!r} has a signal of {list(sweep.thresholds.rules)}")
    return manifest, jobs


def _budget_jobs(
    study: Study, store: Store, url: str, command: str, revision: str | None
) -> tuple[Manifest, list[budgets.BudgetJob]]:
    """A search for every variant and task, and what tracking knows of all of them."""
    sweep = study.sweep
    assert sweep is not None and sweep.budgets is not None
    free = study.model_copy(update={"reference": None, "seeds": (sweep.budgets.seed,), "decide": None})
    free = free.model_copy(update={"variants": tuple(v.model_copy(update={"match": None}) for v in study.variants)})
    plan = make_plan(free, command, revision)
    jobs = []
    for entry in free.variants:
        budgets.space(entry, sweep.budgets)
        for task in free.tasks:
            alone = free.model_copy(update={"variants": (entry,), "tasks": (task,)})
            cell = next(p.cell for p in plan.cells if (p.variant, p.task) == (entry.label, task.label))
            metric = next(row for row in plan.manifest.tasks if row.label == task.label)
            ranges = sweep.budgets.model_dump(mode="json", exclude={"trials"})
            jobs.append(
                budgets.BudgetJob(
                    name=_name(
                        study, entry.label, task.label, "budgets", what=[cell.id, ranges, sweep.max_flops, sweep.seed]
                    ),
                    study=alone,
                    metric=metric.metric,
                    higher_is_better=metric.higher_is_better,
                    spec=sweep.budgets,
                    max_flops=sweep.max_flops,
                    seed=sweep.seed,
                    root=store.root,
                    url=url,
                )
            )
    return plan.manifest.but(study=study.name + SWEPT, cells=[]), jobs


def _name(study: Study, *parts: str, what: list[Any]) -> str:
    """Of an Optuna study: a change in what is searched makes another, so that no trial is taken for one of it."""
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
    return " / ".join([study.name, *parts, digest])


def _searched(jobs: list[thresholds.ThresholdJob], workers: int) -> Iterator[ThresholdRow]:
    """The rows of the searches, as they end."""
    with Progress(len(jobs)) as progress, _pool(min(workers, len(jobs)), progress) as (pool, _):
        waiting: dict[Future[ThresholdRow], thresholds.ThresholdJob] = {}
        for job in jobs:
            label = f"{job.variant} {job.task} {job.rule}"
            progress.start(job.name, label, job.spec.trials)
            waiting[pool.submit(thresholds.search, job)] = job
        for future in as_completed(waiting):
            row = future.result()
            progress.finish(waiting[future].name, f"{row.trials} trials, {len(row.front)} on the front")
            yield row


def _trained(jobs: list[budgets.BudgetJob], workers: int) -> None:
    """Run the budget trials: as many workers as there may be on every search, one search after the other."""
    searches = [(job, budgets.opened(job)) for job in jobs]
    for _, study in searches:
        running(study)  # gives up the trials of dead processes: they are not done
    with Progress(sum(job.spec.trials for job in jobs)) as progress:
        progress.skip(sum(min(done(study), job.spec.trials) for job, study in searches))
        while True:
            busy = [running(study) for _, study in searches]
            crew = [job for job, study in searches for _ in range(min(workers, job.spec.trials - done(study)))]
            if crew:
                with _pool(workers, progress) as (pool, events):
                    for future in as_completed([pool.submit(_budget_worker, job, events) for job in crew]):
                        future.result()
            elif any(busy):
                time.sleep(1)  # in another process, or one that has died
            else:
                return


def _budget_worker(job: budgets.BudgetJob, events: Any) -> None:
    budgets.run_trials(job, lambda kind, arguments: events.put((kind, arguments)))


@contextmanager
def _pool(workers: int, progress: Progress) -> Iterator[tuple[ProcessPoolExecutor, Any]]:
    """Worker processes, and a queue of progress events that they may fill."""
    context = worker_context()
    with context.Manager() as manager:
        events = manager.Queue()
        listener = threading.Thread(target=_listen, args=(events, progress), daemon=True)
        listener.start()
        pool = ProcessPoolExecutor(workers, context, initializer=become_worker, initargs=(pack(),))
        try:
            yield pool, events
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
