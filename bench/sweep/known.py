"""What is known of a search already: trials that it had under another name, and cells that it has trained.

The name of a search tells what is searched, ids of cells among it. So after ids have changed, with another version of
the store, a search has another name. And a database may be lost, while the cells that were trained for it are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from bench.errors import UserError
from bench.run.renaming import former_ids
from bench.store.databases import lock_beside
from bench.store.records import configuration
from bench.store.store import Store
from bench.sweep.budgets import BudgetJob, curve, opened, planned_at, space, valid_score
from bench.sweep.storage import open_storage

FORMER = "former"  # of a trial: the search it was taken from, and its number there


def take_in(job: BudgetJob) -> optuna.Study:
    """The search of a job, with all that is known of it. To be called before any of its trials is run.

    Several processes may do this at once.
    """
    study, store = opened(job), Store(job.root)
    with lock_beside(job.root / "sweep"):
        trials = study.get_trials(deepcopy=False)
        there = {tuple(trial.user_attrs[FORMER]) for trial in trials if FORMER in trial.user_attrs}
        for name, trial in _former(job, store):
            if (name, trial.number) not in there:
                trial.set_user_attr(FORMER, [name, trial.number])
                study.add_trial(trial)
        told = [trial for trial in study.get_trials(deepcopy=False) if "cell" in trial.user_attrs]
        cells = {store.current(trial.user_attrs["cell"]) for trial in told}
        for id in store.trained_for(job.key):
            if id not in cells and (found := _of_cell(job, store, id)) is not None:
                study.add_trial(found)
        for trial in told:
            if trial.state == TrialState.COMPLETE:
                store.note_trained_for(trial.user_attrs["cell"], job.key)
    return study


def _former(job: BudgetJob, store: Store) -> Iterator[tuple[str, FrozenTrial]]:
    """The trials of the same search under names of before, with these names."""
    storage, ranges = open_storage(job.url), space(job.entry, job.spec)
    prefix = job.name.rpartition(" / ")[0]
    for name in optuna.get_all_study_names(storage):
        if name != job.name and name.rpartition(" / ")[0] == prefix:
            before = optuna.load_study(study_name=name, storage=storage).trials
            trials = [trial for trial in before if trial.state.is_finished() and trial.distributions == ranges]
            if any(_is_of(job, store, trial) for trial in trials):
                yield from ((name, trial) for trial in trials)


def _is_of(job: BudgetJob, store: Store, trial: FrozenTrial) -> bool:
    """Whether a trial's cell is the one that this search would have trained, under the id that it had before."""
    if "flops_per_token" not in trial.user_attrs:  # refused before it had a cell
        return False
    id, over, most = trial.user_attrs["cell"], trial.constraints.get("max_flops"), job.max_flops
    then = None if over is None else trial.user_attrs["flops_per_token"] / (1 + over)
    if (then is None) != (most is None) or (then is not None and most is not None and not math.isclose(then, most)):
        return False
    try:
        cell = planned_at(job, trial.params).cell
    except UserError:
        return False
    return id != cell.id and (store.current(id) == cell.id or id in former_ids(cell, {}))


def _of_cell(job: BudgetJob, store: Store, id: str) -> FrozenTrial | None:
    """The trial that has trained a cell, None if the search would not train this one."""
    record, ranges = store.record(id), space(job.entry, job.spec)
    if record is None or record.status != "done":
        return None
    told = configuration(record)
    params = {key: told[key.partition(".")[0]][key.partition(".")[2]] for key in ranges}
    try:
        if planned_at(job, params).cell.id != id:
            return None
    except UserError:
        return None
    flops = record.costs.forward_flops_per_token
    return create_trial(
        values=[valid_score(store, id)[job.metric], flops],
        params=params,
        distributions=ranges,
        user_attrs={"cell": id, "flops_per_token": flops, "curve": curve(record)},
        constraints=None if job.max_flops is None else {"max_flops": flops / job.max_flops - 1},
    )
