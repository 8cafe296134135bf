"""Fair tuning: hyper-parameters are chosen before the seeds are run, on validation data.

Every variant gets the same number of trials on every task. A trial is a cell like any other, with the tuning's own
seed. It is stored, and never runs twice. The trials are also kept in the database of the sweeps.

What a trial tries depends on three things: the seed, the trial's number, and the trials before it. So several processes
try the same settings, and share the cells among them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import optuna
from optuna.samplers import TPESampler
from optuna.trial import TrialState, create_trial

from bench.errors import UserError
from bench.model.variant import variants
from bench.store.manifest import TUNING, TaskRow, TrialRow, TuningRow
from bench.store.records import Outcome
from bench.study.plan import Plan, Planned, make_plan, tuned_by, with_values
from bench.study.schema import Study, Tune, VariantEntry
from bench.sweep.storage import open_storage, open_trials, seed_of

RunPlan = Callable[[Plan], Mapping[str, Outcome]]
"""Runs a plan's cells and returns their records by id."""


class _Search:
    """The trials of one variant on one task.

    base: the cell that is varied; metric: the task's row of the manifest.
    """

    def __init__(
        self, name: str, entry: VariantEntry, base: Planned, metric: TaskRow, tune: Tune, storage: Any
    ) -> None:
        self.entry, self.task, self.seed = entry, base.task, tune.seed
        self.metric, self.up = metric.metric, metric.higher_is_better
        ranges = {"train.lr": tune.lr}
        ranges |= {f"options.{name}": limits for name, limits in variants.get(entry.name).tunable.items()}
        self.space: dict[str, Any] = {
            key: optuna.distributions.FloatDistribution(*limits, log=True) for key, limits in ranges.items()
        }
        # Another search gets another name, so that trials of different searches are never mixed.
        what = json.dumps([base.cell.id, ranges], sort_keys=True)
        parts = [name, entry.label, base.task, "tune", hashlib.sha256(what.encode()).hexdigest()[:12]]
        self.study = open_trials(storage, " / ".join(parts), self.metric, self.up, with_flops=False)
        self.trials: list[TrialRow] = []

    def ask(self) -> VariantEntry:
        """The variant with the settings of the next trial."""
        known = self._known()
        self.params = known[self.number].params if self.number in known else self._sampled(known)
        return with_values(self.entry, self.params)

    @property
    def number(self) -> int:
        """Of the trial that is being tried."""
        return len(self.trials)

    def _known(self) -> dict[int, optuna.trial.FrozenTrial]:
        """The trials so far, by number. If two processes have told of the same trial, the first one counts."""
        found: dict[int, optuna.trial.FrozenTrial] = {}
        for trial in self.study.get_trials(deepcopy=False):
            found.setdefault(trial.user_attrs["number"], trial)
        return found

    def _sampled(self, known: dict[int, optuna.trial.FrozenTrial]) -> dict[str, Any]:
        sampler = TPESampler(seed=seed_of(self.seed, self.number))
        local = optuna.create_study(directions=self.study.directions, sampler=sampler)
        local.add_trials([known[number] for number in sorted(known) if number < self.number])
        return local.ask(self.space).params

    def tell(self, record: Outcome) -> None:
        """Take in the record of the trial that is being tried."""
        value = None
        if record.status == "done":
            value = record.history[-1].valid(self.metric)
        else:
            self.reason = record.reason
        if self.number not in self._known():
            state = TrialState.FAIL if value is None else TrialState.COMPLETE
            about = {"number": self.number, "cell": record.id}
            self.study.add_trial(
                create_trial(state=state, value=value, params=self.params, distributions=self.space, user_attrs=about)
            )
        self.trials.append(TrialRow(id=record.id, value=value, **self.params))

    def row(self) -> TuningRow:
        """What the manifest keeps. Raises UserError if no trial has finished."""
        finished = [(trial.value, trial) for trial in self.trials if trial.value is not None]
        if not finished:
            where = f"variants.{self.entry.label} on {self.task}"
            raise UserError(f"tune: all {len(self.trials)} trials of {where} failed, the last: {self.reason}")
        value, best = (max if self.up else min)(finished, key=lambda pair: pair[0])
        return TuningRow(
            variant=self.entry.label,
            task=self.task,
            seed=self.seed,
            metric=self.metric,
            value=value,
            chosen={key: best.params[key] for key in self.space},
            trials=self.trials,
        )


def tuned_plan(study: Study, run: RunPlan, command: str, revision: str | None, url: str) -> Plan:
    """The study's plan, with the hyper-parameters that ``study.tune`` finds; without ``tune``, the plain plan.

    The trials go in rounds: one trial of every variant on every task, then the next. What is compared is the task's
    metric on the validation split at the end of training. All trials are told in the plan's manifest.

    Args:
        study: to be planned.
        run: runs the cells of a plan.
        command: what the manifest says it was made by.
        revision: of the code.
        url: of the database of the trials.

    Raises:
        UserError: if all trials of a variant on a task have failed.
    """
    if study.tune is None:
        return make_plan(study, command, revision)
    changes = {"name": study.name + TUNING, "seeds": (study.tune.seed,), "decide": None, "hypotheses": ()}
    trials = study.model_copy(update=changes)
    plain = make_plan(trials, command, revision)
    metrics = {task.label: task for task in plain.manifest.tasks}
    entries, storage = {entry.label: entry for entry in study.variants}, open_storage(url, closely=True)
    searches = {
        (base.variant, base.task): _Search(
            study.name, entries[base.variant], base, metrics[base.task], study.tune, storage
        )
        for base in plain.cells
    }
    so_far: Plan | None = None
    for _ in range(study.tune.trials):
        asked = make_plan(trials, command, revision, {place: search.ask() for place, search in searches.items()})
        so_far = asked if so_far is None else _joined(so_far, asked)
        records = run(so_far)
        for planned in asked.cells:
            searches[planned.variant, planned.task].tell(records[planned.cell.id])
    rows = {place: search.row() for place, search in searches.items()}
    plan = make_plan(study, command, revision, tuned_by(study, rows.values()))
    return replace(plan, manifest=plan.manifest.but(tuning=list(rows.values())))


def _joined(before: Plan, now: Plan) -> Plan:
    """All trials so far as one plan. Its manifest is that of the tuning."""
    cells = [*before.manifest.cells, *now.manifest.cells]
    return replace(now, cells=before.cells + now.cells, manifest=now.manifest.but(cells=cells))
