"""Trackio (pip install 'cyclebench[trackio]') as a window on the cell store: a project a study, a run a cell, in files
of its own. Nothing is asked of a network. `trackio show` draws them.

Every row has a name of its own (``log_id``), under which Trackio keeps it once, whoever writes it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.errors import UserError
from bench.store.manifest import Manifest, SearchRow, ThresholdRow
from bench.store.records import Outcome, configuration, dotted
from bench.store.store import Store
from bench.store.tracked import Row, digest_of_keys, metrics
from bench.store.tracker import Findings, Placed, Tracker, digest_of, register


@register("trackio")
class TrackioTracker(Tracker):
    """A project a study; runs of its cells and searches; a run with the means of its variants."""

    def __init__(self, uri: str, store: Store) -> None:
        """uri: a folder for its files; an address, as MLflow's, stands for Trackio's own (``TRACKIO_DIR``).

        Raises UserError if Trackio is not installed, or cannot be used.
        """
        super().__init__(uri, store)
        if "://" not in uri:
            os.environ["TRACKIO_DIR"] = str(Path(uri).absolute())
        try:
            from trackio.sqlite_storage import SQLiteStorage  # optional
        except ImportError as error:
            raise UserError(
                f"--tracker: 'trackio' cannot be used: {error} (pip install 'cyclebench[trackio]')"
            ) from None
        self.files: Any = SQLiteStorage
        self.project = ""

    def study(self, manifest: Manifest) -> None:
        """Look what its project holds; a run is written at once, so that one that is there is whole."""
        self.project = f"cyclebench {manifest.study} study"  # some ends of names are Trackio's own
        held = {str(run["id"]) for run in self.files.get_run_records(self.project)}
        self.known = {key for key in self.holding(manifest) if _run_id(key) in held}

    def log(self, record: Outcome, place: Placed) -> None:
        """A run of the cell: its configuration, its curves, its totals."""
        key = (record.id, "" if record.status == "done" else str(record.at))
        told = {"variant": place.variant, "task": place.task, "seed": record.cell.seed, "status": record.status}
        told |= {name: value for name, value in dotted(configuration(record)) if name not in told}
        rows: Iterable[Row] = [("failed", 1.0, int(1000 * getattr(record, "at", 0.0)), 0)]
        if record.status == "done":
            rows = metrics(record, int(1000 * record.timing.started))
        else:
            told["reason"] = record.reason
        self._write(f"{place.variant} {place.task} seed {record.cell.seed}", _run_id(key), rows, told)

    def search(self, row: SearchRow) -> None:
        """A run of the search: what was tuned for each budget, by percent of the FLOPs at full depth."""
        rows: list[Row] = [("trials", float(row.trials), 0, row.trials)]
        for point in row.tuned if isinstance(row, ThresholdRow) else ():
            for split, scores in (("valid", point.valid), ("test", point.test)):
                step = round(100 * point.share_of_full)
                rows += [(f"tuned_{split}_{name}", value, 0, step) for name, value in scores.items()]
        self._write(row.study.rpartition(" / ")[0], _run_id((row.study, digest_of(row))), rows, row.dump())

    def tell(self, found: Findings) -> None:
        """A run of the study: its verdicts, and its means; another one when they are others."""
        assert self.manifest is not None
        rows = [(name, value, 0, len(self.manifest.seeds)) for name, value in found.metrics.items()]
        run = _run_id((self.manifest.study, digest_of_keys((name, str(value)) for name, value, *_ in rows)))
        config = {"question": self.manifest.question, "verdicts": list(found.sentences), "table": list(found.table)}
        self._write(self.manifest.study, run, rows, config)

    def _write(self, name: str, run: str, rows: Iterable[Row], config: Mapping[str, Any]) -> None:
        """All rows at once; those of one step and one moment are one of Trackio's. A moment of 0 is now."""
        together: dict[tuple[int, int], dict[str, float]] = {}
        for metric, value, at, step in rows:
            together.setdefault((step, at), {})[metric] = value
        now = 1000 * time.time()
        self.files.bulk_log(
            self.project,
            name,
            list(together.values()),
            steps=[step for step, _ in together],
            timestamps=[datetime.fromtimestamp((at or now) / 1000, UTC).isoformat() for _, at in together],
            config=json.loads(json.dumps(config, default=str)),
            log_ids=[f"{run} {step} {at}" for step, at in together],
            run_id=run,
        )


def _run_id(key: Sequence[str]) -> str:
    return " ".join(part for part in key if part)
