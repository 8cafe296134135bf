"""What a study has found, in short, for the first page of a tracker."""

from __future__ import annotations

import math

from bench.store.manifest import Manifest
from bench.store.records import Outcome
from bench.store.tracker import Findings
from bench.tables import markdown, markdown_text
from reports.table import summary, summary_rows
from reports.verdicts import sentences


def findings(manifest: Manifest, results: dict[str, Outcome]) -> Findings:
    """A study's verdicts, its table, the means of its variants with their costs, and how many cells there are."""
    rows, found = summary_rows(manifest, results), summary(manifest, results)
    metrics = {
        f"cells/{name}": float(sum(getattr(row, name) for row in found)) for name in ("done", "failed", "missing")
    }
    for row in found:
        where = f"{row.task}/{row.variant}"
        if not math.isnan(row.score.mean):
            metrics[f"{row.metric}/{where}"] = row.score.mean
        if row.costs is not None:
            metrics[f"FLOPs per token/{where}"] = row.costs.forward_flops_per_token
            metrics[f"parameters/{where}"] = float(row.costs.params)
    table = markdown(rows[0], (row.values() for row in rows)) if rows else []
    return Findings(tuple(map(markdown_text, sentences(manifest, results))), tuple(table), metrics)
