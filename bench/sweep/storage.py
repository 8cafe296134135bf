"""Optuna studies in a database that several processes and machines may share."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.samplers import NSGAIISampler, TPESampler
from optuna.storages._rdb import models
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import event, make_url
from sqlalchemy.exc import IntegrityError, ProgrammingError

from bench.errors import UserError, first_line
from bench.store.databases import Tables, make_whole, sqlite_file
from bench.store.store import TRIALS

BEAT, GRACE = 10, 60  # seconds between a running trial's signs of life, and without one until it is given up
POPULATION = 40  # of the genetic search, which thousands of cheap trials pay for
BATCH = 100  # trials of the genetic search between two looks into the database
ANSWER = 10  # seconds in which a server must answer
FLOPS = "executed FLOPs per token"  # the name of what a search makes small
AT_ONCE = 5  # times that another process may be faster in making tables on a server
TRIED = 50  # trials refused before training, for every one that is wanted, before the ranges are given up

Objective = Callable[[Trial], Sequence[float]]


class RefusedError(Exception):
    """A trial that is not worth one of the trials asked for; the message says why."""


class StoppedError(Exception):
    """A trial that counts as one but has no values: it failed, or was pruned; the message says why."""

    def __init__(self, reason: str, pruned: bool) -> None:
        super().__init__(reason)
        self.pruned = pruned


def default_url(runs: Path) -> str:
    """A SQLite file beside the results."""
    runs.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{runs / TRIALS}"


def shown_url(url: str) -> str:
    """The address as it may be printed and stored: without a password."""
    return make_url(url).render_as_string(hide_password=True)


def open_storage(url: str, closely: bool = False) -> optuna.storages.RDBStorage:
    """The database at any SQLAlchemy address, its tables made if need be.

    A damaged SQLite file is put aside, and a new one begun: cells that are finished are not trained again for it.

    Args:
        url: the address.
        closely: whether to look for damage, and at the version of the tables: in a command, not in each of its workers.

    Raises:
        UserError: if it cannot be used.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    sqlite = url.startswith("sqlite")
    try:
        if (path := sqlite_file(url)) is not None:
            make_whole(path, TABLES, lambda text: print(text, file=sys.stderr), closely)
        storage = _storage(url)
    except Exception as error:  # whatever SQLAlchemy, its drivers and Optuna raise
        reason = first_line(error)
        try:
            url = shown_url(url)
        except Exception:  # not an address at all
            url = url.partition("@")[2] or url
        raise UserError(f"--storage: {url!r} cannot be used: {reason}") from None
    if sqlite:
        event.listen(storage.engine, "connect", _write_ahead)
        storage.engine.dispose()  # connections made before the listener was there
    return storage


def _storage(url: str) -> optuna.storages.RDBStorage:
    kwargs: dict[str, Any] = {"pool_pre_ping": True}
    if url.startswith("sqlite"):
        kwargs = {"connect_args": {"timeout": 60}}
    elif url.startswith(("postgresql", "mysql")):
        kwargs |= {"connect_args": {"connect_timeout": ANSWER}}
    for more in range(AT_ONCE, -1, -1):
        try:
            return optuna.storages.RDBStorage(
                url,
                engine_kwargs=kwargs,
                heartbeat_interval=BEAT,
                grace_period=GRACE,
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
            )
        except (IntegrityError, ProgrammingError):  # another process has made the same table at the same time
            if not more:
                raise
    raise AssertionError


def _make(url: str) -> None:
    """Make Optuna's tables in a SQLite file, or bring them up to date."""
    storage = optuna.storages.RDBStorage(url, skip_compatibility_check=True)
    try:
        if storage.get_current_version() != storage.get_head_version():
            storage.upgrade()
        with storage.engine.connect() as connection:
            _write_ahead(connection.connection, None)  # here nobody else is at it
    finally:
        storage.remove_session()
        storage.engine.dispose()


TABLES = Tables("Optuna", frozenset(models.BaseModel.metadata.tables), Path(models.__file__).parent / "alembic", _make)


def _write_ahead(connection: Any, _: Any) -> None:
    """Commits of SQLite without a wait for the disk each: a crash of the machine may cost the last, never the file."""
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL"):
        connection.execute(f"PRAGMA {pragma}").close()


def open_trials(
    storage: optuna.storages.BaseStorage, name: str, metric: str, higher_is_better: bool, with_flops: bool = True
) -> optuna.Study:
    """The study of that name: its trials' values are the metric and, unless ``with_flops`` is false, the executed FLOPs
    per token, to be minimised. Optuna's dashboard calls them so.
    """
    directions = [StudyDirection.MAXIMIZE if higher_is_better else StudyDirection.MINIMIZE]
    directions += [StudyDirection.MINIMIZE] if with_flops else []
    study = optuna.create_study(storage=storage, study_name=name, directions=directions, load_if_exists=True)
    names = [metric.replace("_", " "), *([FLOPS] if with_flops else [])]
    if study.metric_names != names:
        study.set_metric_names(names)
    return study


def optimize_cheap(
    study: optuna.Study, objective: Objective, wanted: int, seed: Sequence[int], first: Sequence[dict[str, Any]]
) -> None:
    """Go on until ``wanted`` trials are done, of an objective that costs less than a look into the database: a genetic
    search in memory that takes in what others have found, and puts in what it has, every ``BATCH`` trials. Several
    workers may end with up to so many more each. first: parameters to begin with.
    """
    while len(have := study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) < wanted:
        sampler = NSGAIISampler(population_size=POPULATION, seed=seed_of(*seed, len(have)))
        local = optuna.create_study(directions=study.directions, sampler=sampler)
        local.add_trials(have)
        for params in first:
            local.enqueue_trial(params, skip_if_exists=True)
        local.optimize(objective, n_trials=min(BATCH, wanted - len(have)))
        others = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))[len(have) :]
        known = [trial.params for trial in others]  # of a worker that began from the same trials with the same seed
        study.add_trials([trial for trial in local.trials[len(have) :] if trial.params not in known])


def seed_of(*parts: int) -> int:
    """The seed of a sampler, from those of the search and the trials it has by then."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def optimize(study: optuna.Study, objective: Objective, wanted: int, seed: int) -> None:
    """Go on until ``wanted`` trials are done, or running in some process; those that were refused do not count.

    What a trial asks for depends on the seed, its number and the trials done before: workers never ask for the same.
    Raises UserError if nearly everything is refused.
    """

    def one(trial: Trial) -> Sequence[float]:
        study.sampler = TPESampler(seed=seed_of(seed, trial.number))
        others = study.get_trials(deepcopy=False)
        if sum(counts(other) for other in others if other.number < trial.number) >= wanted:
            study.stop()  # another worker has asked at the same time
            trial.set_user_attr("refused", "one too many")
            raise RefusedError
        try:
            return objective(trial)
        except RefusedError as error:
            trial.set_user_attr("refused", str(error))
            refused = [other for other in others if "refused" in other.user_attrs]
            if len(refused) > TRIED * wanted:
                raise UserError(f"sweep: of {len(others)} trials nearly all are refused, the last: {error}") from None
            raise optuna.TrialPruned from None
        except StoppedError as error:
            trial.set_user_attr("reason", str(error))
            if error.pruned:
                raise optuna.TrialPruned from None
            raise

    def enough(study: optuna.Study, _: FrozenTrial) -> None:
        if done(study) >= wanted:
            study.stop()

    if done(study) < wanted:
        study.optimize(one, callbacks=[enough], catch=(StoppedError, RefusedError))


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial is one of those asked for: not if it was refused, or its process died."""
    return "refused" not in trial.user_attrs and (
        trial.state in (TrialState.COMPLETE, TrialState.RUNNING) or "reason" in trial.user_attrs
    )


def done(study: optuna.Study) -> int:
    """Trials that count."""
    return sum(counts(trial) for trial in study.get_trials(deepcopy=False))


def running(study: optuna.Study) -> int:
    """Trials that some process is at; those whose process has died are given up first, to be tried again."""
    optuna.storages.fail_stale_trials(study)
    return len(study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))


def best_within(study: optuna.Study, flops: float) -> FrozenTrial | None:
    """The completed trial with the best metric within so many FLOPs per token, the cheapest of equals."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    sign = -1 if study.directions[0] == StudyDirection.MAXIMIZE else 1
    within = [trial for trial in trials if trial.values[1] <= flops * (1 + 1e-9)]
    return min(within, key=lambda trial: (sign * trial.values[0], trial.values[1], trial.number), default=None)


def cells_of_sweeps(runs: Path, url: str | None, known: Mapping[str, str]) -> set[str]:
    """The ids of the cells that the trials of sweeps have trained, or are at; a trial that is judged already without a
    result needs none.

    Args:
        runs: folder of the results.
        url: of the trials' database; by default that beside the results, if there is one.
        known: databases by the sweeps that say they have their trials there.

    Raises:
        UserError: if one of them is another.
    """
    beside = runs / TRIALS
    here = shown_url(url) if url is not None else f"sqlite:///{beside}"
    for sweep, other in known.items():
        file = sqlite_file(other)
        moved = url is None and file is not None and file.name == TRIALS and not file.exists() and beside.exists()
        if other != here and (file is None or file != sqlite_file(here)) and not moved:
            raise UserError(f"--storage: the sweep {sweep} has its trials in {other} (allowed: that address)")
    if url is None and not beside.exists():
        return set()
    storage = open_storage(url or here)
    studies = [optuna.load_study(study_name=name, storage=storage) for name in optuna.get_all_study_names(storage)]
    told = [trial.user_attrs for study in studies for trial in study.get_trials(deepcopy=False)]
    wanted = [about for about in told if not about.keys() & {"reason", "refused"}]
    return {str(about["cell"]) for about in wanted if "flops_per_token" in about}
