"""Executed exits of a study's finished cells, measured and kept beside their results."""

from __future__ import annotations

from collections.abc import Iterator

from bench.data.batches import arrays
from bench.data.prepared import cell_data
from bench.errors import CellError, UserError
from bench.evaluate.rules import get_rule
from bench.exits.clock import measure_exits
from bench.exits.execute import Granularity
from bench.model.language_model import load_model
from bench.store.manifest import Manifest
from bench.store.records import ExecutionRow
from bench.store.store import Store
from bench.train.device import autocast, pick_device, repeatable


def execute_study(
    store: Store,
    manifest: Manifest,
    rule: str,
    thresholds: list[float] | None,
    rounds: int,
    granularity: Granularity,
) -> Iterator[tuple[str, ExecutionRow]]:
    """Measure the cells of a study's last run that have exits and the rule, and store what is found beside their
    results; a label and a row at a time. Raises UserError if none can be measured, since no threshold was tuned.

    thresholds: by default those tuned on the cell's validation data, where whole sequences leave.
    """
    get_rule(rule)
    untuned = measured = 0
    for planned in manifest.cells:
        record = store.record(planned.id)
        if record is None or record.status != "done" or record.exits is None:
            continue
        known = record.exits.rules.get(rule)
        if known is None:
            continue
        tuned = [entry.threshold for entry in known.tuned if entry.threshold is not None]
        if not thresholds and not tuned:
            untuned += 1
            continue
        measured += 1
        cell = record.cell.cell()
        label = f"{planned.variant}, {planned.task}, seed {planned.seed}"
        try:
            data = cell_data(cell, store)
        except CellError as error:
            raise UserError(f"{label}: {error}") from None
        rows = []
        with repeatable(cell.seed, cell.train.threads):
            lm = load_model(store.model(cell.id)).eval()
            lm.to(pick_device(cell.train))
            for threshold in thresholds or sorted(set(tuned)):
                with autocast(cell.train, lm.device):  # as it was tested
                    rows.append(measure_exits(lm, *arrays(data.test), rule, threshold, rounds, granularity))
                yield label, rows[-1]
        store.write_execution(cell.id, rule if granularity == "sequence" else f"{rule} by {granularity}", rows)
    if untuned and not measured:
        raise UserError(f"--threshold is required: for the rule {rule!r} none was tuned on the validation data")
