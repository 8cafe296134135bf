"""What a study claims before it is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from bench.config import Strict
from bench.errors import UserError, unknown
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
        metric: on the test split, by default the task's own, or ``accuracy@NAME`` on a further one.
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

    data: of the study's tasks by label. Raises UserError for a metric that a task does not have, and for a margin over
    tasks whose metrics have different units.
    """
    measures = []
    for task in data if hypothesis.task == ALL else [hypothesis.task]:
        own, text = data[task].metric, data[task].bytes_of("test") is not None
        known = {**HIGHER_IS_BETTER, **({BITS: False} if text else {}), own.name: own.higher_is_better}
        known |= {f"{name}@{test}": up for test in data[task].tests for name, up in HIGHER_IS_BETTER.items()}
        metric = hypothesis.metric or own.name
        if metric not in known:
            raise UserError(f"hypothesis {hypothesis.claim!r}: {unknown(f'metric of {task}:', metric, known)}")
        measures.append(Measure(task=task, metric=metric, higher_is_better=known[metric]))
    units = sorted({measure.metric for measure in measures})
    if hypothesis.margin and len(units) > 1:
        margin = f"margin = {hypothesis.margin:g}"
        raise UserError(f"hypothesis {hypothesis.claim!r}: {margin} needs one metric, not {' and '.join(units)}")
    return HypothesisRow(**hypothesis.model_dump(), measures=measures)
