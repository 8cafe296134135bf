"""MLflow as a window on the cell store: it can always be filled again from there, so it may fail without loss.

Several processes write into one MLflow. What must not be there twice (a study's run, a cell's run) is looked for and
written by one process at a time, which holds a lock. A cell's run is opened when the cell begins, shows its curves
while they are drawn, and tells by ``OWNER`` who is at it: that process completes it. Any other one that is not complete
is deleted by who logs the cell, or who sees that its owner is gone. While runs are open, a study's run does not say
that it holds everything, so that whoever comes next looks.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import islice
from pathlib import Path
from typing import Any

from bench.errors import first_line
from bench.processes import gone, me
from bench.store.databases import lock_beside, sqlite_file
from bench.store.manifest import SWEPT, TUNING, CellRow, Manifest, SearchRow, ThresholdRow
from bench.store.mlflow_server import ANSWER, EXPERIMENT, connect, experiment, former_experiment, tags_in, ui_command
from bench.store.records import HistoryEntry, Outcome, configuration, dotted
from bench.store.store import Store
from bench.store.tracked import Row, about, curves, dataset, digest_of_keys, metrics, page, shown_of, system, totals
from bench.store.tracker import Findings, Key, Placed, Tracker, digest_of, register

NOTE = "mlflow.note.content"  # what MLflow shows of a run or an experiment before all else
CELL_TAG = "cyclebench.cell"
ATTEMPT = "cyclebench.attempt"
STUDY = "cyclebench.study"
OWNER = "cyclebench.owner"  # the process that writes a child run, until it is complete
SEARCH = "cyclebench.search"
DIGEST = "cyclebench.digest"  # of what a search has found
HELD = "cyclebench.held"  # on a study's run: a digest of all that it has held, to see soon that nothing is missing
STAYS = "cyclebench.stays"  # on a study's run: that it is in the experiment of before has been told
SHOWN = "cyclebench.shown"  # on a study's run: a digest of what it has told of the study and of the report's files
EXPERIMENT_OF = EXPERIMENT + "/{}"  # the name of a study's experiment; its tuning and its sweep are there, too
METRICS_A_BATCH, PARAMS_A_BATCH = 1000, 100  # limits of MLflow's log_batch


def _contained(method: Callable[..., None]) -> Callable[..., None]:
    """Turn a failing server into one warning; after that the tracker is silent.

    What fails is tried again, once, on a new connection: a database may be damaged or replaced, a run deleted. Not if
    there was no connection before, or if the server takes its time to fail.
    """

    @wraps(method)
    def call(self: MlflowTracker, *arguments: Any) -> None:
        if self.broken:
            return
        began = time.monotonic()
        try:
            try:
                method(self, *arguments)
            except Exception:
                before = self.client is not None or sqlite_file(self.uri) is not None
                if not before or self.mending or time.monotonic() - began > ANSWER:
                    raise
                self.mend()
                method(self, *arguments)
        except Exception as error:
            self.broken, self.hung = True, self.hung or time.monotonic() - began > ANSWER
            if not self.told:
                where = "results are kept in the store, and a later command adds them"
                print(f"warning: MLflow at {self.uri} is not available, {where}: {first_line(error)}", file=sys.stderr)
            self.told = True

    return call


@dataclass(frozen=True)
class _Open:
    """The run of a cell that is running here. began: ms since 1970; rows: metrics that it has already."""

    run: str
    began: int
    rows: set[Row]


@register("mlflow")
class MlflowTracker(Tracker):
    """An experiment and a parent run for a study, one child run for a cell: parameters, metrics by step and by FLOPs,
    data, artifacts.
    """

    shown_by = staticmethod(ui_command)

    def __init__(self, uri: str, store: Store) -> None:
        """See ``Tracker``."""
        super().__init__(uri, store)
        self.client: Any = None
        self.parent = ""
        self.told = self.mending = False
        self.found: Findings | None = None
        self.open: dict[str, _Open] = {}  # by the cell's id
        self.ready: dict[str, tuple[dict[Key, CellRow | SearchRow], str]] = {}  # looked up in this command already

    @_contained
    def study(self, manifest: Manifest) -> None:
        """Open the study's parent run, the existing one if there is one."""
        self.manifest = manifest
        self._open(manifest)

    def complete(self, manifest: Manifest, paths: Sequence[Path] = (), found: Findings | None = None) -> None:
        """See ``Tracker``. Where a SQLite file says that it holds all of it, it is not opened by MLflow, whose import
        takes seconds.
        """
        there = self._held_whole(manifest, paths, found) if self.manifest is None and self.trusting else None
        if there is None:
            super().complete(manifest, paths, found)
        else:
            self.there += there
        self.ready = {}

    def holding(self, manifest: Manifest) -> dict[Key, CellRow | SearchRow]:
        """See ``Tracker``."""
        return self.ready[manifest.study][0] if manifest.study in self.ready else super().holding(manifest)

    def _held_whole(self, manifest: Manifest, paths: Sequence[Path], found: Findings | None) -> int | None:
        """How many cells with a record a study has, if all of it is said to be held; else None."""
        parts = [self.store.manifest(name) for name in self.store.parts(manifest.study) if name != manifest.study]
        cells = 0
        here = [(manifest, paths, found), *((part, (), None) for part in parts if part is not None)]
        for one, files, what in here:
            told, holding, shown = tags_in(self.uri, STUDY, one.study), self.holding(one), shown_of(one, files, what)
            self.ready[one.study] = holding, shown
            if (told.get(HELD), told.get(SHOWN)) != (digest_of_keys(holding), shown):
                return None
            cells += sum(isinstance(row, CellRow) for row in holding.values())
        return cells

    def mend(self) -> None:
        """Connect anew, and bring what is there then up to what the store holds."""
        assert self.manifest is not None
        self.mending = True
        try:
            self._open(self.manifest, closely=True)
            self.catch_up(self.manifest)
        finally:
            self.mending = False

    def _open(self, manifest: Manifest, closely: bool = False) -> None:
        self.client = None
        client, new = connect(self.uri, closely)
        self.emptied |= new
        self.lock = lock_beside(sqlite_file(self.uri) or self.store.root / "mlflow")
        tags = {STUDY: manifest.study, NOTE: about(manifest), "git": str(manifest.git)}
        of_study = f"tags.`{STUDY}` = {_quoted(manifest.study)} AND tags.`role` = 'study'"
        with self.lock:
            name = EXPERIMENT_OF.format(manifest.study.removesuffix(TUNING).removesuffix(SWEPT))
            former = former_experiment(client, of_study)
            self.experiment, self.own = former or experiment(client, name), former is None
            found = client.search_runs([self.experiment], of_study, max_results=1)
            run = (
                found[0]
                if found
                else client.create_run(self.experiment, tags={**tags, "role": "study"}, run_name=manifest.study)
            )
        for key, value in tags.items():
            before = run.data.tags.get(key, "")
            if before != value and not (key == NOTE and before.startswith(value)):  # verdicts of before stay meanwhile
                client.set_tag(run.info.run_id, key, value)
        if former and STAYS not in run.data.tags:
            print(
                f"MLflow: {manifest.study} stays in the experiment {EXPERIMENT!r}, where it was begun", file=sys.stderr
            )
            client.set_tag(run.info.run_id, STAYS, "told")
        client.log_dict(run.info.run_id, manifest.dump(), "study.json")
        if closely or run.info.run_id != self.parent:
            self.known, self.open = set(), {}
        self.client, self.parent, self.held = client, run.info.run_id, run.data.tags.get(HELD)

    def catch_up(self, manifest: Manifest) -> None:
        """Log what the store holds of a study and this does not. What it has said to hold is not looked at again."""
        if self.broken:
            return
        holding = self.holding(manifest)
        if not self.known:
            self._look(holding)
        self.fill(holding)
        self._say(holding)

    @_contained
    def _look(self, holding: dict[Key, CellRow | SearchRow]) -> None:
        """See what is held already."""
        self.known = set(holding) if self.trusting and self.held == digest_of_keys(holding) else set(self._logged())

    @_contained
    def _say(self, holding: dict[Key, CellRow | SearchRow]) -> None:
        """Say what is held."""
        if not (set(holding) <= self.known and self.held != (now := digest_of_keys(holding))):
            return
        at_work = f"attributes.status = 'RUNNING' AND tags.`mlflow.parentRunId` = '{self.parent}'"
        with self.lock:
            if not self.client.search_runs([self.experiment], at_work, max_results=1):
                self.client.set_tag(self.parent, HELD, now)
                self.held = now

    def _logged(self) -> Iterator[Key]:
        """All cells, with their attempts, and searches whose runs are complete. Those that a killed process has left
        half written are deleted, and the second of two of the same.
        """
        token, seen = None, set[Key]()
        while True:
            page = self.client.search_runs(
                [self.experiment], f"tags.`mlflow.parentRunId` = '{self.parent}'", page_token=token
            )
            for run in page:
                tags, complete = run.data.tags, run.info.status in ("FINISHED", "FAILED")
                key = self.store.current(tags.get(CELL_TAG, "")), tags.get(ATTEMPT, "")
                if SEARCH in tags:
                    key = tags[SEARCH], tags.get(DIGEST, "")
                if (complete and key in seen) or (not complete and OWNER in tags and gone(json.loads(tags[OWNER]))):
                    self.client.delete_run(run.info.run_id)
                elif complete:
                    seen.add(key)
                    yield key
            token = page.token
            if not token:
                return

    def _children(self, tag: str, value: str) -> list[Any]:
        """The runs of a cell or of a search."""
        where = f"tags.`mlflow.parentRunId` = '{self.parent}' AND tags.`{tag}` = {_quoted(value)}"
        return list(self.client.search_runs([self.experiment], where))

    def _kept(self, runs: list[Any], held: Callable[[Any], bool]) -> bool:
        """Whether one of some runs is complete and is what is held; the others are deleted. To be called under the
        lock: nobody is writing them.
        """
        kept = False
        for run in runs:
            if not kept and run.info.status in ("FINISHED", "FAILED") and held(run):
                kept = True
            else:
                self.client.delete_run(run.info.run_id)
        return kept

    @_contained
    def log(self, record: Outcome, place: Placed) -> None:
        """Log a cell's record as a child run, once: whichever process has logged it, it is left alone."""
        attempt = "" if record.status == "done" else str(record.at)  # a cell has one result, but may fail several times
        began = int(1000 * (record.timing.started if record.status == "done" else record.at))
        opened = self.open.pop(record.id, None)
        with self.lock:
            runs = [
                run
                for run in self._children(CELL_TAG, record.id)
                if run.data.tags.get(ATTEMPT, "") == attempt or run.info.status == "RUNNING"
            ]
            ours = opened is not None and opened.began == began and opened.run in [run.info.run_id for run in runs]
            others = [run for run in runs if not (ours and opened and run.info.run_id == opened.run)]
            if not self._kept(others, lambda run: run.info.start_time == began):
                self._write(record, place, attempt, began, opened if ours else None)
            elif ours and opened is not None:
                self.client.delete_run(opened.run)

    @_contained
    def opened(self, id: str, place: Placed, seed: int, started: float) -> None:
        """Begin the run of a cell that begins; see ``Tracker``."""
        began = int(1000 * started)
        with self.lock:
            self.client.set_tag(self.parent, HELD, "")
            self.held = ""
            for run in self._children(CELL_TAG, id):
                if run.info.status == "RUNNING":  # of a process that has the cell no more
                    self.client.delete_run(run.info.run_id)
            run = self._begin(id, seed, place, "", began, {"status": "running"})
        self.open[id] = _Open(run, began, set())

    @_contained
    def entry(self, id: str, entry: dict[str, float]) -> None:
        """See ``Tracker``."""
        if (opened := self.open.get(id)) is not None:
            rows = [row for row in curves(HistoryEntry.model_validate(entry), opened.began) if row not in opened.rows]
            self._log(opened.run, rows)
            opened.rows.update(rows)

    @_contained
    def dropped(self, id: str) -> None:
        """See ``Tracker``."""
        if (opened := self.open.pop(id, None)) is not None:
            self.client.delete_run(opened.run)

    def _begin(self, id: str, seed: int, place: Placed, attempt: str, began: int, more: dict[str, str]) -> str:
        """Open a cell's run; its id."""
        tags = {"mlflow.parentRunId": self.parent, CELL_TAG: id, ATTEMPT: attempt, OWNER: json.dumps(me())}
        tags |= {"variant": place.variant, "task": place.task, **more}
        name = f"{place.variant} {place.task} seed {seed}"
        return str(self.client.create_run(self.experiment, start_time=began, tags=tags, run_name=name).info.run_id)

    def _log(self, run: str, rows: Iterable[Row]) -> None:
        from mlflow.entities import Metric  # start-up

        for batch in _batches([Metric(*row) for row in rows], METRICS_A_BATCH):
            self.client.log_batch(run, metrics=batch)

    def _write(self, record: Outcome, place: Placed, attempt: str, began: int, opened: _Open | None = None) -> None:
        """Write a cell's run, or what an open one lacks."""
        from mlflow.entities import Param  # start-up

        tags = {
            "status": record.status,
            "git": str(record.environment.git),
            "data_fingerprint": record.cell.fingerprint,
        }
        if opened is None:
            run = self._begin(record.id, record.cell.seed, place, attempt, began, tags)
        else:
            run = opened.run
            for key, value in tags.items():
                self.client.set_tag(run, key, value)
        self.client.log_inputs(run, datasets=[dataset(record)])
        for params in _batches(
            [Param(key, str(value)) for key, value in dotted(configuration(record))], PARAMS_A_BATCH
        ):
            self.client.log_batch(run, params=params)
        rows = [
            *system(self.store.usage(record.id), began),
            *(metrics(record, began) if record.status == "done" else ()),
        ]
        self._log(run, rows if opened is None else [row for row in rows if row not in opened.rows])
        ended = None
        if record.status == "done":
            ended = began + int(1000 * record.timing.seconds)
            files = ["result.json", "log.txt"]  # traces are for computing, from the store
        else:
            self.client.set_tag(run, "reason", record.reason)
            files = ["failure.json", "log.txt"]
        for path in (self.store.folder(record.id) / file for file in files):
            if path.exists():
                self.client.log_artifact(run, str(path))
        self.client.set_terminated(run, "FINISHED" if record.status == "done" else "FAILED", ended)

    @_contained
    def search(self, row: SearchRow) -> None:
        """Log a search of a sweep (a row of its result) as a child run, in place of what it had found before: what was
        tuned for each budget as metrics, by percent of the FLOPs at full depth, and the whole row, its front with it,
        as a file. Trials of thresholds are too many for a run each; a trial that trains a cell has the cell's.
        """
        from mlflow.entities import Metric, Param  # start-up

        told, digest = row.dump(), digest_of(row)
        tags = {"mlflow.parentRunId": self.parent, SEARCH: row.study, DIGEST: digest, OWNER: json.dumps(me())}
        tags |= {key: str(told[key]) for key in ("variant", "task", "rule") if key in told}
        params = [Param(key, str(told[key])) for key in ("metric", "rule", "per_cycle", "seed") if key in told]
        now = int(1000 * time.time())
        rows = [Metric("trials", row.trials, now, row.trials)]
        for point in row.tuned if isinstance(row, ThresholdRow) else ():
            step = round(100 * point.share_of_full)
            for split, scores in (("valid", point.valid), ("test", point.test)):
                rows += [Metric(f"tuned_{split}_{key}", value, now, step) for key, value in scores.items()]
        with self.lock:
            if self._kept(self._children(SEARCH, row.study), lambda run: run.data.tags.get(DIGEST) == digest):
                return
            made = self.client.create_run(self.experiment, tags=tags, run_name=row.study.rpartition(" / ")[0])
            run = made.info.run_id
            self.client.log_batch(run, params=params, metrics=rows[:METRICS_A_BATCH])
            self.client.log_dict(run, told, "search.json")
            self.client.set_terminated(run)

    @_contained
    def tell(self, found: Findings) -> None:
        """Show a study's verdicts and its table where MLflow's pages of it begin, its means as metrics of its run."""
        assert self.manifest is not None
        told, self.found = page(self.manifest, found), found
        self.client.set_tag(self.parent, NOTE, told)
        if self.own:
            self.client.set_experiment_tag(self.experiment, NOTE, told)
        now = int(1000 * time.time())
        self._log(self.parent, totals(self.manifest, found, now))

    @_contained
    def finish(self, paths: Sequence[Path]) -> None:
        """Attach the report's files to the study's run and close it."""
        with self.lock:
            for path in paths:
                self.client.log_artifact(self.parent, str(path), "report")
            self.client.set_terminated(self.parent)
        assert self.manifest is not None
        _, shown = self.ready.get(self.manifest.study, ({}, ""))
        self.client.set_tag(self.parent, SHOWN, shown or shown_of(self.manifest, paths, self.found))
        self.found = None


def _quoted(value: str) -> str:
    """A value in a filter of MLflow, which knows no way to write a quote within quotes of its kind."""
    return f'"{value}"' if "'" in value else f"'{value}'"


def _batches(rows: Sequence[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch
