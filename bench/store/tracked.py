"""What a tracker is told of a cell and of a study: rows of metrics, names, text."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.store.manifest import Manifest
from bench.store.records import HistoryEntry, Outcome, Record
from bench.store.tracker import Findings

EXIT_SCORES, CURVE = ("accuracy", "bits_per_byte"), 12  # of an exit curve: what is shown, at so many points
LONGEST, LONGEST_DIGEST = 5000, 36  # letters that MLflow takes of a description and of a digest
REST = "The rest of the table is in report/report.html."
_OTHER = re.compile(r"[^\w\-. :/]", re.ASCII)  # what no name of a metric may hold

Row = tuple[str, float, int, int]
"""Of metrics: name, value, time in ms, step. MLflow's steps are whole numbers."""
Metrics = Iterator[Row]


def page(manifest: Manifest, found: Findings | None) -> str:
    """A study in Markdown, as the first page of a run and of an experiment shows it: question, verdicts, table."""
    told = about(manifest)
    if found is None:
        return told
    told += "".join(f"\n\n- {sentence}" if not at else f"\n- {sentence}" for at, sentence in enumerate(found.sentences))
    lines = found.table
    while lines and len(told) + 2 + len("\n".join([*lines, REST])) > LONGEST:
        lines = lines[:-1]
    cut = [REST] if len(lines) < len(found.table) else []
    return "\n\n".join(part for part in (told, "\n".join(lines), *cut) if part)[:LONGEST]


def about(manifest: Manifest) -> str:
    """What a study asks, and what was changed of it."""
    return "\n\n".join([manifest.question, *manifest.changed])


def totals(manifest: Manifest, found: Findings, at: int) -> Metrics:
    """What a study has found, by names that MLflow takes; of two that it would take for one each has a digest behind
    it. at: ms since 1970.
    """
    names = {name: _OTHER.sub("", name) for name in found.metrics}
    same = Counter(names.values())
    for name, value in found.metrics.items():
        behind = f" {hashlib.sha256(name.encode()).hexdigest()[:8]}" if same[names[name]] > 1 else ""
        yield names[name] + behind, value, at, len(manifest.seeds)


def dataset(record: Outcome) -> Any:
    """A cell's data as an input of its run."""
    from mlflow.entities import Dataset, DatasetInput, InputTag  # start-up

    task, fingerprint = record.cell.task, record.cell.fingerprint
    options = record.settings.get("task_options", record.cell.task_options)
    source = json.dumps({"task": task, "options": options, "fingerprint": fingerprint}, sort_keys=True, default=str)
    told = Dataset(name=task, digest=fingerprint[:LONGEST_DIGEST], source_type="cyclebench", source=source)
    return DatasetInput(told, [InputTag("mlflow.data.context", "training")])


def shown_of(manifest: Manifest, paths: Sequence[Path], found: Findings | None) -> str:
    """A digest of what there is to tell of a study, and of files by their names."""
    files = sorted((path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in paths)
    told = [manifest.dump(), files, None if found is None else asdict(found)]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def digest_of_keys(keys: Iterable[tuple[str, str]]) -> str:
    """Of what is held."""
    return hashlib.sha256(json.dumps(sorted(keys)).encode()).hexdigest()


def curves(entry: HistoryEntry, began: int) -> Metrics:
    """An entry of a cell's history, by optimizer step and by training MFLOPs. began: ms since 1970."""
    at = began + int(1000 * entry.seconds)
    for name, value in entry.dump().items():
        if name not in ("step", "seconds"):
            yield name, value, at, entry.step
            yield f"by_mflops/{name}", value, at, int(entry.flops / 1e6)


def metrics(record: Record, began: int) -> Metrics:
    """The history of a cell, then its exit curves and the totals."""
    for entry in record.history:
        yield from curves(entry, began)
    end = began + int(1000 * record.timing.seconds)
    yield from _exit_curves(record, end)
    groups = {"metrics": record.metrics, "costs": record.costs.dump(), "timing": record.timing.dump()}
    for group, values in groups.items():
        for name, value in values.items():
            name = name.replace("@", " at ")  # MLflow's names know no @
            yield name if group == "metrics" else f"{group}.{name}", float(value), end, 0


def _exit_curves(record: Record, at: int) -> Metrics:
    """Scores on test data by executed FLOPs per token, in thousands as steps are whole numbers: of leaving all after
    the same number of cycles, and of every exit rule at its usual aggregate. MLflow's own chart draws them.
    """
    if record.exits is None:
        return
    for point in record.exits.points:
        for name in EXIT_SCORES:
            if (value := point.dump().get(name)) is not None:
                yield f"by_executed_kflops/fixed/{name}", value, at, round(point.flops_per_token / 1e3)
    for key, rule in record.exits.rules.items():
        flops = rule.curve.get("flops_per_token", []) if "." not in key and key != "fixed" else []
        shown = sorted({round(place * (len(flops) - 1) / (CURVE - 1)) for place in range(CURVE)}) if flops else []
        for name in EXIT_SCORES:
            if name in rule.curve:
                told = {round(flops[place] / 1e3): rule.curve[name][place] for place in shown}
                yield from ((f"by_executed_kflops/{key}/{name}", value, at, step) for step, value in told.items())


def system(samples: list[dict[str, float]], began: int) -> Metrics:
    """What the cell took of the machine, under the prefix that MLflow shows as system metrics."""
    for step, sample in enumerate(samples):
        at = began + int(1000 * sample["seconds"])
        yield from ((f"system/{name}", value, at, step) for name, value in sample.items() if name != "seconds")
