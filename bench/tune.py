"""Fair tuning: equally many trials for every variant and task, on validation data, before the seeds are run.

A trial is a cell like any other, at the tuning seed: it is stored and never run twice. A tuning that was interrupted
finds its trials again, since a seeded sampler that is told the same values asks for the same trials.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import optuna

from bench.errors import UserError
from bench.plan import Plan, make_plan
from bench.study import Study, Tune, VariantEntry
from bench.variant import variant_class

Record = dict[str, Any]
RunPlan = Callable[[Plan], dict[str, Record]]
"""Runs a plan's cells and returns their records by id."""


class _Search:
    """The trials of one variant on one task."""

    def __init__(self, entry: VariantEntry, task: str, tune: Tune) -> None:
        self.entry, self.task = entry, task
        self.study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=tune.seed), direction="maximize")
        ranges = {"train.lr": tune.lr}
        ranges |= {f"options.{name}": limits for name, limits in variant_class(entry.name).tunable.items()}
        self.space: dict[str, Any] = {
            key: optuna.distributions.FloatDistribution(*limits, log=True) for key, limits in ranges.items()
        }
        self.trials: list[dict[str, Any]] = []

    def ask(self) -> VariantEntry:
        """The variant as the next trial has it."""
        self.trial = self.study.ask(self.space)
        return _with(self.entry, self.trial.params)

    def tell(self, record: Record, metric: dict[str, Any]) -> None:
        """Take in a trial's record. metric: the task's row of the manifest."""
        self.metric, self.up = metric["metric"], metric["higher_is_better"]
        done = record["status"] == "done"
        value = record["history"][-1][f"valid_{self.metric}"] if done else None
        self.trials.append({"id": record["id"], **self.trial.params, "value": value})
        if value is None:
            self.reason = record["reason"]
            self.study.tell(self.trial, state=optuna.trial.TrialState.FAIL)
        else:
            self.study.tell(self.trial, value if self.up else -value)

    def row(self, seed: int) -> dict[str, Any]:
        """What the manifest keeps. Raises UserError if no trial has finished."""
        finished = [trial for trial in self.trials if trial["value"] is not None]
        if not finished:
            where = f"variants.{self.entry.label} on {self.task}"
            raise UserError(f"tune: all {len(self.trials)} trials of {where} failed, the last: {self.reason}")
        best = (max if self.up else min)(finished, key=lambda trial: trial["value"])
        return {
            "variant": self.entry.label,
            "task": self.task,
            "seed": seed,
            "metric": self.metric,
            "value": best["value"],
            "chosen": {key: best[key] for key in self.space},
            "trials": self.trials,
        }


def tuned_plan(study: Study, run: RunPlan, command: str, revision: str | None) -> Plan:
    """The study's plan with the hyper-parameters that ``study.tune`` finds: one trial of every variant on every task
    at a time, by the task's own metric on the validation split at the end of training. Its manifest has every trial.

    Without ``tune`` it is the plain plan. Raises UserError if a variant has no finished trial on a task.
    """
    if study.tune is None:
        return make_plan(study, command, revision)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    searches = {(v.label, t.label): _Search(v, t.label, study.tune) for v in study.variants for t in study.tasks}
    trials = study.model_copy(update={"name": f"{study.name}-tuning", "seeds": (study.tune.seed,)})
    so_far: Plan | None = None
    for _ in range(study.tune.trials):
        asked = make_plan(trials, command, revision, {place: search.ask() for place, search in searches.items()})
        so_far = asked if so_far is None else _joined(so_far, asked)
        records = run(so_far)
        metrics = {task["label"]: task for task in asked.manifest["tasks"]}
        for planned in asked.cells:
            searches[planned.variant, planned.task].tell(records[planned.cell.id], metrics[planned.task])
    rows = {place: search.row(study.tune.seed) for place, search in searches.items()}
    tuned = {place: _with(searches[place].entry, row["chosen"]) for place, row in rows.items()}
    plan = make_plan(study, command, revision, tuned)
    return replace(plan, manifest={**plan.manifest, "tuning": list(rows.values())})


def _joined(before: Plan, now: Plan) -> Plan:
    """All trials so far as one plan: what the tuning's own manifest names."""
    cells = [*before.manifest["cells"], *now.manifest["cells"]]
    return replace(now, cells=before.cells + now.cells, manifest={**now.manifest, "cells": cells})


def _with(entry: VariantEntry, values: dict[str, float]) -> VariantEntry:
    """The entry with values for ``train.NAME`` and ``options.NAME``."""
    changes: dict[str, dict[str, Any]] = {"train": dict(entry.train), "options": dict(entry.options)}
    for key, value in values.items():
        group, _, name = key.partition(".")
        changes[group][name] = value
    return entry.model_copy(update=changes)
