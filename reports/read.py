"""Records as the report needs them: of thousands of cells, only what is shown stays in memory."""

from __future__ import annotations

import gc
from array import array
from typing import Any

from bench.store.manifest import Manifest
from bench.store.records import Outcome, Stored
from bench.store.store import Store
from reports.exit_figures import BOUNDS, BUDGET

SCORES = ("flops_per_token", "loss", "accuracy", "bits_per_byte")  # the columns of a curve that are shown


def read(store: Store, manifest: Manifest) -> dict[str, Outcome]:
    """The records of a study's cells by id, those without one left out."""
    records = ((cell.id, store.record(cell.id, _shown)) for cell in manifest.cells)
    given: dict[frozenset[str], set[str]] = {}
    collecting = gc.isenabled()
    gc.disable()  # a record has no cycles, and to look for some in all that were read before takes half of the time
    try:
        found = {id: _shared(record, given) for id, record in records if record is not None}
        gc.freeze()  # nor while the report is written
        return found
    finally:
        if collecting:
            gc.enable()


def _shown(value: dict[str, Any]) -> dict[str, Any]:
    """What a result's file holds without what its exits tell beyond tables and figures: nine tenths of it, which would
    cost more to check than all the rest.
    """
    if value["exits"]:
        for key, rule in value["exits"]["rules"].items():
            if "tuned" in rule:
                rule["tuned"] = [{**point, "valid": {}} for point in rule["tuned"] if point["budget"] == BUDGET]
            curve = rule["curve"]
            # other aggregates than a rule's usual one have no curve in any figure
            shown = [name for name in curve if name in SCORES] if "." not in key or key in BOUNDS else []
            rule["curve"] = {name: array("d", curve[name]) for name in shown}
    return value


def _shared(record: Outcome, given: dict[frozenset[str], set[str]]) -> Outcome:
    """The record, its many small parts with one set of the names of their fields in common: a set for each part takes
    more room than all numbers. given: the sets so far.
    """
    if record.status == "done":
        parts: list[Stored] = [*record.history, *record.cycles]
        if record.exits is not None:
            rules = record.exits.rules.values()
            parts += [*record.exits.points, *rules, *(point for rule in rules for point in rule.tuned)]
        for part in parts:
            names = part.model_fields_set
            object.__setattr__(part, "__pydantic_fields_set__", given.setdefault(frozenset(names), names))
    return record
