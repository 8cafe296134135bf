"""Whether stored results are what they say: ids, data and traces computed again, a sample of cells run again."""

from __future__ import annotations

import json
import math
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.config import CELL_SOURCE
from bench.data.task import task_data
from bench.errors import first_line, typed_line
from bench.evaluate.trace import Trace
from bench.run.going import run_cell
from bench.store.manifest import CellRow
from bench.store.records import Record
from bench.store.store import Store
from bench.train.device import environment_of

NUMBERS: tuple[str, ...] = (
    "metrics",
    "slices",
    "costs",
    "additions",
    "exits",
    "cycles",
    "zero_attention",
    "history",
    "schedule",
)
OF_FLOPS = {"costs", "exits", "cycles"}  # of those: what depends on how FLOPs are counted
MODES = {True: "in a stack", False: "alone"}
TIMES = {"seconds"}  # in a history entry: what may differ between two runs


@dataclass(frozen=True)
class Finding:
    """What came out of looking at one cell. problem: empty if all is well; note: what is worth knowing anyway."""

    id: str
    name: str
    check: str
    problem: str = ""
    note: str = ""


def check_stored(store: Store, cells: list[CellRow]) -> list[Finding]:
    """Look at every stored result: that every byte of it, of its traces and of its model is as it was written, that its
    id is that of its configuration, that its data are still the same, that its trace gives its metrics, and that it was
    computed in the mode that its configuration says. An older result of another mode is noted only: it was as good when
    it was made. What is damaged is set aside.
    """
    found = []
    for listed in cells:
        there = store.done(listed.id) or (store.folder(listed.id) / "result.json.corrupt").exists()
        record = store.record(listed.id) if store.sound(listed.id, weights=True) else None
        if record is None or record.status != "done":
            if there:
                found.append(
                    Finding(listed.id, listed.name, "stored", "it is damaged: the `run` command runs it again")
                )
            continue
        try:
            problem = _stored_problem(store, listed.id, record)
        except Exception as error:  # a damaged file may say anything
            problem = typed_line(error)
        note = f"of an earlier version: {_other_mode(record)}" if record.other_mode and record.former else ""
        found.append(Finding(listed.id, listed.name, "stored", problem, note))
    return found


def _other_mode(record: Record) -> str:
    said = record.cell.train.get("stacked")
    return f"it was computed {MODES[record.stacked]}, its configuration says stacked = {said}"


def _stored_problem(store: Store, id: str, record: Record) -> str:
    cell = record.cell.cell()
    if cell.id != id:
        return f"its configuration has the id {cell.id[:12]}"
    fingerprint = task_data(cell.task, cell.task_options).fingerprint
    if fingerprint != cell.fingerprint:
        return f"the data have the fingerprint {fingerprint[:12]}, then {cell.fingerprint[:12]}"
    if record.other_mode and not record.former:
        return _other_mode(record)
    trace = Trace.from_bytes(store.trace(id))
    for name, value in trace.leaving(trace.n_cycles).items():
        if value != record.test(name):
            return f"its trace gives a test {name} of {value!r}, its result says {record.test(name)!r}"
    if not (store.folder(id) / "model" / "model.safetensors").is_file():
        return "its model is missing"
    return ""


def rerun(store: Store, cells: list[CellRow], sample: int, seed: int = 0) -> list[Finding]:
    """Run a random sample of the finished cells again, in a store of their own, and compare every number. A cell that
    was trained in a stack is run in one, since alone its last digits would be others.
    """
    done = [cell for cell in cells if store.done(cell.id)]
    chosen = random.Random(seed).sample(done, min(sample, len(done)))
    found = []
    for listed in chosen:
        record = store.record(listed.id)
        if record is None or record.status != "done":  # damaged, which is told elsewhere
            continue
        cell = record.cell.cell()
        with tempfile.TemporaryDirectory() as scratch:
            try:
                if cell.init is not None and cell.init.source.startswith(CELL_SOURCE):
                    id = cell.init.source.removeprefix(CELL_SOURCE)
                    (Path(scratch) / id).symlink_to(store.folder(id).resolve())
                again = run_cell(cell, Store(Path(scratch)), stacked=record.stacked)
                problem = record_difference(record, again)
            except Exception as error:
                problem = f"it cannot be run again: {first_line(error)}"
        then, now = record.environment.dump(), environment_of(cell.train).dump()
        changed = [f"{key}: {then.get(key)} -> {now[key]}" for key in now if key != "git"]
        changed = [text for text in changed if text.split(": ", 1)[1].split(" -> ")[0] != text.split(" -> ")[1]]
        note = f"the environment differs: {'; '.join(changed)}" if changed else ""
        found.append(Finding(listed.id, listed.name, "run again", problem, note))
    return found


def record_difference(first: Record, second: Record) -> str:
    """The largest relative difference between two records of a cell and where it is; '' if there is none."""
    stored = [json.loads(json.dumps(record.dump())) for record in (first, second)]
    if not (first.valid_metrics and second.valid_metrics):  # one was stored before 0.2, without validation scores
        for record in stored:
            for point in (record["exits"] or {}).get("points", []):
                point.pop("valid", None)
    numbers = NUMBERS
    if (first.ran is None) is not (second.ran is None):  # one counts the FLOPs of a test as in training
        numbers = tuple(key for key in NUMBERS if key not in OF_FLOPS)
    if first.loops and second.loops:  # results stored before 0.2 have none
        numbers = (*numbers, "loops")
    one, two = (dict(_leaves({key: record[key] for key in numbers})) for record in stored)
    if set(one) != set(two):
        return f"{sorted(set(one) ^ set(two))[0]} is in one of them only"
    worst, where = 0.0, ""
    for path, value in one.items():
        if value != two[path]:
            gap = _gap(value, two[path])
            if gap > worst:
                worst, where = gap, f"{path}: {value!r} -> {two[path]!r}"
    return f"{where} (relative difference {worst:.2g})" if where else ""


def _gap(first: Any, second: Any) -> float:
    if isinstance(first, int | float) and isinstance(second, int | float):
        return abs(first - second) / max(abs(first), abs(second))
    return math.inf


def _leaves(value: Any, path: str = "") -> Any:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in TIMES:
                yield from _leaves(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for position, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{position}]")
    else:
        yield path, value
