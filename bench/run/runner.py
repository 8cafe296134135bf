"""A study's cells to results: what is to be run, given out to an executor, and what comes back."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from bench.config import CELL_SOURCE
from bench.data.prepared import prepare
from bench.errors import UserError, unknown
from bench.run.cells import Job, add_to_log, failure, give_up
from bench.run.executors import HANG, Event, Executor
from bench.run.executors.local import LocalExecutor
from bench.run.executors.ray import RayExecutor
from bench.run.lease import BEAT, EXPIRY, LeaseWatch
from bench.run.packs import packs
from bench.run.progress import Progress
from bench.run.status import planned_flops
from bench.store.loops import record_divergence
from bench.store.records import Failure, Outcome
from bench.store.store import Records, Store
from bench.store.tracker import Placed
from bench.study.plan import Plan, Planned, stages
from bench.train.checkpoints import Every

DEATHS = 3  # a cell whose worker has died so often has failed
LOOK = 1.0  # seconds between looks at a cell that another process holds

OnRecord = Callable[[Outcome, Planned], None]


@dataclass(frozen=True)
class Running:
    """How cells are run.

    None of it changes a number: whether a cell is computed in a stack, its configuration says, and on a CPU it does not
    matter with which others.

    Attributes:
        jobs: cells at a time, None for as many as there is room for.
        retry: run failed cells again, whatever they failed of.
        every: how often checkpoints are written.
        address: of a Ray cluster, None starts one here.
        beat, expiry: of leases, in seconds.
        pack: cells in one stack at most, 1 for each with a copy of itself, None for as many as pay.
        hang: seconds without a sign of life after which cells are ended, as if their process had died.
    """

    jobs: int | None = None
    retry: bool = False
    every: Every = field(default_factory=Every)
    executor: Literal["local", "ray"] = "local"
    address: str | None = None
    beat: float = BEAT
    expiry: float = EXPIRY
    pack: int | None = None
    hang: float = HANG

    def __post_init__(self) -> None:
        """Raises UserError for numbers below 1, and for an executor that there is not."""
        for name in ("jobs", "pack"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise UserError(f"{name}: {value!r} (allowed: a whole number from 1 on, or none)")
        if self.executor not in (known := ("local", "ray")):
            raise unknown("executor", self.executor, known)


class Watcher(Protocol):
    """Sees cells while they run; see ``bench.store.tracker.Tracker``."""

    def opened(self, id: str, place: Placed, seed: int, started: float) -> None: ...

    def entry(self, id: str, entry: dict[str, float]) -> None: ...

    def dropped(self, id: str) -> None: ...


def run_study(plan: Plan, store: Store, how: Running, on_record: OnRecord, watcher: Watcher | None = None) -> Records:
    """Run the cells that are not done yet and return the records of all of the study's cells.

    Several processes may do this at once on the same store: each cell is run by one of them, and each of them returns
    all records. A cell that failed of itself is run again only with ``how.retry``; one that failed of its environment
    (memory, disk, a killed process), always. on_record is called for every record that is made by this process, as soon
    as there is one. Finished cells are not even read. watcher: sees the cells that this process runs.
    """
    store.write_manifest(plan.study.name, plan.manifest)
    unique = {planned.cell.id: planned for planned in plan.cells}
    done, failures, todo = wanted(unique, store, how.retry)
    for id in done:
        store.tidy(id)
    costs = planned_flops(todo)
    with Progress(len(unique), costs={p.cell.id: costs[p.variant, p.task] for p in todo}) as progress:
        progress.skip(len(done), len(unique) - len(todo) - len(done))
        if todo:
            prepare((planned.cell for planned in todo), store)
            with _executor(how, todo) as executor:
                for stage in stages(todo):
                    study = _Study(store, how, progress, executor, {p.cell.id: p for p in stage}, failures, watcher)
                    for record in study.run():
                        if record.status == "failed":
                            failures[record.id] = record
                        else:
                            failures.pop(record.id, None)
                            done.add(record.id)
                        if record.id not in study.elsewhere:
                            on_record(record, unique[record.id])
    return Records(store, (id for id in unique if id in done), failures)


def wanted(unique: dict[str, Planned], store: Store, retry: bool) -> tuple[set[str], dict[str, Failure], list[Planned]]:
    """The ids that are done, the failures by id, and the cells to run: those without a result that may get one, now or
    because what they start from may.
    """
    done = {id for id in unique if store.done(id)}
    failures = store.failures(id for id in unique if id not in done)

    def open_(id: str) -> bool:
        if id in failures:
            return retry or failures[id].kind == "environment"
        return id not in done

    sources = {f"{CELL_SOURCE}{id}" for id in unique if open_(id)}
    todo = [
        planned
        for id, planned in unique.items()
        if open_(id) or (id in failures and planned.cell.init is not None and planned.cell.init.source in sources)
    ]
    return done, failures, todo


def _executor(how: Running, todo: list[Planned]) -> Executor:
    if how.executor == "ray":
        return RayExecutor(how.jobs or len(todo), how.address, how.hang)
    gpus = torch.cuda.device_count() if any(planned.cell.train.device != "cpu" for planned in todo) else 0
    each = max(planned.cell.train.processes for planned in todo)
    return LocalExecutor(min(len(todo), how.jobs or default_jobs(todo, gpus)), gpus, each, how.hang)


def default_jobs(todo: list[Planned], gpus: int) -> int:
    """Cells at a time: the GPUs divided by a cell's processes, else the cores by their threads; at least one."""
    trains = [planned.cell.train for planned in todo]
    if gpus:
        return max(1, gpus // max(train.processes for train in trains))
    return max(1, (os.cpu_count() or 1) // max(train.processes * train.threads for train in trains))


class _Study:
    """Cells on their way: waiting (for a worker, or for another process that holds them) or running."""

    def __init__(
        self,
        store: Store,
        how: Running,
        progress: Progress,
        executor: Executor,
        todo: dict[str, Planned],
        failures: dict[str, Failure],
        watcher: Watcher | None = None,
    ) -> None:
        self.store, self.how, self.progress, self.executor, self.todo = store, how, progress, executor, todo
        self.watcher = watcher
        self.failed = {id: record.at for id, record in failures.items()}
        self.waiting = dict.fromkeys(todo, 0.0)  # by id: when to look at it next
        self.packs = {p.cell.id: pack for pack in packs(todo.values(), executor.slots, how.pack) for p in pack}
        self.running: dict[str, int] = {}  # by id: the number of the job
        self.jobs = 0
        self.elsewhere: set[str] = set()
        self.deaths: Counter[str] = Counter()
        self.given_up: dict[str, Failure] = {}  # of waiting cells that have died too often
        self.watch = LeaseWatch(how.expiry)

    def run(self) -> Iterator[Outcome]:
        """Yield every cell's record."""
        try:
            while self.waiting or self.running:
                yield from self._give_up()
                self._give_out()
                if not self.running:
                    time.sleep(LOOK / 4)
                for event in self.executor.poll():
                    yield from self._take_in(event)
        finally:
            for id in self.running:  # interrupted
                self._drop(id)

    def _drop(self, id: str) -> None:
        if self.watcher is not None:
            self.watcher.dropped(id)

    def _give_out(self) -> None:
        for id in list(self.waiting):
            if len(set(self.running.values())) >= self.executor.slots:
                return
            jobs = [job for planned in self._with(id) if (job := self._job(planned)) is not None]
            if jobs:
                self.jobs += 1
                self.running |= {job.cell.id: self.jobs for job in jobs}
                self.executor.submit(tuple(jobs))

    def _with(self, id: str) -> list[Planned]:
        """The waiting cells that go with one; after the death of a worker each goes alone, to see whose fault it is."""
        pack = self.packs[id]
        if any(self.deaths[planned.cell.id] for planned in pack):
            pack = [self.todo[id]]
        return [planned for planned in pack if planned.cell.id in self.waiting]

    def _job(self, planned: Planned) -> Job | None:
        """None while another process holds the cell."""
        id, how = planned.cell.id, self.how
        if id in self.given_up or (number := self._free(id)) is None:
            return None
        del self.waiting[id]
        label = f"{planned.variant} {planned.task} seed {planned.cell.seed}"
        return Job(planned.cell, label, self.store.root, how.every, number, self.failed.get(id), how.beat)

    def _free(self, id: str) -> int | None:
        """The number of the next lease of a waiting cell, None while another process holds it."""
        now = time.monotonic()
        if self.waiting[id] > now:
            return None
        number = self.watch.free(self.store.folder(id))
        if number is None:
            self.waiting[id] = now + LOOK
        return number

    def _take_in(self, event: Event) -> Iterator[Outcome]:
        id, kind, arguments = event
        if kind in ("start", "update", "phase"):
            getattr(self.progress, kind)(id, *arguments)
            return
        if kind in ("began", "entry"):
            if self.watcher is not None and kind == "began":
                self.watcher.opened(id, self.todo[id], self.todo[id].cell.seed, *arguments)
            elif self.watcher is not None:
                self.watcher.entry(id, *arguments)
            return
        if kind == "found":
            self.elsewhere.add(id)
            return
        if kind == "output":
            add_to_log(self.store.folder(id), *arguments)
            return
        self.running.pop(id, None)
        if kind == "died":
            self._died(id, *arguments)
        elif arguments[0] is None:
            self._drop(id)
            self.waiting[id] = time.monotonic() + LOOK
        else:
            self.progress.finish(id, *_told(arguments[0]))
            yield arguments[0]

    def _died(self, id: str, reason: str, tail: str | None) -> None:
        """Have the cell tried again, or given up if its workers have died too often. tail: of what was printed."""
        self.deaths[id] += 1
        self._drop(id)
        self.progress.drop(id, f"{reason}, after {self.deaths[id]} of {DEATHS} tries")
        self.waiting[id] = 0.0
        if self.deaths[id] >= DEATHS:
            told = f"{reason}, {DEATHS} times"
            self.given_up[id] = failure(self.todo[id].cell, told, "environment", tail)

    def _give_up(self) -> Iterator[Outcome]:
        """Store why cells have failed whose workers have died too often, unless other processes have them."""
        for id in list(self.given_up):
            if (number := self._free(id)) is None:
                continue
            mine = self.given_up[id]
            record = give_up(self.store, self.todo[id].cell, number, mine, self.failed.get(id))
            if record is None:
                continue
            del self.given_up[id], self.waiting[id]
            if record is not mine:
                self.elsewhere.add(id)
            self.progress.finish(id, *_told(record))
            yield record


def _told(record: Outcome) -> tuple[str, bool]:
    if record.status == "failed":
        return f"failed: {record.reason}", True
    scores = record.metrics
    name = "bits_per_byte" if "test_bits_per_byte" in scores else "accuracy"
    diverges = record_divergence(record)
    warning = "" if diverges is None else f"\n  warning: {diverges}"
    return f"{name.replace('_', ' ')} {record.test(name):.3f}, {record.timing.seconds:.1f} s{warning}", False
