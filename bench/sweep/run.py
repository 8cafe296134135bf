"""A study's sweep: its searches in worker processes, progress, and the result."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

from bench.config import Cell
from bench.errors import UserError
from bench.run.cells import TellOf, add_to_log, failure, give_up
from bench.run.executors import HANG, Event
from bench.run.executors.local import LocalExecutor
from bench.run.lease import LeaseWatch
from bench.run.progress import Progress
from bench.run.runner import DEATHS, Running, run_study
from bench.store.environment import environments
from bench.store.manifest import SWEPT, CellRow, Manifest, SweepResult, ThresholdRow
from bench.store.store import Store
from bench.store.tracker import Tracker
from bench.study.naming import base_of
from bench.study.plan import Plan, make_plan
from bench.study.schema import Study
from bench.study.searched import held
from bench.sweep import budgets, thresholds
from bench.sweep.known import take_in
from bench.sweep.storage import done, open_storage, running, shown_url

At = tuple[int, str, Cell | None]
"""A trial that a worker is at: its number, what it tries in words, and its cell once that is known."""


def run_sweep(
    study: Study,
    store: Store,
    url: str,
    jobs: int | None,
    tracker: Tracker,
    command: str,
    revision: str | None,
    hang: float = HANG,
) -> SweepResult:
    """Run the trials that are still wanting, ``jobs`` processes at a time, and write ``sweeps/<study>.json``.

    Several commands, on several machines, may do this at once on one storage: each adds to the same trials. hang:
    seconds without a sign of life after which a worker is ended. Raises UserError if the study has no ``sweep``, no
    trained cell whose thresholds could be swept, or a search whose workers die again and again.
    """
    if study.sweep is None:
        raise UserError(f"study {study.name!r} has no sweep: add sweep.thresholds or sweep.budgets to it")
    open_storage(url, closely=True)  # wrong addresses are told, and tables made, before there are workers
    jobs = jobs or os.cpu_count() or 1
    result = SweepResult(
        study=study.sweep_name,
        of=study.name,
        changed=study.sweep_changed,
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
        for found in _searched(threshold_jobs, jobs, hang):
            result.thresholds.append(found)
            tracker.add_search(found)
        order = {job.name: number for number, job in enumerate(threshold_jobs)}
        result.thresholds.sort(key=lambda row: order[row.study])
    if study.sweep.budgets is not None:
        manifest, budget_jobs = _budget_jobs(study, store, url, command, revision)
        result.tasks = manifest.tasks
        if study.sweep_name not in [sweep.study for sweep in store.sweeps()]:
            store.write_sweep(result)  # so that `cyclebench clean` knows where the trials are
        if again := [planned for job in budget_jobs for planned in budgets.lost(job)]:
            swept_so_far = store.manifest(manifest.study) or manifest.but(cells=[])
            plan = Plan(study.model_copy(update={"name": manifest.study}), tuple(again), swept_so_far)
            run_study(plan, store, Running(jobs=jobs, hang=hang), lambda *_: None)
        _trained(budget_jobs, jobs, hang)
        result.budgets = [budgets.row(job) for job in budget_jobs]
        before = store.manifest(manifest.study)
        rows = {cell.id: cell for cell in before.cells} if before else {}  # of other limits and ranges
        rows |= {
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
        again = f"cyclebench run {base_of(study.name)}{' with the same --set' if study.changed else ''}"
        raise UserError(f"study {study.name!r} has no trained cells to sweep (run: {again})")
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
    left_out = {entry.label: held(entry, study.init_of(entry)) for entry in study.variants}
    for entry in study.variants:
        if why := left_out[entry.label]:
            print(f"{entry.label} is left out of the search of budgets: {why} holds at one shape", file=sys.stderr)
    # Trials are compared by their scores alone.
    nothing = {"reference": None, "decide": None, "hypotheses": (), "harness": ()}
    entries = tuple(entry for entry in study.variants if not left_out[entry.label])
    free = study.model_copy(update={**nothing, "seeds": (sweep.budgets.seed,), "variants": entries})
    plan = make_plan(free, command, revision)
    jobs = []
    for entry in free.variants:
        budgets.space(entry, sweep.budgets)
        for task in free.tasks:
            alone = free.model_copy(update={"variants": (entry,), "tasks": (task,)})
            cell = next(p.cell for p in plan.cells if (p.variant, p.task) == (entry.label, task.label))
            metric = next(row for row in plan.manifest.tasks if row.label == task.label)
            what = [sweep.budgets.model_dump(mode="json", exclude={"trials"}), sweep.max_flops, sweep.seed]
            jobs.append(
                budgets.BudgetJob(
                    name=_name(study, entry.label, task.label, "budgets", what=[cell.id, *what]),
                    key=_name(study, entry.label, task.label, "budgets", what=what),
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


def _searched(jobs: list[thresholds.ThresholdJob], workers: int, hang: float) -> Iterator[ThresholdRow]:
    """The rows of the searches, as they end. Raises UserError if one cannot be ended."""
    named, deaths = {job.name: job for job in jobs}, Counter[str]()
    with (
        Progress(len(jobs), what="searches") as progress,
        LocalExecutor(min(workers, len(jobs)), hang=hang) as executor,
    ):
        waiting = list(named)
        out = 0
        while waiting or out:
            while waiting and out < executor.slots:
                job = named[waiting.pop(0)]
                if not deaths[job.name]:
                    progress.start(job.name, f"{job.variant} {job.task} {job.rule}", job.spec.trials)
                executor.give([job.name], partial(_search, job))
                out += 1
            for event in executor.poll():
                if event.kind == "died":
                    out -= 1
                    deaths[event.id] += 1
                    if deaths[event.id] == DEATHS:
                        raise UserError(f"sweep: {event.id!r}: {event.arguments[0]}, {DEATHS} times")
                    waiting.append(event.id)
                elif event.kind == "end":
                    out -= 1
                    row = _or_raised(event)
                    progress.finish(event.id, f"{row.trials} trials, {len(row.front)} on the front")
                    yield row


def _search(job: thresholds.ThresholdJob, tell: TellOf) -> Iterator[tuple[str, ThresholdRow | Exception]]:
    try:
        yield job.name, thresholds.search(job)
    except Exception as error:
        yield job.name, error


def _trained(jobs: list[budgets.BudgetJob], workers: int, hang: float) -> None:
    """Run the budget trials: as many workers as there may be on every search, one search after the other. Raises
    UserError if one cannot go on.
    """
    searches = [(job, take_in(job)) for job in jobs]
    for _, study in searches:
        running(study)  # gives up the trials of dead processes: they are not done
    with Progress(sum(job.spec.trials for job in jobs), what="trials") as progress:
        progress.skip(sum(min(done(study), job.spec.trials) for job, study in searches))
        crew = _Crew(progress)
        while True:
            busy = [running(study) for _, study in searches]
            wanted = [job for job, study in searches for _ in range(min(workers, job.spec.trials - done(study)))]
            if wanted:
                with LocalExecutor(min(workers, len(wanted)), hang=hang) as executor:
                    crew.work(executor, wanted)
            elif any(busy):
                time.sleep(1)  # in another process, or one that has died
            else:
                return


class _Crew:
    """Workers on budget trials, each on one trial after another."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.deaths: Counter[tuple[str, str]] = Counter()  # by search and what was tried

    def work(self, executor: LocalExecutor, wanted: list[budgets.BudgetJob]) -> None:
        """Give every job a worker, as there is room for one, until all have ended."""
        waiting = {f"{number} {job.name}": job for number, job in enumerate(wanted)}
        out: dict[str, budgets.BudgetJob] = {}
        at: dict[str, At] = {}
        while waiting or out:
            while waiting and len(out) < executor.slots:
                key = next(iter(waiting))
                out[key] = waiting.pop(key)
                executor.give([key], partial(_work, key, out[key]))
            for event in executor.poll():
                job = out[event.id]
                if event.kind in ("start", "update", "phase", "finish"):
                    getattr(self.progress, event.kind)(*event.arguments)
                elif event.kind == "trial":
                    at[event.id] = event.arguments
                elif event.kind == "output":
                    cell = at[event.id][2] if event.id in at else None
                    if cell is not None:
                        add_to_log(Store(job.root).folder(cell.id), *event.arguments)
                elif event.kind == "died":
                    self._bury(job, at.pop(event.id, None), *event.arguments)
                    waiting[event.id] = out.pop(event.id)
                elif event.kind == "end":
                    del out[event.id]
                    _or_raised(event)

    def _bury(self, job: budgets.BudgetJob, at: At | None, reason: str, tail: str | None) -> None:
        """A worker has died at a trial, or without one: that is tried again, but not for ever."""
        number, tried, cell = at or (None, "", None)
        self.deaths[job.name, tried] += 1
        count = self.deaths[job.name, tried]
        last, told = count >= DEATHS, f"{reason}, {DEATHS} times"
        if number is None:
            if last:
                raise UserError(f"sweep: {job.name!r}: {told}")
            return
        budgets.bury(job, number, told, last)
        if cell is None:
            return
        if last:
            store = Store(job.root)
            known, lease = store.record(cell.id), LeaseWatch().free(store.folder(cell.id))
            if lease is not None:
                before = known.at if known is not None and known.status == "failed" else None
                give_up(store, cell, lease, failure(cell, told, "environment", tail), before)
            self.progress.finish(cell.id, f"failed: {told}", True)
        else:
            self.progress.drop(cell.id, f"{reason}, after {count} of {DEATHS} tries")


def _work(key: str, job: budgets.BudgetJob, tell: TellOf) -> Iterator[tuple[str, Exception | None]]:
    try:
        budgets.run_trials(job, partial(tell, key))
        yield key, None
    except Exception as error:
        yield key, error


def _or_raised(event: Event) -> Any:
    """What a worker has found. Raises what was raised there."""
    (found,) = event.arguments
    if isinstance(found, Exception):
        raise found
    return found
