"""Budget trials: every trial is a cell. Its shape and its training budget are taken from the study's ranges.

A trial that looks hopeless is stopped early. Optuna does not do this where there are two objectives, so the rule is
ours:

* A trial's rivals are the finished trials that execute no more FLOPs per token than it does.
* The trial has done a share of its training. Each rival's validation loss is taken at the same share.
* The trial is stopped if its loss is worse than the median of theirs. Optuna's ``MedianPruner`` decides this, on a
  study that holds the rivals alone.

An expensive trial has many rivals. It must beat them to be worth its FLOPs. A cheap trial has few rivals, and is seldom
stopped.

Trials are compared at the same share of their training, not at the same training FLOPs. At the same FLOPs a longer
schedule would still be at its high learning rate. It would look worse than it will be at its end.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import Trial, TrialState, create_trial

from bench.data.task import task_data
from bench.errors import UserError
from bench.evaluate.trace import Trace
from bench.model.costs import costs
from bench.model.variant import get_variant, variants
from bench.processes import pulse
from bench.run.cells import GivenUpError, Job, Tell, run_job
from bench.run.lease import LeaseWatch
from bench.store.manifest import BudgetRow, BudgetTrial
from bench.store.records import Record
from bench.store.store import Store
from bench.study.plan import Planned, make_plan, with_values
from bench.study.schema import Study, VariantEntry
from bench.study.shapes import OF_CYCLES
from bench.study.start import sizes_of
from bench.study.sweep import BudgetSweep, Range
from bench.sweep.storage import RefusedError, StoppedError, best_within, done, open_storage, open_trials, optimize
from bench.train.checkpoints import Every

STARTUP = 4  # no trial is stopped before it has so many rivals
WARMUP = 0.2  # no trial is stopped before this share of its training
GRAIN = 1000  # Optuna's pruner counts whole steps: so many are a whole training


@dataclass(frozen=True)
class BudgetJob:
    """The search of a variant on a task.

    Attributes:
        name: of the Optuna study.
        key: the same search has the same one, whatever ids cells have.
        study: with this variant and this task alone.
        metric, higher_is_better: the task's.
    """

    name: str
    key: str
    study: Study
    metric: str
    higher_is_better: bool
    spec: BudgetSweep
    max_flops: float | None
    seed: int
    root: Path
    url: str

    @property
    def entry(self) -> VariantEntry:
        return self.study.variants[0]

    @property
    def task(self) -> str:
        return self.study.tasks[0].label


def space(entry: VariantEntry, spec: BudgetSweep) -> dict[str, BaseDistribution]:
    """The ranges that a variant can use, as Optuna has them. Raises UserError if there are none."""
    kind = variants.get(entry.name)
    found: dict[str, BaseDistribution] = {}
    for key, values in spec.ranges.items():
        group, _, name = key.partition(".")
        if (group == "options" and name not in kind.Options.model_fields) or (
            group == "model" and name in OF_CYCLES and not kind.cycled
        ):
            continue
        if not isinstance(values, Range):
            found[key] = CategoricalDistribution(values)
        elif isinstance(values.low, int) and isinstance(values.high, int):
            found[key] = IntDistribution(values.low, values.high, values.log, int(values.step or 1))
        else:
            found[key] = FloatDistribution(values.low, values.high, values.log, values.step)
    if not found:
        raise UserError(f"sweep.budgets.ranges: none of {', '.join(spec.ranges)} means anything to {entry.label!r}")
    return found


def _suggest(trial: Trial, key: str, of: BaseDistribution) -> Any:
    if isinstance(of, CategoricalDistribution):
        return trial.suggest_categorical(key, of.choices)
    if isinstance(of, IntDistribution):
        return trial.suggest_int(key, of.low, of.high, step=of.step, log=of.log)
    assert isinstance(of, FloatDistribution)
    return trial.suggest_float(key, of.low, of.high, step=of.step, log=of.log)


def planned_at(job: BudgetJob, params: dict[str, Any]) -> Planned:
    """The cell of a trial. Raises UserError for a shape that the variant cannot have."""
    entry = with_values(job.entry, params)
    study = job.study.model_copy(update={"variants": (entry,), "seeds": (job.spec.seed,)})
    return make_plan(study, "", None).cells[0]


def opened(job: BudgetJob) -> optuna.Study:
    """The Optuna study of a job."""
    return open_trials(open_storage(job.url), job.name, job.metric, job.higher_is_better)


def run_trials(job: BudgetJob, tell: Tell) -> None:
    """Run trials until as many are finished as were asked for. tell: called with events for the progress bars, and with
    ``trial`` (number, what it tries in words, its cell or None) before anything of the study's own code is run for one.
    """
    store = Store(job.root)
    study = opened(job)
    ranges = space(job.entry, job.spec)

    def objective(trial: Trial) -> tuple[float, float]:
        params = {key: _suggest(trial, key, ranges[key]) for key in ranges}
        tell("trial", (trial.number, str(params), None))
        try:
            planned = planned_at(job, params)
        except UserError as error:
            raise RefusedError(str(error)) from None
        flops = forward_flops(planned)
        trial.set_user_attr("cell", planned.cell.id)
        trial.set_user_attr("flops_per_token", flops)
        if job.max_flops is not None:
            trial.set_constraint("max_flops", flops / job.max_flops - 1)
            if flops > job.max_flops:
                raise RefusedError(f"{flops:.4g} FLOPs per token are more than max_flops = {job.max_flops:.4g}")
        return _trained(planned, job, store, study, trial, flops, tell), flops

    optimize(study, objective, job.spec.trials, job.seed)


def _trained(
    planned: Planned, job: BudgetJob, store: Store, study: optuna.Study, trial: Trial, flops: float, tell: Tell
) -> float:
    """Train the trial's cell unless it has a result, keep its learning curve for its rivals, return its score."""
    cell, steps, label = planned.cell, planned.cell.train.steps, f"{planned.variant} {planned.task}"
    seen, pruned = list[tuple[float, float]](), list[str]()

    def watch(entry: dict[str, float]) -> None:
        seen.append((entry["step"] / steps, entry["valid_loss"]))
        if job.spec.prune and behind(study, *seen[-1], flops):
            pruned.append(f"pruned at {seen[-1][0]:.0%} of the training")
            raise GivenUpError(pruned[0])

    def told(kind: str, arguments: tuple[Any, ...]) -> None:
        if kind in ("update", "phase"):
            tell(kind, (cell.id, *arguments))

    tell("start", (cell.id, f"{label} trial {trial.number}", steps))
    tell("trial", (trial.number, str(trial.params), cell))
    watching, record = LeaseWatch(), store.record(cell.id)
    failed = record.at if record is not None and record.status == "failed" else None
    while record is None or record.status == "failed":
        number = watching.free(store.folder(cell.id))
        seen.clear()
        found = None
        if number is not None:
            found = run_job(Job(cell, label, job.root, Every(), number, failed, watch=watch), told)
        if pruned:
            tell("finish", (cell.id, pruned[0], False))
            trial.set_user_attr("curve", seen)
            raise StoppedError(pruned[0], pruned=True)
        if found is not None and found.status == "failed":
            tell("finish", (cell.id, f"failed: {found.reason}", True))
            raise StoppedError(found.reason, pruned=False)
        record = found
        if record is None:  # in another process
            pulse()
            time.sleep(1)
    score = valid_score(store, cell.id)[job.metric]
    tell("finish", (cell.id, f"validation {job.metric.replace('_', ' ')} {score:.3f}", False))
    trial.set_user_attr("curve", curve(record))
    store.note_trained_for(cell.id, job.key)
    return score


def lost(job: BudgetJob) -> list[Planned]:
    """The cells of finished trials that have no result here: it was damaged, or the trials are of another store. Raises
    UserError for a trial whose cell cannot be planned any more.
    """
    store = Store(job.root)
    trials = opened(job).get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    missing = [trial for trial in trials if not store.done(store.current(trial.user_attrs["cell"]))]
    return [planned_at(job, trial.params) for trial in missing]


def curve(record: Record) -> list[tuple[float, float]]:
    """The share of its training that a cell had done at its validations, and their losses."""
    return [(entry.step / record.cell.train["steps"], entry.valid_loss) for entry in record.history]


def bury(job: BudgetJob, number: int, reason: str, last: bool) -> None:
    """Tell of a trial whose process has died: it is tried again, unless this was the last time.

    Args:
        job: that it is one of.
        number: of the trial.
        reason: why its process died.
        last: whether it counts as done, as a failure.
    """
    study = opened(job)
    trial = next(trial for trial in study.get_trials(deepcopy=False) if trial.number == number)
    if trial.state != TrialState.RUNNING:
        return
    if last:
        study._storage.set_trial_user_attr(trial._trial_id, "reason", reason)
    study.tell(number, state=TrialState.FAIL)
    if not last:
        study.enqueue_trial(trial.params)


def behind(study: optuna.Study, share: float, loss: float, flops: float) -> bool:
    """Whether a trial at this share of its training is to be stopped (see the module's docstring)."""
    step = round(GRAIN * share)
    rivals = optuna.create_study(
        pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=round(GRAIN * WARMUP))
    )
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        if trial.user_attrs["flops_per_token"] <= flops * (1 + 1e-9):
            shares, losses = np.array(trial.user_attrs["curve"]).T
            then = float(np.interp(share, shares, losses))
            rivals.add_trial(create_trial(value=then, intermediate_values={step: then}))
    here = create_trial(state=TrialState.RUNNING, intermediate_values={step: loss})
    return rivals.pruner.prune(rivals, here)


def forward_flops(planned: Planned) -> float:
    """Executed forward FLOPs per token of a cell at full depth, known before it is trained."""
    cell = planned.cell
    data = task_data(cell.task, cell.task_options)
    variant = get_variant(cell.variant, cell.options)
    vocab, positions = sizes_of(None if cell.init is None else cell.init.source, data)
    return costs(variant, cell.model, vocab, data.length, positions).forward_flops_per_token


def valid_score(store: Store, id: str) -> dict[str, float]:
    """What a trained cell gives at full depth on the whole validation split."""
    trace = Trace.from_bytes(store.trace(id, "valid"))
    return trace.leaving(trace.n_cycles)


def row(job: BudgetJob) -> BudgetRow:
    """The row of the sweep's result.

    ``front`` holds the trials that no other beats in both metric and FLOPs on validation data, with their test scores.
    ``chosen`` is the best trial within ``max_flops``. Raises UserError if a trial's cell has no result.
    """
    study = opened(job)
    store = Store(job.root)

    def told(trial: Any) -> BudgetTrial:
        record = store.record(trial.user_attrs["cell"])
        if record is None or record.status != "done":
            why = "" if record is None else f": {record.reason}"
            raise UserError(f"sweep: trial {trial.number} of {job.name!r} has no result in {job.root}{why}")
        return BudgetTrial(
            trial=trial.number,
            id=store.current(trial.user_attrs["cell"]),
            params=trial.params,
            flops_per_token=trial.values[1],
            train_flops=record.costs.train_flops,
            valid=trial.values[0],
            test=record.test(job.metric),
        )

    chosen = best_within(study, np.inf if job.max_flops is None else job.max_flops)
    trials = study.get_trials(deepcopy=False)
    return BudgetRow(
        study=job.name,
        variant=job.entry.label,
        task=job.task,
        metric=job.metric,
        seed=job.spec.seed,
        trials=done(study),
        pruned=sum(t.state == TrialState.PRUNED and "reason" in t.user_attrs for t in trials),
        failed=sum(t.state == TrialState.FAIL and "reason" in t.user_attrs for t in trials),
        refused=sum("refused" in t.user_attrs for t in trials),
        cells=[store.current(t.user_attrs["cell"]) for t in trials if t.state == TrialState.COMPLETE],
        front=[told(trial) for trial in sorted(study.best_trials, key=lambda t: t.values[1])],
        chosen=told(chosen) if chosen is not None else None,
    )
