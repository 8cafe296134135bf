"""Threshold trials: no model is run, the stored traces tell what any threshold gives.

A trial chooses what share of the validation signals says "leave", at all exit points together or at each; every cell
takes the threshold that lets this share of its own signals do so. Shares mean the same for every rule and seed, where
the signals themselves may be on any scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, Trial

from bench.evaluate.record import BUDGETS
from bench.evaluate.rules import ORACLES, get_rule
from bench.evaluate.trace import Trace
from bench.processes import pulse
from bench.store.manifest import ThresholdRow, TunedShares
from bench.store.store import Split, Store
from bench.study.sweep import ThresholdSweep
from bench.sweep.storage import best_within, done, open_storage, open_trials, optimize_cheap

NOT_TUNED = ("fixed", "random")  # the bounds of the others: a threshold of theirs is a number of cycles


@dataclass(frozen=True)
class ThresholdJob:
    """The search of one rule on one variant's cells of a task.

    Attributes:
        name: of the Optuna study.
        ids: the cells, one a seed.
        metric, higher_is_better: the task's.
        worker: which of those at work on this study.
    """

    name: str
    variant: str
    task: str
    rule: str
    ids: tuple[str, ...]
    metric: str
    higher_is_better: bool
    spec: ThresholdSweep
    max_flops: float | None
    seed: int
    root: Path
    url: str
    worker: int = 0


def traces(store: Store, ids: tuple[str, ...], split: Split) -> list[Trace]:
    """The stored traces of cells. Raises UserError if one is damaged."""
    return [Trace.from_bytes(store.trace(id, split)) for id in ids]


def tunable(trace: Trace, rules: tuple[str, ...]) -> list[str]:
    """Those of the rules (none: all) that the trace has a signal of and that can be tuned."""
    for key in rules:
        get_rule(key)  # an unknown one is an error, one that the model does not show is not
    return [key for key in rules or trace.rules if key in trace.signals and key not in (*NOT_TUNED, *ORACLES)]


class Levels:
    """A cell's validation signals in order: from shares to thresholds."""

    def __init__(self, trace: Trace, key: str, per_cycle: bool) -> None:
        self.sign = 1 if get_rule(key).leave == "below" else -1
        signal = self.sign * trace.signals[key][:, :-1]
        self.ordered = np.sort(signal if per_cycle else signal.reshape(-1, 1), axis=0)

    def threshold(self, shares: NDArray[np.float64]) -> Any:
        """At which these shares of the signals say "leave": one, or one for each exit point [C - 1]. An infinite
        threshold lets none leave.
        """
        count = np.rint(shares * len(self.ordered)).astype(int)
        level = self.ordered[np.maximum(count, 1) - 1, np.arange(len(count))]
        found = self.sign * np.where(count > 0, level.astype(float), -np.inf)
        return found if len(found) > 1 else float(found[0])


def search(job: ThresholdJob) -> ThresholdRow:
    """Run the trials that are still wanting and return the row of the sweep's result.

    ``tuned``   for ``max_flops``, or else each share of the FLOPs at full depth: the best trial on validation data
                within that budget, with the thresholds it means for each cell, and what they give on the test data;
                ``single``: the same of each cell's own best single threshold, exactly (None: some cell cannot keep
                the budget; the search keeps it in the mean over the cells, ``single`` in each of them)
    """
    valid = traces(Store(job.root), job.ids, "valid")
    test = traces(Store(job.root), job.ids, "test")
    levels = [Levels(trace, job.rule, job.spec.per_cycle) for trace in valid]
    points = levels[0].ordered.shape[1]
    study = open_trials(open_storage(job.url), job.name, job.metric, job.higher_is_better)

    def thresholds(trial: Trial | FrozenTrial) -> list[Any]:
        shares = np.array([trial.params[name] for name in names])
        return [level.threshold(shares) for level in levels]

    def objective(trial: Trial) -> tuple[float, float]:
        pulse()
        for name in names:
            trial.suggest_float(name, 0, 1)
        score = _mean([trace.score(job.rule, at) for trace, at in zip(valid, thresholds(trial), strict=True)])
        if job.max_flops is not None:
            trial.set_constraint("max_flops", score["flops_per_token"] / job.max_flops - 1)
        return score[job.metric], score["flops_per_token"]

    names = [f"share_{point}" for point in range(1, points + 1)] if points > 1 else ["share"]
    ends = [dict.fromkeys(names, end) for end in (0.0, 1.0)]  # none leaves early, all leave at the first exit point
    optimize_cheap(study, objective, job.spec.trials, (job.seed, job.worker), ends)
    full = float(np.mean([trace.mean_flops()[-1] for trace in valid]))
    tuned = []
    for budget in [job.max_flops] if job.max_flops is not None else [share * full for share in BUDGETS]:
        trial = best_within(study, budget)
        if trial is None:
            continue
        at = thresholds(trial)
        scores = {
            split: [trace.score(job.rule, threshold) for trace, threshold in zip(found, at, strict=True)]
            for split, found in (("valid", valid), ("test", test))
        }
        tuned.append(
            TunedShares(
                max_flops=budget,
                share_of_full=budget / full,
                trial=trial.number,
                shares=[trial.params[name] for name in names],
                thresholds=[[None if np.isinf(v) else float(v) for v in np.atleast_1d(value)] for value in at],
                valid=_mean(scores["valid"]),
                test=_mean(scores["test"]),
                single=_single(job, valid, test, budget),
                test_by_seed=[score[job.metric] for score in scores["test"]],
            )
        )
    return ThresholdRow(
        study=job.name,
        variant=job.variant,
        task=job.task,
        rule=job.rule,
        per_cycle=job.spec.per_cycle,
        metric=job.metric,
        cells=list(job.ids),
        trials=done(study),
        full_flops_per_token=full,
        front=[list(trial.values) for trial in sorted(study.best_trials, key=lambda t: t.values[1])],
        tuned=tuned,
    )


def _single(job: ThresholdJob, valid: list[Trace], test: list[Trace], budget: float) -> dict[str, float] | None:
    """Test scores of the thresholds that are the best for each cell by itself, of all there are, on validation data."""
    scores = []
    for here, there in zip(valid, test, strict=True):
        curve = here.curve(job.rule)
        values = curve[job.metric] if job.higher_is_better else -curve[job.metric]
        within = curve["flops_per_token"] <= budget * (1 + 1e-9)
        if not within.any():
            return None
        scores.append(there.score(job.rule, curve["threshold"][np.where(within, values, -np.inf).argmax()]))
    return _mean(scores)


def _mean(scores: list[dict[str, float]]) -> dict[str, float]:
    """Over the seeds."""
    return {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}
