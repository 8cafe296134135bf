"""From a study to its cells: matching done, data built, every cell identified."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from bench.config import Cell, ModelConfig
from bench.data import TaskData, get_task
from bench.environment import lock
from bench.errors import UserError
from bench.hypotheses import resolve
from bench.match import measure, solve
from bench.study import Study, TaskEntry, VariantEntry
from bench.train import pick_device
from bench.variant import Variant, get_variant


@dataclass(frozen=True)
class Planned:
    """A cell and its place in the study."""

    variant: str  # labels
    task: str
    cell: Cell


@dataclass(frozen=True)
class Plan:
    """All cells of a study, in the order they run, with what the matching chose."""

    study: Study
    cells: tuple[Planned, ...]
    manifest: dict[str, Any]


@lru_cache(maxsize=8)
def _build(name: str, options: str) -> TaskData:
    return get_task(name, json.loads(options)).build()


def task_data(name: str, options: dict[str, Any]) -> TaskData:
    """A task's data, built once in a process."""
    return _build(name, json.dumps(options, sort_keys=True))


def shape_of(
    study: Study, entry: VariantEntry, task: TaskEntry, vocab_size: int, length: int
) -> tuple[ModelConfig, str]:
    """The shape of a variant on a task after matching, and what the matching chose ('' without matching)."""
    variant = get_variant(entry.name, entry.options)
    model = _relevant(variant, study.cell_model(entry, task))
    if entry.match is None:
        return model, ""
    reference = next(other for other in study.variants if other.label == study.reference)
    other = get_variant(reference.name, reference.options)
    other_model = _relevant(other, study.cell_model(reference, task))
    target = measure(entry.match, other, other_model, vocab_size, length)
    try:
        return solve(entry.match, variant, model, target, vocab_size, length)
    except UserError as error:
        raise UserError(f"variants.{entry.label}.{error}") from None


Tuned = Mapping[tuple[str, str], VariantEntry]
"""What stands for a study's variant on a task, by their labels, where tuning has changed it."""


def make_plan(study: Study, command: str, revision: str | None, tuned: Tuned | None = None) -> Plan:
    """Expand a study. Raises UserError, naming the entry, for a wrong variant, task or option."""
    tuned = tuned or {}
    cells: list[Planned] = []
    chosen: dict[str, dict[str, str]] = {entry.label: {} for entry in study.variants}
    tasks, built = [], {}
    for task in study.tasks:
        maker = get_task(task.name, task.options)
        task_options = maker.options.model_dump(mode="json")
        data = built[task.label] = task_data(task.name, task_options)
        tasks.append({"label": task.label, "task": task.name, **_metric(data)})
        for given in study.variants:
            entry = tuned.get((given.label, task.label), given)
            variant = get_variant(entry.name, entry.options)
            model, text = shape_of(study, entry, task, data.vocab_size, data.length)
            train = study.cell_train(entry, task)
            variant.schedule(model)  # an impossible shape or device must be refused before anything runs
            pick_device(train)
            train.check_halting(model)
            if text:
                chosen[entry.label][task.label] = text
            for seed in study.seeds:
                cell = Cell(
                    variant=entry.name,
                    options=variant.options.model_dump(mode="json"),
                    model=model,
                    train=train,
                    task=task.name,
                    task_options=task_options,
                    seed=seed,
                    evaluation=study.evaluation,
                    fingerprint=data.fingerprint,
                )
                cells.append(Planned(entry.label, task.label, cell))
    manifest = {
        "study": study.name,
        "question": study.question,
        "reference": study.reference,
        "seeds": list(study.seeds),
        "variants": [
            {"label": e.label, "variant": e.name, "match": e.match, "chosen": _merge(chosen[e.label])}
            for e in study.variants
        ],
        "tasks": tasks,
        "hypotheses": [resolve(hypothesis, built) for hypothesis in study.hypotheses],
        "cells": [{"variant": p.variant, "task": p.task, "seed": p.cell.seed, "id": p.cell.id} for p in cells],
        "command": command,
        "git": revision,
        "lock": lock(),
        "config": study.model_dump(mode="json"),
    }
    return Plan(study, tuple(sorted(cells, key=lambda planned: planned.cell.seed)), manifest)


def _relevant(variant: Variant, model: ModelConfig) -> ModelConfig:
    """Without fields that mean nothing to the variant: they must not make two equal cells look different."""
    return model if variant.cycled else model.model_copy(update={"n_cycles": 1, "halting": "none"})


def _metric(data: TaskData) -> dict[str, Any]:
    metric = asdict(data.metric)
    return {"metric": metric["name"], "higher_is_better": metric["higher_is_better"], "levels": metric["levels"]}


def _merge(by_task: dict[str, str]) -> str:
    """One text if all tasks agree, else one for each."""
    if len(set(by_task.values())) <= 1:
        return next(iter(by_task.values()), "")
    return "; ".join(f"{task}: {text}" for task, text in by_task.items())
