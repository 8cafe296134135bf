"""What a study claims before it is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from bench.config import Strict
from bench.errors import UserError, unknown
from bench.evaluate.targets import AREA, COSTS, target_of
from bench.store.manifest import HypothesisRow, Measure

if TYPE_CHECKING:
    from bench.data.task import TaskData

ALL = "all"
HIGHER_IS_BETTER = {"accuracy": True, "loss": False}  # what every cell is scored by
BITS = "bits_per_byte"  # only where the data are text


class Hypothesis(Strict):
    """A claim: the variant ``better`` beats ``than`` on a task, or over ``all`` tasks, by more than ``margin``.

    Over all tasks, a seed counts by its mean over them (``bench.stats.over_tasks``).

    Attributes:
        better, than, task: labels of the study.
        metric: on the test split, by default the task's own, or ``accuracy@NAME`` on a further one; or from the
            history, on validation data and of the task's own metric: ``flops_to@X`` and ``tokens_to@X``, the training
            cost of first reaching X (less is better), and ``area``, the mean over the training's tokens.
        margin: in the metric's unit, at least 0.
    """

    claim: str = Field(min_length=1)
    better: str
    than: str
    task: str = ALL
    metric: str | None = None
    margin: float = Field(0.0, ge=0.0, allow_inf_nan=False)


def check_labels(hypotheses: Sequence[Hypothesis], variants: Sequence[str], tasks: Sequence[str]) -> None:
    """Raises UserError, with the nearest label, for a variant or a task that the study does not have."""
    claims = [hypothesis.claim for hypothesis in hypotheses]
    for number, hypothesis in enumerate(hypotheses):
        where = f"hypotheses.{number}"
        if claims.count(hypothesis.claim) > 1:
            raise UserError(f"hypotheses: claim {hypothesis.claim!r} stands twice; say what differs")
        for field, allowed in (("better", variants), ("than", variants), ("task", [*tasks, ALL])):
            if getattr(hypothesis, field) not in allowed:
                raise UserError(f"{where}: {unknown(f'label in {field}:', getattr(hypothesis, field), allowed)}")
        if hypothesis.better == hypothesis.than:
            raise UserError(f"{where}: better and than are both {hypothesis.better!r}; they must be different variants")


def resolve(hypothesis: Hypothesis, data: Mapping[str, TaskData]) -> HypothesisRow:
    """The hypothesis as the manifest holds it, with the metric and its direction on each task it is about.

    data: of the study's tasks by label. Raises UserError for a metric that a task does not have, for a score to reach
    that is none, and for a margin or a score over tasks whose metrics have different units.
    """
    where = f"hypothesis {hypothesis.claim!r}"
    tasks = data if hypothesis.task == ALL else [hypothesis.task]
    try:
        measures = [_measure(hypothesis.metric, task, data[task]) for task in tasks]
    except (UserError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None
    units = sorted({measure.of if measure.of and measure.metric == AREA else measure.metric for measure in measures})
    scores = sorted({measure.of for measure in measures if measure.of and measure.metric != AREA})
    if hypothesis.margin and len(units) > 1:
        raise UserError(f"{where}: margin = {hypothesis.margin:g} needs one metric, not {' and '.join(units)}")
    if len(scores) > 1:
        raise UserError(f"{where}: metric {hypothesis.metric!r} needs one metric to reach, not {' and '.join(scores)}")
    return HypothesisRow(**hypothesis.model_dump(), measures=measures)


def _measure(metric: str | None, task: str, data: TaskData) -> Measure:
    """What a hypothesis is judged by on a task. Raises UserError or ValueError for a metric that the task lacks."""
    own, text = data.metric, data.bytes_of("test") is not None
    known = {**HIGHER_IS_BETTER, **({BITS: False} if text else {}), own.name: own.higher_is_better}
    known |= {f"{name}@{test}": up for test in data.tests for name, up in HIGHER_IS_BETTER.items()}
    chosen = metric or own.name
    target = target_of(chosen)
    if target is not None and own.name == "accuracy" and not 0 < target.score <= 1:
        raise ValueError(f"metric {chosen!r}: an accuracy to reach must be above 0 and at most 1, not {target.score:g}")
    if target is not None or chosen == AREA:
        up = own.higher_is_better
        return Measure(
            task=task, metric=chosen, higher_is_better=up and target is None, of=own.name, of_higher_is_better=up
        )
    if chosen not in known:
        allowed = [*known, *(f"{name}@X" for name in COSTS), AREA]
        raise unknown(f"metric of {task}:", chosen, allowed)
    return Measure(task=task, metric=chosen, higher_is_better=known[chosen])
