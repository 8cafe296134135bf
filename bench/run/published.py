"""Cells of a published study run again, by anyone, and held against the numbers that were published."""

from __future__ import annotations

import csv
import math
import random
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.config import CELL_SOURCE, Cell
from bench.errors import UserError, first_line, shown
from bench.run.going import run_cell
from bench.store.manifest import CellRow
from bench.store.published import PublishedStudy, published_folder, read_published
from bench.store.store import Store

RESULTS = "results.csv"
SPREADS = 3.0  # standard deviations between seeds that a cell may lie off on another machine


@dataclass(frozen=True)
class Comparison:
    """A published number beside that of the cell run again.

    Attributes:
        cell: where it stands in the study.
        metric: of its task, on the test split.
        published, found: in the metric's unit; found is NaN where ``problem`` says why.
        tolerance: how far they may lie apart, NaN where the seeds do not tell: there is one alone, or all are equal.
        problem: why the cell could not be run again.
    """

    cell: CellRow
    metric: str
    published: float
    found: float
    tolerance: float
    problem: str = ""

    @property
    def holds(self) -> bool:
        """Whether the two are the same, or close enough."""
        return self.found == self.published or abs(self.found - self.published) <= self.tolerance


def run_again(name: str, sample: int, seed: int = 0) -> list[Comparison]:
    """Run some finished cells of a published study, each in a store of its own, and compare the metric of their task.

    On the machine and with the versions that a cell was run with its numbers are the same to the last digit. On others
    the last digits of every sum differ, and training carries that on; what it leads to is at most what another seed
    would have led to. So a cell may lie SPREADS standard deviations between the published seeds of its variant off.

    Args:
        name: see ``published_folder``.
        sample: how many of its cells.
        seed: picks them.

    Raises:
        UserError: if there is no such study, or what is published cannot be read.
    """
    folder = published_folder(name)
    study = read_published(folder)
    metrics = {task.label: f"test_{task.metric}" for task in study.manifest.tasks}
    cells = [row for row in study.manifest.cells if row.id in study.cells]
    scores = _scores(folder / RESULTS, {row.id: metrics[row.task] for row in cells})
    done = [row for row in cells if row.id in scores]
    found = []
    for row in random.Random(seed).sample(done, min(sample, len(done))):
        alike = [scores[other.id] for other in done if (other.variant, other.task) == (row.variant, row.task)]
        tolerance = SPREADS * float(np.std(alike, ddof=1)) if len(set(alike)) > 1 else math.nan
        metric, score, problem = metrics[row.task].removeprefix("test_"), math.nan, ""
        try:
            score = _score(row, study, metric)
        except Exception as error:  # data that cannot be had here, or a cell that this version does not know
            problem = first_line(error)
        found.append(Comparison(row, metric, scores[row.id], score, tolerance, problem))
    return found


def _scores(path: Path, metrics: Mapping[str, str]) -> dict[str, float]:
    """The published score of each cell that is in the table.

    metrics: the column of each cell. Raises UserError for a table that cannot be read.
    """
    found = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.DictReader(file), 2):
                if (column := metrics.get(row["id"])) is not None:
                    try:
                        found[row["id"]] = float(row[column] or "")
                    except ValueError:
                        found[row["id"]] = math.nan
                    if not math.isfinite(found[row["id"]]):
                        raise UserError(f"{path}: line {number}: {column} = {shown(row[column])} must be a number")
    except KeyError as error:
        raise UserError(f"{path}: column {error} is missing") from None
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    return found


def _score(row: CellRow, study: PublishedStudy, metric: str) -> float:
    with tempfile.TemporaryDirectory() as scratch:
        store = Store(Path(scratch))
        return run_cell(_ready(row.id, study, store), store).test(metric)


def _ready(id: str, study: PublishedStudy, store: Store) -> Cell:
    """The cell, when what it starts from is in the store."""
    cell = study.cells[id].cell()
    if cell.id != id:
        raise UserError(f"its configuration has the id {cell.id[:12]} here")
    if cell.init is not None and cell.init.source.startswith(CELL_SOURCE):
        run_cell(_ready(cell.init.source.removeprefix(CELL_SOURCE), study, store), store)
    return cell
