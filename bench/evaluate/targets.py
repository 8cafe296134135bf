"""What a cell tells beside its score at the end: the cost of reaching a score, the area under its curve, and what an
exit rule is worth.

``flops_to@X``, ``tokens_to@X``  training FLOPs, or tokens, until the task's metric first reaches X on validation data
``area``                         mean of the task's validation metric over the training's tokens, in the metric's unit
``exits@RULE``                   how much better the metric is than that of leaving at random, at the same FLOPs, where
                                 the exit rule decides; mean over the FLOPs, on test data (``bench.evaluate.record``)

Costs are those of the first validation at or beyond X: an upper bound, at most one interval between validations
(``train.eval_every``) above what was needed. Nothing is interpolated: in a phase transition, which is what targets are
for, the score does not rise along a line between two validations, and a cost that was seen to suffice is a fact. A cell
that never reaches X costs more than all of its training: it is censored there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:  # a study is checked and planned without them
    from bench.store.manifest import Measure
    from bench.store.records import HistoryEntry, Record

Cost = Literal["flops", "tokens"]
COSTS: dict[str, Cost] = {"flops_to": "flops", "tokens_to": "tokens"}
AREA = "area"
EXITS = "exits"


class Reading(NamedTuple):
    """A metric of one cell.

    Attributes:
        value: in the metric's unit; where it is censored the cell's whole training.
        censored: whether the true value is above ``value``, nobody knows how far.
        budget: the cell's whole training in the same unit, for costs alone.
    """

    value: float
    censored: bool = False
    budget: float | None = None


class Target(NamedTuple):
    """A score to be reached, and the cost that counts until then."""

    cost: Cost
    score: float


def target_of(metric: str) -> Target | None:
    """The target that a metric's name stands for, None if it is no such metric.

    Raises ValueError, with a message for the user, if what follows the ``@`` is no number.
    """
    name, _, score = metric.partition("@")
    if name not in COSTS:
        return None
    try:
        value = float(score)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"metric {metric!r} needs the score to reach, a number (such as {name}@0.9)")
    return Target(COSTS[name], value)


def rule_of(metric: str) -> str | None:
    """The exit rule that a metric's name tells, None if it is no such metric."""
    name, at, rule = metric.partition("@")
    return rule if name == EXITS and at else None


def unit_of(measure: Measure) -> str:
    """The metric in whose unit a measure is: of an area and of exits the one that they are of."""
    return measure.of if measure.of and measure.metric.partition("@")[0] in (AREA, EXITS) else measure.metric


def read_metric(record: Record, measure: Measure) -> Reading:
    """What a hypothesis is judged by, of a finished cell: from its history, its exits, or a score on the test data.

    Raises KeyError if the record does not have the metric.
    """
    from bench.stats import area_under_curve, cost_to  # start-up

    if rule := rule_of(measure.metric):
        if record.exits is None:
            raise KeyError(rule)
        return Reading(record.exits.rules[rule].area)
    target = target_of(measure.metric)
    if target is None and measure.of is None:
        return Reading(record.test(measure.metric))
    assert measure.of is not None and measure.of_higher_is_better is not None
    scores = [entry.valid(measure.of) for entry in record.history]
    if target is None:
        return Reading(area_under_curve(_cost_of(record.history, "tokens"), scores))
    costs = _cost_of(record.history, target.cost)
    spent = cost_to(costs, scores, target.score, measure.of_higher_is_better)
    return Reading(min(spent, costs[-1]), math.isinf(spent), costs[-1])


def _cost_of(history: Sequence[HistoryEntry], cost: Cost) -> list[float]:
    return [entry.flops if cost == "flops" else float(entry.tokens) for entry in history]
