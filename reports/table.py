"""The tables of a study: one row for a variant on a task, and every cell for itself."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from bench.stats import Interval, interval
from bench.store.manifest import Manifest
from bench.store.records import CostRecord, Environment, ExitsRecord, Outcome, Record
from bench.tables import counted, csv_text
from reports.policy import ENDS, Row, Rows, ends, titled, told
from reports.units import bounds, human, metric_name, plain


@dataclass(frozen=True)
class Summary:
    """A variant on a task: how many cells, and what they say of the metric. Numbers that are not known are NaN.

    Attributes:
        score: its mean over seeds.
        costs: of the finished cells (``mean_costs``).
        tokens_per_second: in training, mean over the finished cells.
        reason: why the first failed cell failed.
    """

    task: str
    variant: str
    metric: str
    planned: int
    done: int
    failed: int
    missing: int
    score: Interval
    costs: CostRecord | None
    tokens_per_second: float
    reason: str


def cells(manifest: Manifest, results: dict[str, Outcome], variant: str, task: str) -> list[tuple[int, Outcome | None]]:
    """Seed and record (None: missing) of a variant's cells on a task."""
    chosen = [cell for cell in manifest.cells if (cell.variant, cell.task) == (variant, task)]
    return [(cell.seed, results.get(cell.id)) for cell in chosen]


def done(manifest: Manifest, results: dict[str, Outcome], variant: str, task: str) -> list[Record]:
    """The finished records of a variant on a task."""
    return [record for _, record in cells(manifest, results, variant, task) if record and record.status == "done"]


def mean_costs(records: Iterable[Record]) -> CostRecord:
    """What cells of several seeds cost in the mean: what some variants execute depends on the seed."""
    costs = [record.costs for record in records]
    fields = ("forward_flops_per_token", "train_flops_per_token", "train_flops")
    return costs[0].but(**{field: fmean(getattr(one, field) for one in costs) for field in fields})


def exits_of(record: Record) -> ExitsRecord:
    """The exits of a record that has some."""
    assert record.exits is not None
    return record.exits


def digest(ids: Iterable[str]) -> str:
    """A name for a set of cells: the sha256 of their sorted ids, one a line, cut to 12 digits."""
    lines = "".join(f"{id}\n" for id in sorted(set(ids)))
    return f"sha256 {hashlib.sha256(lines.encode()).hexdigest()[:12]}"


def named(ids: Iterable[str]) -> str:
    """How many cells something was made from, and the name of the set."""
    found = set(ids)
    return f"{counted(len(found), 'cell')} ({digest(found)})"


def ran_on(place: Environment) -> str:
    """The environment of a cell, in words."""
    return (
        f"{place.cpu} ({place.device}, {place.threads} threads a cell), {place.platform}, "
        f"Python {place.python}, torch {place.torch}, transformers {place.transformers}, "
        f"revision {place.git or 'not known'}"
    )


def score(record: Record, metric: str) -> float:
    """The task's primary metric on the test split."""
    return record.test(metric)


def summary(manifest: Manifest, results: dict[str, Outcome]) -> list[Summary]:
    """Rows of the summary table, in the study's order."""
    rows = []
    for task in manifest.tasks:
        for variant in manifest.variants:
            found = cells(manifest, results, variant.label, task.label)
            finished = [record for _, record in found if record and record.status == "done"]
            failed = [record for _, record in found if record and record.status == "failed"]
            rows.append(
                Summary(
                    task=task.label,
                    variant=variant.label,
                    metric=task.metric,
                    planned=len(found),
                    done=len(finished),
                    failed=len(failed),
                    missing=len(found) - len(finished) - len(failed),
                    score=interval([score(record, task.metric) for record in finished], bounds(task.metric)),
                    costs=mean_costs(finished) if finished else None,
                    tokens_per_second=_mean([record.timing.tokens_per_second for record in finished]),
                    reason=failed[0].reason if failed else "",
                )
            )
    return rows


def summary_rows(manifest: Manifest, results: dict[str, Outcome]) -> Rows:
    """The summary table as people read it."""
    found = summary(manifest, results)
    return titled(map(_columns, found), {ENDS: [row.score for row in found]})


def _columns(row: Summary) -> Row:
    gone = [f"{count} {kind}" for kind, count in (("failed", row.failed), ("missing", row.missing)) if count]
    note = ", ".join(gone) + (f": {row.reason}" if row.reason else "")
    costs = row.costs
    return {
        "task": row.task,
        "variant": row.variant,
        "metric": metric_name(row.metric),
        "mean": plain(row.score.mean),
        ENDS: ends(row.score),
        "seeds": f"{row.done}/{row.planned}",
        "depth": str(costs.depth) if costs else "-",
        "parameters": human(costs.params) if costs else "-",
        "non-embedding": human(costs.params_non_embedding) if costs else "-",
        "FLOPs/token": human(costs.forward_flops_per_token) if costs else "-",
        "training FLOPs": human(costs.train_flops) if costs else "-",
        "tokens/s": f"{row.tokens_per_second:,.0f}" if costs else "-",
        "note": note,
    }


def further_tests(manifest: Manifest, results: dict[str, Outcome]) -> Rows:
    """The metric on the test split and on every further one (such as longer sequences) by variant, for the tasks that
    have any: the mean, its ends and of how many seeds. A dash: the task has no such split.
    """
    rows, shown = [], []
    for task in manifest.tasks:
        plain_test = f"test_{task.metric}"
        by_variant = {v.label: cells(manifest, results, v.label, task.label) for v in manifest.variants}
        finished = [r for found in by_variant.values() for _, r in found if r and r.status == "done"]
        splits = dict.fromkeys(key for r in finished for key in r.metrics if key.startswith(f"{plain_test}@"))
        if not splits:
            continue
        for label, found in by_variant.items():
            metrics = [r.metrics if r and r.status == "done" else {} for _, r in found]
            row = {"task": task.label, "variant": label, "metric": metric_name(task.metric)}
            for key in (plain_test, *splits):
                over = interval([m[key] for m in metrics if key in m], bounds(task.metric))
                shown.append(over)
                text = f"{told(over)} ({over.n}/{len(found)})" if over.n else f"missing (0/{len(found)})"
                row[f"test{key.removeprefix(plain_test)}"] = text
            rows.append(row)
    keys = dict.fromkeys(key for row in rows for key in row)
    return titled([{key: row.get(key, "-") for key in keys} for row in rows], {"": shown})


def harness(manifest: Manifest, results: dict[str, Outcome]) -> Rows:
    """What the models score on tasks of lm-evaluation-harness, by task and variant: means over the seeds."""
    rows, shown = [], []
    for asked in manifest.harness:
        for variant in manifest.variants:
            found = [(seed, r) for seed, r in cells(manifest, results, variant.label, asked.task)]
            scored = [r for _, r in found if r and r.status == "done" and f"test_{asked.score}" in r.scores]
            over = interval([r.test(asked.score) for r in scored], bounds(asked.metric))
            shown.append(over)
            row = {"task": asked.key, "trained on": asked.task, "variant": variant.label}
            row |= {"metric": metric_name(asked.metric), "mean": plain(over.mean), ENDS: ends(over)}
            row["seeds"] = f"{over.n}/{len(found)}"
            flops = _mean([r.harness[asked.key].flops_per_token for r in scored])
            row["FLOPs/token"] = human(flops) if scored else "-"
            rows.append(row)
    return titled(rows, {ENDS: shown})


def costs(manifest: Manifest, results: dict[str, Outcome]) -> list[Row]:
    """What each variant costs on each task, and what its zero tokens, adapters and gates add."""
    rows = []
    for task in manifest.tasks:
        for variant in manifest.variants:
            finished = done(manifest, results, variant.label, task.label)
            if not finished:
                continue
            record = finished[0]
            total, added = mean_costs(finished), record.additions
            row = {
                "task": task.label,
                "variant": variant.label,
                "schedule": record.schedule,
                "FLOPs/token": human(total.forward_flops_per_token),
                "training FLOPs/token": human(total.train_flops_per_token),
                "KV bytes/token": human(total.kv_bytes_per_token),
                "activation bytes/sequence": human(total.activation_bytes),
            }
            if ran := [each.ran for each in finished if each.ran is not None]:
                row["tokens by cycle"] = ", ".join(f"{fmean(shares):.0%}" for shares in zip(*ran, strict=True))
            for label, addition in added.items():
                share = addition.flops_per_token / total.forward_flops_per_token
                row[f"{label} adds"] = f"{human(addition.params)} parameters, {share:.2%} of FLOPs"
            rows.append(row)
    keys = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key, "-") for key in keys} for row in rows]


def of_test(results: Mapping[str, Outcome]) -> str:
    """What there is to say of the FLOPs if a variant's depend on the text; empty if none do."""
    if not any(record.status == "done" and record.ran for record in results.values()):
        return ""
    return (
        "Where a variant chooses the tokens of a cycle by what they say, forward FLOPs are those of the tokens that it "
        "chose on the test split, here and on every axis; its training FLOPs are those that were executed."
    )


def csv_of_cells(manifest: Manifest, results: dict[str, Outcome]) -> str:
    """Every cell of the study as CSV, failed and missing ones included."""
    return csv_text(list(_cell_rows(manifest, results)))


def csv_of_slices(manifest: Manifest, results: dict[str, Outcome]) -> str:
    """Accuracy by slice of every finished cell, one row a slice; empty if no task has slices."""
    rows = [
        {**cell.dump(), "axis": axis, "slice": label, **scores.dump()}
        for cell in manifest.cells
        if (record := results.get(cell.id)) is not None and record.status == "done"
        for axis, slices in record.slices.items()
        for label, scores in slices.items()
    ]
    return csv_text(rows)


def _cell_rows(manifest: Manifest, results: dict[str, Outcome]) -> Iterator[dict[str, Any]]:
    for cell in manifest.cells:
        record = results.get(cell.id)
        row = {**cell.dump(), "status": record.status if record else "missing"}
        if record and record.status == "done":
            row |= record.scores
            row |= record.costs.dump()
            row["tokens_per_second"] = record.timing.tokens_per_second
        elif record and record.status == "failed":
            row["reason"] = record.reason
        yield row


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
