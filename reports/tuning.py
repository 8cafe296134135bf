"""What tuning has chosen, of how many trials."""

from __future__ import annotations

from bench.store.manifest import Manifest
from reports.table import Row
from reports.units import metric_name


def tuning(manifest: Manifest) -> list[Row]:
    """A row for each variant and task of a study that was tuned; nothing for one that was not."""
    rows = []
    for row in manifest.tuning:
        finished = [trial for trial in row.trials if trial.value is not None]
        rows.append(
            {
                "task": row.task,
                "variant": row.variant,
                "chosen": ", ".join(f"{key} {value:.3g}" for key, value in row.chosen.items()),
                "metric": f"validation {metric_name(row.metric)}",
                "value": f"{row.value:.3f}",
                "trials": f"{len(finished)}/{len(row.trials)}",
                "tuning seed": str(row.seed),
            }
        )
    return rows
