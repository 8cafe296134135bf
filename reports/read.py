"""Records as the report needs them: of thousands of cells, only what is shown stays in memory."""

from __future__ import annotations

import gc
from array import array
from typing import Any

from bench.store.manifest import Manifest
from bench.store.records import Outcome
from bench.store.store import Store
from reports.exit_figures import BOUNDS, BUDGET

SCORES = ("flops_per_token", "loss", "accuracy", "bits_per_byte")  # the columns of a curve that are shown


def read(store: Store, manifest: Manifest) -> dict[str, Outcome]:
    """The records of a study's cells by id, those without one left out."""
    records = ((cell.id, store.record(cell.id, _shown)) for cell in manifest.cells)
    collecting = gc.isenabled()
    gc.disable()  # a record has no cycles, and to look for some in all that were read before takes half of the time
    try:
        found = {id: record for id, record in records if record is not None}
        gc.freeze()  # nor while the report is written
        return found
    finally:
        if collecting:
            gc.enable()


def _shown(value: dict[str, Any]) -> dict[str, Any]:
    """What a result's file holds without what its exits tell beyond tables and figures: nine tenths of it, which would
    cost more to check than all the rest.
    """
    exits = value["exits"]
    if not exits:
        return value
    return {**value, "exits": {**exits, "rules": {key: _rule(key, rule) for key, rule in exits["rules"].items()}}}


def _rule(key: str, rule: dict[str, Any]) -> dict[str, Any]:
    found = {**rule, "curve": {}}
    if "tuned" in rule:
        found["tuned"] = [{**point, "valid": {}} for point in rule["tuned"] if point["budget"] == BUDGET]
    if "." not in key or key in BOUNDS:  # other aggregates than a rule's usual one have no curve in any figure
        found["curve"] = {name: array("d", column) for name, column in rule["curve"].items() if name in SCORES}
    return found
