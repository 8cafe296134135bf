"""``cyclebench eval``: scores of checkpoints to files, cards, MLflow and plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.data.task import tasks as known
from bench.downstream.run import Asked, evaluate_checkpoint
from bench.downstream.tasks import ours
from bench.errors import UserError
from bench.exits.execute import Threshold
from bench.pretrained.share import FACTS, add_scores
from bench.store.evaluations import log_evaluations
from bench.store.files import atomic_write
from bench.study.overrides import Keys, apply_override
from reports.downstream import plot_scores


def evaluate_all(
    checkpoints: Sequence[str],
    tasks: Sequence[str],
    overrides: Sequence[str],
    cycles: Sequence[int],
    limit: int | None,
    batch_size: int,
    out: Path,
    tracking_uri: str,
    leave: tuple[str, Threshold] | None = None,
    include: Sequence[str] = (),
) -> tuple[list[dict[str, Any]], list[Path]]:
    """Evaluate every checkpoint on every task and return the rows and the files written.

    Scores also go onto the cards of checkpoints that have one. overrides: ``TASK.OPTION=VALUE``; leave: an exit rule
    and its threshold; include: folders of tasks of one's own.
    """
    options = task_options(overrides, tasks)
    asked = [Asked(name, options.get(name, {}), limit) for name in tasks]
    rows: list[dict[str, Any]] = []
    for checkpoint in checkpoints:
        found = evaluate_checkpoint(checkpoint, asked, cycles or [None], out / "tasks", batch_size, leave, include)
        rows += [{"checkpoint": checkpoint, **row} for row in found]
        if (Path(checkpoint) / FACTS).is_file():
            add_scores(Path(checkpoint), found)
    results = out / "results.json"
    atomic_write(results, json.dumps(rows, indent=1).encode())
    paths = [results, *plot_scores(rows, out)]
    log_evaluations(tracking_uri, rows, paths)
    return rows, paths


def task_options(overrides: Sequence[str], tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Options by task. Raises UserError for what is not ``TASK.OPTION=VALUE`` of one of our tasks that is run."""
    own = [task for task in tasks if ours(task)]
    fields: dict[tuple[str, ...], list[str]] = {(task,): list(known.get(task).Options.model_fields) for task in own}
    options: dict[str, Any] = {}
    for override in overrides:
        task, dot, _ = override.partition("=")[0].partition(".")
        if not dot or task not in own:
            raise UserError(
                f"--set {override!r} must be TASK.OPTION=VALUE of one of this suite's tasks in --tasks, "
                "for example kjv.length=256"
            )
        apply_override(options, override, Keys(lambda parents: fields.get(tuple(parents), own), "kjv.length=256"))
    return options
