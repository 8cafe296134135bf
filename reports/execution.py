"""The table of executed exits: saved FLOPs beside saved time."""

from __future__ import annotations

from collections.abc import Sequence

from bench.store.manifest import Manifest
from bench.store.records import ExecutionRow, Outcome
from reports.table import Row
from reports.units import human, plain


def columns(label: str, row: ExecutionRow) -> Row:
    """A measured row as people read it."""
    low, high = row.time_saved_quartiles
    return {
        "cell": label,
        "rule": row.rule,
        "leaves": row.granularity,
        "threshold": f"{row.threshold:.4g}",
        "mean cycles": f"{row.mean_cycles:.2f}",
        "accuracy": plain(row.accuracy),
        "FLOPs/token": human(row.flops_per_token),
        "FLOPs saved": f"{row.flops_saved:.1%}",
        "time saved [quartiles]": f"{row.time_saved:.1%} [{low:.1%}, {high:.1%}]",
    }


def why_it_costs(rows: Sequence[ExecutionRow]) -> str:
    """What there is to say where leaving early took longer than not leaving; empty where it did nowhere."""
    slow = [row for row in rows if row.time_saved < 0]
    if not slow:
        return ""
    checks = sum(row.flops_saved < 0 for row in slow)
    text = f"Negative: in {len(slow)} of {len(rows)} rows leaving early took longer than running all cycles. "
    if checks:
        text += (
            f"In {checks} of them it also took more FLOPs: judging at every exit point (for some rules the LM head) "
            "costs more than what leaves early saves at this threshold. "
        )
    return text + (
        "Each exit point splits the batch, reads the signal back and runs what is left in smaller pieces; in a model "
        "this small, or where few leave, that is more than the cycles saved. Larger models and batches save more."
    )


def executions(manifest: Manifest, results: dict[str, Outcome]) -> list[Row]:
    """All rows measured for the study's cells; empty if ``cyclebench execute`` has not been run."""
    found = []
    for cell in manifest.cells:
        record = results.get(cell.id)
        if record is not None and record.status == "done":
            for measured in record.execution.values():
                found += [columns(f"{cell.variant}, {cell.task}, seed {cell.seed}", row) for row in measured]
    return found
