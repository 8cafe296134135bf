"""Records as the report needs them: of thousands of cells, only what is shown stays in memory."""

from __future__ import annotations

import gc
import math
from array import array
from functools import partial
from io import BytesIO
from typing import Any
from zipfile import BadZipFile

import numpy as np

from bench.errors import UserError
from bench.store.manifest import Manifest
from bench.store.records import Outcome, Stored
from bench.store.store import Store
from reports.exit_figures import BOUNDS, BUDGET

SCORES = ("flops_per_token", "loss", "accuracy", "bits_per_byte")  # the columns of a curve that are shown


def read(store: Store, manifest: Manifest) -> dict[str, Outcome]:
    """The records of a study's cells by id, those without one left out."""
    trim = partial(_shown, declared=manifest.exit_rule)
    records = ((cell.id, _validated(store, store.record(cell.id, trim, traces=True))) for cell in manifest.cells)
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


def _shown(value: dict[str, Any], declared: str | None = None) -> dict[str, Any]:
    """What a result's file holds without what its exits tell beyond tables and figures: nine tenths of it, which would
    cost more to check than all the rest. declared: the study's exit rule, which fronts need.
    """
    if value["exits"]:
        for key, rule in value["exits"]["rules"].items():
            if "tuned" in rule and key != declared:
                rule["tuned"] = [point for point in rule["tuned"] if point["budget"] == BUDGET]
            curve = rule["curve"]
            # other aggregates than a rule's usual one have no curve in any figure
            shown = [name for name in curve if name in SCORES] if "." not in key or key in (*BOUNDS, declared) else []
            shown += ["threshold"] if shown and "threshold" in curve else []
            rule["curve"] = {name: _column(curve[name]) for name in shown}
    return value


def _column(values: list[float | None]) -> array[float]:
    """A column of a curve; NaN for the threshold that lets none leave early."""
    try:
        return array("d", values)  # type: ignore[arg-type]
    except TypeError:
        return array("d", [math.nan if value is None else value for value in values])


def _validated(store: Store, record: Outcome | None) -> Outcome | None:
    """The record with its validation scores, which older ones lack: made from the trace that was stored beside them."""
    if record is None or record.status != "done" or record.valid_metrics:
        return record
    try:
        scores = _valid_scores(store.trace(record.id, "valid", record))
    except (OSError, KeyError, ValueError, BadZipFile, UserError):
        return record  # fronts leave out, and count as left out, what has no validation scores
    record.valid_metrics = {f"valid_{name}": value for name, value in scores[-1].items()}
    if record.exits is not None and len(scores) == len(record.exits.points):
        points = zip(record.exits.points, scores, strict=True)
        record.exits = record.exits.but(points=[point.but(valid=found) for point, found in points])
    return record


def _valid_scores(trace: bytes) -> list[dict[str, float]]:
    """Scores by name when all sequences of a stored trace leave after cycle 1, 2, ... C: ``Trace.leaving``, which would
    load torch.
    """
    with np.load(BytesIO(trace), allow_pickle=False) as arrays:
        scored = arrays["scored"].sum(dtype=float)
        loss, correct = (arrays[name].sum(axis=0, dtype=float) / scored for name in ("loss", "correct"))
        per_byte = float(arrays["bytes_per_token"]) if "bytes_per_token" in arrays.files else None
    found = [{"loss": float(one), "accuracy": float(right)} for one, right in zip(loss, correct, strict=True)]
    if per_byte is not None:
        found = [{**one, "bits_per_byte": one["loss"] / math.log(2) / per_byte} for one in found]
    return found


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
