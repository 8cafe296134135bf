"""MLflow as a window on the cell store: it can always be filled again from there, so it may fail without loss."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Protocol

from bench.errors import first_line
from bench.processes import gone, me
from bench.registry import Registry
from bench.store.manifest import BudgetRow, Manifest, ThresholdRow
from bench.store.records import Outcome, Record, configuration
from bench.store.store import Store

EXPERIMENT = "cyclebench"
CELL_TAG = "cyclebench.cell"
ATTEMPT = "cyclebench.attempt"
STUDY = "cyclebench.study"
OWNER = "cyclebench.owner"  # the process that writes a child run, until it is complete
SEARCH = "cyclebench.search"
METRICS_A_BATCH, PARAMS_A_BATCH = 1000, 100  # limits of MLflow's log_batch


class Placed(Protocol):
    """A cell's place in its study: labels."""

    @property
    def variant(self) -> str: ...

    @property
    def task(self) -> str: ...


def _contained(method: Callable[..., None]) -> Callable[..., None]:
    """Turn a failing tracking server into one warning; after that the tracker is silent."""

    @wraps(method)
    def call(self: Tracker, *arguments: Any) -> None:
        if self.broken:
            return
        try:
            method(self, *arguments)
        except Exception as error:
            self.broken = True
            reason = first_line(error)
            print(
                f"warning: MLflow at {self.uri} is not available, results are kept in the store: {reason}",
                file=sys.stderr,
            )

    return call


class Tracker:
    """A window on the store. Subclass it and decorate it with ``@register("name")``.

    broken: whether its server has failed, after which it is silent; known: cells and attempts that it holds.
    """

    name: ClassVar[str]

    def __init__(self, uri: str, store: Store) -> None:
        """uri: what ``--tracking-uri`` says; nothing is contacted before ``study`` is called."""
        self.uri, self.store, self.broken = uri, store, False
        self.known: set[tuple[str, str]] = set()

    def study(self, manifest: Manifest) -> None:
        """A study begins or goes on."""

    def log(self, record: Outcome, place: Placed) -> None:
        """A cell has a record; what is held already is left alone."""

    def search(self, row: ThresholdRow | BudgetRow) -> None:
        """A search of a sweep has ended."""

    def finish(self, paths: Sequence[Path]) -> None:
        """The study's command has ended. paths: of its report's files."""

    def catch_up(self, manifest: Manifest) -> None:
        """Log the records in the store of a study's cells that its run does not hold yet; nothing else is read."""
        for cell in manifest.cells:
            if self.broken:
                return
            if (cell.id, "") in self.known and self.store.done(cell.id):
                continue
            record = self.store.record(cell.id)
            if record is not None:
                self.log(record, cell)


trackers: Registry[type[Tracker]] = Registry("tracker", "cyclebench.trackers", "bench.store.tracking")
register = trackers.register


@register("mlflow")
class MlflowTracker(Tracker):
    """One parent run for a study, one child run for a cell: parameters, metrics by step and by FLOPs, artifacts."""

    @_contained
    def study(self, manifest: Manifest) -> None:
        """Open the study's parent run, the existing one if there is one, and see which cells it holds already."""
        self.client = _client(self.uri)
        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        self.experiment = experiment.experiment_id if experiment else self.client.create_experiment(EXPERIMENT)
        tags = {STUDY: manifest.study, "mlflow.note.content": manifest.question, "git": str(manifest.git)}
        found = self.client.search_runs(
            [self.experiment], f"tags.`{STUDY}` = '{manifest.study}' AND tags.`role` = 'study'", max_results=1
        )
        if found:
            self.parent = found[0].info.run_id
            for key, value in tags.items():
                self.client.set_tag(self.parent, key, value)
        else:
            run = self.client.create_run(self.experiment, tags={**tags, "role": "study"}, run_name=manifest.study)
            self.parent = run.info.run_id
        self.client.log_dict(self.parent, manifest.dump(), "study.json")
        self.known = set(self._logged())

    def _logged(self) -> Iterator[tuple[str, str]]:
        """Cell and attempt of every child run that is complete; what a killed process left half written is deleted."""
        token = None
        while True:
            page = self.client.search_runs(
                [self.experiment], f"tags.`mlflow.parentRunId` = '{self.parent}'", page_token=token
            )
            for run in page:
                if run.info.status in ("FINISHED", "FAILED"):
                    yield self.store.current(run.data.tags.get(CELL_TAG, "")), run.data.tags.get(ATTEMPT, "")
                elif OWNER in run.data.tags and gone(json.loads(run.data.tags[OWNER])):
                    self.client.delete_run(run.info.run_id)
            token = page.token
            if not token:
                return

    @_contained
    def log(self, record: Outcome, place: Placed) -> None:
        """Log a cell's record as a child run, once: what the study's run holds already is left alone."""
        from mlflow.entities import Metric, Param  # start-up

        attempt = "" if record.status == "done" else str(record.at)  # a cell has one result, but may fail several times
        if (record.id, attempt) in self.known:
            return
        began = int(1000 * (record.timing.started if record.status == "done" else record.at))
        tags = {
            "mlflow.parentRunId": self.parent,
            CELL_TAG: record.id,
            ATTEMPT: attempt,
            OWNER: json.dumps(me()),
            "variant": place.variant,
            "task": place.task,
            "status": record.status,
            "git": str(record.environment.git),
            "data_fingerprint": record.cell.fingerprint,
        }
        name = f"{place.variant} {place.task} seed {record.cell.seed}"
        run = self.client.create_run(self.experiment, start_time=began, tags=tags, run_name=name).info.run_id
        for params in _batches([Param(key, str(value)) for key, value in _flat(configuration(record))], PARAMS_A_BATCH):
            self.client.log_batch(run, params=params)
        rows = [
            *_system(self.store.usage(record.id), began),
            *(_metrics(record, began) if record.status == "done" else ()),
        ]
        for metrics in _batches([Metric(*row) for row in rows], METRICS_A_BATCH):
            self.client.log_batch(run, metrics=metrics)
        ended = None
        if record.status == "done":
            ended = began + int(1000 * record.timing.seconds)
            files = ["result.json", "trace.npz", "trace_valid.npz", "log.txt"]
        else:
            self.client.set_tag(run, "reason", record.reason)
            files = ["failure.json", "log.txt"]
        for path in (self.store.folder(record.id) / file for file in files):
            if path.exists():
                self.client.log_artifact(run, str(path))
        self.client.set_terminated(run, "FINISHED" if record.status == "done" else "FAILED", ended)
        self.known.add((record.id, attempt))

    @_contained
    def search(self, row: ThresholdRow | BudgetRow) -> None:
        """Log a search of a sweep (a row of its result) as a child run, the existing one if there is one: what was
        tuned for each budget as metrics, by percent of the FLOPs at full depth, and the whole row, its front with it,
        as a file. Trials of thresholds are too many for a run each; a trial that trains a cell has the cell's.
        """
        from mlflow.entities import Metric, Param  # start-up

        parent = f"tags.`mlflow.parentRunId` = '{self.parent}' AND tags.`{SEARCH}` = '{row.study}'"
        found = self.client.search_runs([self.experiment], parent, max_results=1)
        tags = {"mlflow.parentRunId": self.parent, SEARCH: row.study}
        told = row.dump()
        tags |= {key: str(told[key]) for key in ("variant", "task", "rule") if key in told}
        name = row.study.rpartition(" / ")[0]
        made = found[0] if found else self.client.create_run(self.experiment, tags=tags, run_name=name)
        run, now = made.info.run_id, int(1000 * time.time())
        params = [Param(key, str(told[key])) for key in ("metric", "rule", "per_cycle", "seed") if key in told]
        rows = [Metric("trials", row.trials, now, row.trials)]
        for point in row.tuned if isinstance(row, ThresholdRow) else ():
            step = round(100 * point.share_of_full)
            for split, scores in (("valid", point.valid), ("test", point.test)):
                rows += [Metric(f"tuned_{split}_{key}", value, now, step) for key, value in scores.items()]
        self.client.log_batch(run, params=params, metrics=rows[:METRICS_A_BATCH])
        self.client.log_dict(run, told, "search.json")
        self.client.set_terminated(run)

    @_contained
    def finish(self, paths: Sequence[Path]) -> None:
        """Attach the report's files to the study's run and close it."""
        for path in paths:
            self.client.log_artifact(self.parent, str(path), "report")
        self.client.set_terminated(self.parent)


def log_evaluation(uri: str, checkpoint: str, rows: Sequence[dict[str, Any]], paths: Sequence[Path]) -> None:
    """Log a checkpoint's downstream scores as a run of its own; a failing server is one warning.

    Metrics are named task/metric; their step is the number of cycles.
    """
    try:
        client = _client(uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        id = experiment.experiment_id if experiment else client.create_experiment(EXPERIMENT)
        run = client.create_run(
            id, tags={"role": "evaluation", "checkpoint": checkpoint}, run_name=f"eval {checkpoint}"
        )
        for row in rows:
            name = "".join(letter if letter.isalnum() or letter in "_-./" else "_" for letter in row["metric"])
            client.log_metric(run.info.run_id, f"{row['task']}/{name}", row["value"], step=row["cycles"])
            client.log_metric(
                run.info.run_id, f"{row['task']}/flops_per_token", row["flops_per_token"], step=row["cycles"]
            )
        for path in paths:
            client.log_artifact(run.info.run_id, str(path))
        client.set_terminated(run.info.run_id)
    except Exception as error:
        reason = first_line(error)
        print(f"warning: MLflow at {uri} is not available, results are kept in the files: {reason}", file=sys.stderr)


def _client(uri: str) -> Any:
    """An MLflow client that says nothing by itself and calls nobody but the tracking server."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # an absent server is told of in seconds, not minutes
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from mlflow import MlflowClient  # start-up

    logging.getLogger("mlflow").setLevel(logging.ERROR)  # mlflow sets its own level when it is imported
    return MlflowClient(uri)


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _metrics(record: Record, began: int) -> Iterator[tuple[str, float, int, int]]:
    """Rows (name, value, time in ms, step): the history by optimizer step and by training MFLOPs, then the totals.

    MLflow's steps are whole numbers, hence MFLOPs.
    """
    for entry in record.history:
        at = began + int(1000 * entry.seconds)
        for name, value in entry.dump().items():
            if name not in ("step", "seconds"):
                yield name, value, at, entry.step
                yield f"by_mflops/{name}", value, at, int(entry.flops / 1e6)
    end = began + int(1000 * record.timing.seconds)
    groups = {"metrics": record.metrics, "costs": record.costs.dump(), "timing": record.timing.dump()}
    for group, values in groups.items():
        for name, value in values.items():
            name = name.replace("@", " at ")  # MLflow's names know no @
            yield name if group == "metrics" else f"{group}.{name}", float(value), end, 0


def _system(samples: list[dict[str, float]], began: int) -> Iterator[tuple[str, float, int, int]]:
    """What the cell took of the machine, under the prefix that MLflow shows as system metrics."""
    for step, sample in enumerate(samples):
        at = began + int(1000 * sample["seconds"])
        yield from ((f"system/{name}", value, at, step) for name, value in sample.items() if name != "seconds")


def _batches(rows: Sequence[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch
