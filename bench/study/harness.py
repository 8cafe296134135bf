"""Tasks of lm-evaluation-harness as tasks of a study: what every finished model is scored on besides."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from bench.config import LARGEST, Strict
from bench.data.task import get_task, tasks
from bench.errors import UserError, unknown
from bench.store.manifest import HarnessRow

if TYPE_CHECKING:
    from bench.study.entries import TaskEntry

PREFIX = "cyclebench_"  # of the names our tasks have in the harness


class HarnessEntry(Strict):
    """A task of the harness. A bare name stands for itself.

    Scores take no part in a cell's id: a task that is added later is scored on the models that are there.

    Attributes:
        name: of a task of the harness, of one of ours, or of one's own in ``include``.
        on: the label of the study's task whose models are scored; may be left out where there is a single one.
        metric: of the harness, what the task is judged by in tables and in hypotheses that name none.
        options: of a task of ours.
        limit: documents; all by default.
        fewshot: examples in front of each document; as many as the task says by default.
        include: a folder of YAML files of tasks.
    """

    name: str = Field(min_length=1)
    on: str | None = None
    metric: str = "acc"
    options: dict[str, Any] = Field(default_factory=dict)
    limit: int | None = Field(None, ge=1, le=LARGEST)
    fewshot: int | None = Field(None, ge=0, le=1024)
    include: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def ours(self) -> bool:
        """Whether it is a task of ours."""
        return self.name in tasks.names()

    @property
    def key(self) -> str:
        """What its scores are called: the name in the harness, with how it is asked where that is not as usual."""
        told = asked_as(self.options, self.limit, self.fewshot)
        return (PREFIX if self.ours else "") + self.name + (f"[{told}]" if told else "")


def asked_as(options: Mapping[str, Any], limit: int | None, fewshot: int | None) -> str:
    """How a task is asked, ``limit=8,length=16``; empty where that is as usual."""
    asked = {**options, "limit": limit, "fewshot": fewshot}
    return ",".join(f"{key}={json.dumps(value)}" for key, value in sorted(asked.items()) if value is not None)


def harness_rows(entries: Sequence[HarnessEntry], of: Sequence[TaskEntry]) -> list[HarnessRow]:
    """What the manifest holds of the entries.

    of: the study's tasks. Raises UserError for a task that the study does not have, a metric that the harness does not
    have, an option that a task of ours does not have, and two entries that are the same.
    """
    labels, found = [task.label for task in of], list[HarnessRow]()
    for number, entry in enumerate(entries):
        where = f"harness.{number}"
        if entry.on is None and len(labels) > 1:
            raise UserError(f"{where}.on is required and not given (allowed: {', '.join(labels)})")
        on = entry.on or labels[0]
        if on not in labels:
            raise unknown(f"task in {where}.on:", on, labels)
        if entry.ours:
            get_task(entry.name, entry.options)
        elif entry.options:
            raise UserError(f"{where}.options: {entry.name!r} is no task of this suite (allowed: none)")
        row = HarnessRow(key=entry.key, task=on, metric=entry.metric, higher_is_better=is_better(entry.metric, where))
        if any((other.key, other.task) == (row.key, row.task) for other in found):
            raise UserError(f"{where}: {entry.key!r} stands twice; once is enough")
        found.append(row)
    return found


def is_better(metric: str, where: str) -> bool:
    """Whether more is better, of a metric of the harness. Raises UserError if it has none of that name."""
    known, name = _directions(), metric.partition(" (")[0]  # exact_match (strict-match): a metric and its filter
    if name not in known:
        raise unknown(f"metric in {where}:", name, known)
    return known[name]


@cache
def _directions() -> dict[str, bool]:
    try:
        import lm_eval.api.metrics  # noqa: F401 (optional: registers them)
        from lm_eval.api.registry import HIGHER_IS_BETTER_REGISTRY  # optional
    except ImportError:
        raise UserError("harness needs the package lm-eval (pip install 'cyclebench[eval]')") from None
    return {name: bool(HIGHER_IS_BETTER_REGISTRY[name]) for name in HIGHER_IS_BETTER_REGISTRY}
