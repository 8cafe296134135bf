"""The table of executed exits: saved FLOPs beside saved time."""

from __future__ import annotations

from typing import Any

from reports.units import human, plain


def columns(label: str, row: dict[str, Any]) -> dict[str, str]:
    """A measured row as people read it."""
    low, high = row["time_saved_quartiles"]
    return {
        "cell": label,
        "rule": row["rule"],
        "leaves": row.get("granularity", "sequence"),
        "threshold": f"{row['threshold']:.4g}",
        "mean cycles": f"{row['mean_cycles']:.2f}",
        "accuracy": plain(row["accuracy"]),
        "FLOPs/token": human(row["flops_per_token"]),
        "FLOPs saved": f"{row['flops_saved']:.1%}",
        "time saved [quartiles]": f"{row['time_saved']:.1%} [{low:.1%}, {high:.1%}]",
    }


def executions(manifest: dict[str, Any], results: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """All rows measured for the study's cells; empty if ``cyclebench execute`` has not been run."""
    found = []
    for cell in manifest["cells"]:
        for measured in results.get(cell["id"], {}).get("execution", {}).values():
            found += [columns(f"{cell['variant']}, {cell['task']}, seed {cell['seed']}", row) for row in measured]
    return found
