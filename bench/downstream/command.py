"""``cyclebench eval``: scores of checkpoints to files, cards, MLflow and plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.data.task import tasks as known
from bench.downstream.run import Asked, evaluate_checkpoint
from bench.downstream.tasks import ours
from bench.errors import UserError, first_line
from bench.exits.execute import Threshold
from bench.pretrained.share import FACTS, SAME, add_scores, merged
from bench.pretrained.sources import locate
from bench.store.evaluations import log_evaluations
from bench.store.files import atomic_write
from bench.store.versions import model_folder
from bench.study.overrides import Keys, apply_override
from reports.downstream import plot_scores

OF_EVAL = ("checkpoint", *SAME)  # a later row of the same replaces one


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

    Scores also go onto the cards of checkpoints that have one. What an earlier command has left in ``out`` stays there
    but for the rows of the same ``OF_EVAL``, and is plotted too. overrides: ``TASK.OPTION=VALUE``; leave: an exit rule
    and its threshold; include: folders of tasks of one's own. Raises UserError, before anything is evaluated, for
    results in ``out`` that cannot be read, and for a checkpoint that is not there.
    """
    results = out / "results.json"
    before = _before(results)
    options = task_options(overrides, tasks)
    asked = [Asked(name, options.get(name, {}), limit) for name in tasks]
    for checkpoint in checkpoints[1:]:  # not after the first was scored for hours
        locate(checkpoint)
    rows: list[dict[str, Any]] = []
    for checkpoint in checkpoints:
        found = evaluate_checkpoint(checkpoint, asked, cycles or [None], out / "tasks", batch_size, leave, include)
        rows += [{"checkpoint": checkpoint, **row} for row in found]
        folder = model_folder(Path(checkpoint))  # a checkpoint may be named by its cell's folder
        if (folder / FACTS).is_file():
            add_scores(folder, found)
        every = merged(before, rows, OF_EVAL)
        atomic_write(results, json.dumps(every, indent=1).encode())
    paths = [results, *plot_scores(every, out)]
    log_evaluations(tracking_uri, rows, paths)
    return rows, paths


def _before(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier command."""
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else []
    except (OSError, ValueError) as error:
        raise UserError(f"--out: {path} cannot be read: {first_line(error)} (allowed: results of eval)") from None
    if not isinstance(found, list) or not all(isinstance(row, dict) and {*OF_EVAL[:4]} <= {*row} for row in found):
        raise UserError(f"--out: {path} holds no results of eval (allowed: another folder)")
    return found


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
