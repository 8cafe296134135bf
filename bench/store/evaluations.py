"""Scores of checkpoints on tasks of lm-evaluation-harness, in MLflow."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.errors import first_line
from bench.store.mlflow_server import EXPERIMENT, connect, experiment


def log_evaluations(uri: str, rows: Sequence[dict[str, Any]], paths: Sequence[Path]) -> None:
    """Log the downstream scores of checkpoints, each as a run of its own; a failing server is one warning.

    Metrics are named task/metric; their step is the number of cycles.
    """
    try:
        client, _ = connect(uri)
        id = experiment(client, EXPERIMENT)
        for checkpoint in dict.fromkeys(row["checkpoint"] for row in rows):
            tags = {"role": "evaluation", "checkpoint": checkpoint}
            run = client.create_run(id, tags=tags, run_name=f"eval {checkpoint}").info.run_id
            for row in rows:
                if row["checkpoint"] != checkpoint:
                    continue
                name = "".join(letter if letter.isalnum() or letter in "_-./" else "_" for letter in row["metric"])
                client.log_metric(run, f"{row['task']}/{name}", row["value"], step=row["cycles"])
                client.log_metric(run, f"{row['task']}/flops_per_token", row["flops_per_token"], step=row["cycles"])
            for path in paths:
                client.log_artifact(run, str(path))
            client.set_terminated(run)
    except Exception as error:
        reason = first_line(error)
        print(f"warning: MLflow at {uri} is not available, results are kept in the files: {reason}", file=sys.stderr)
