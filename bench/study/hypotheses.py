"""What a study claims before it is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import Field, field_validator, model_validator

from bench.config import LARGE, Strict
from bench.errors import UserError, unknown
from bench.evaluate.targets import AREA, COSTS, EXITS, rule_of, target_of, unit_of
from bench.store.manifest import HarnessRow, HypothesisRow, Measure
from bench.study.entries import one_line
from bench.study.harness import is_better

if TYPE_CHECKING:
    from bench.data.task import TaskData

ALL = "all"
HIGHER_IS_BETTER = {"accuracy": True, "loss": False}  # what every cell is scored by
BITS = "bits_per_byte"  # only where the data are text
REACHED = {"accuracy": 1.0, BITS: 8.0}  # the most that there is to reach, or to differ by: a byte has 8 bits


class Hypothesis(Strict):
    """A claim on a task, or over ``all`` tasks: ``better`` beats ``than`` by more than ``margin``, or the two of
    ``same`` differ by no more than ``within``.

    Over all tasks, a seed counts by its mean over them (``bench.stats.over_tasks``).

    Attributes:
        claim: what is claimed, in a sentence that stands in the report.
        better, than: labels of the study, of a claim that one is better.
        same: two labels of the study, of a claim that they are the same.
        task: a label of the study, or the key of a task of the harness.
        metric: on the test split, by default the task's own, or ``accuracy@NAME`` on a further one; or from the
            history, on validation data and of the task's own metric: ``flops_to@X`` and ``tokens_to@X``, the training
            cost of first reaching X (less is better; differences are of its natural logarithm), and ``area``, the mean
            over the training's tokens; or ``exits@RULE``, what leaving early by an exit rule is worth over leaving at
            random (``bench.evaluate.targets``), ``exits@random`` being 0.
        than_metric: of ``than``, where it is judged by another exit rule; the two labels may then be the same.
        margin: in the metric's unit, at least 0.
        within: a mean difference up to this counts as none, in the metric's unit; by default that of the study for the
            metric, if it declares one. A claim of the same needs it; with it, one that a variant is better may end as
            equivalent.
    """

    claim: str = Field(min_length=1)
    better: str | None = None
    than: str | None = None
    same: tuple[str, str] | None = None
    task: str = ALL
    metric: str | None = Field(None, min_length=1)
    than_metric: str | None = Field(None, min_length=1)
    margin: float = Field(0.0, ge=0.0, le=LARGE)
    within: float | None = Field(None, gt=0.0, le=LARGE)

    @field_validator("claim")
    @classmethod
    def _one_line(cls, value: str) -> str:
        return one_line(value)

    @model_validator(mode="after")
    def _one_kind(self) -> Hypothesis:
        given = [name for name in ("better", "than") if getattr(self, name) is not None]
        if self.same is not None and (given or self.margin):
            other = given[0] if given else "margin"
            raise ValueError(f"same and {other} do not go together: a claim is better/than or same")
        if self.than_metric is not None and not (rule_of(self.metric or "") and rule_of(self.than_metric)):
            raise ValueError(f"than_metric = {self.than_metric!r} and metric must both be {EXITS}@RULE")
        if self.same is None and len(given) < 2:
            missing = "than" if given == ["better"] else "better"
            raise ValueError(f"{missing} is required (a claim is better: A, than: B; or same: [A, B])")
        return self

    @property
    def pair(self) -> tuple[str, str]:
        """The labels of the two variants; a positive difference favours the first."""
        if self.same is not None:
            return self.same
        assert self.better is not None and self.than is not None
        return self.better, self.than


def check_labels(hypotheses: Sequence[Hypothesis], variants: Sequence[str], tasks: Sequence[str]) -> None:
    """Raises UserError, with the nearest label, for a variant or a task that the study does not have."""
    claims = [hypothesis.claim for hypothesis in hypotheses]
    for number, hypothesis in enumerate(hypotheses):
        where = f"hypotheses.{number}"
        if claims.count(hypothesis.claim) > 1:
            raise UserError(f"hypotheses: claim {hypothesis.claim!r} stands twice; say what differs")
        fields = ("better", "than") if hypothesis.same is None else ("same", "same")
        first, second = hypothesis.pair
        named = [(fields[0], first, variants), (fields[1], second, variants), ("task", hypothesis.task, [*tasks, ALL])]
        for field, label, allowed in named:
            if label not in allowed:
                raise UserError(f"{where}: {unknown(f'label in {field}:', label, allowed)}")
        if first == second and hypothesis.than_metric in (None, hypothesis.metric):
            both = " and ".join(dict.fromkeys(fields))
            raise UserError(f"{where}: {both} are both {first!r}; they must be different variants")


def resolve(
    hypothesis: Hypothesis,
    data: Mapping[str, TaskData],
    within: Mapping[str, float] | None = None,
    harness: Sequence[HarnessRow] = (),
) -> HypothesisRow:
    """The hypothesis as the manifest holds it, with the metric and its direction on each task it is about.

    Args:
        hypothesis: of the study.
        data: of the study's tasks by label.
        within: differences that count as none, where the hypothesis has none of its own: see ``bound_names``.
        harness: the study's tasks of lm-evaluation-harness.

    Raises:
        UserError: for a metric that a task does not have; a score to reach that is none; a margin, bounds or a score
            over tasks whose metrics have different units; a margin that is not below the bounds; a claim of the same
            without bounds.
    """
    where = f"hypothesis {hypothesis.claim!r}"
    tasks = data if hypothesis.task == ALL else [hypothesis.task]
    rows = [row for row in harness if row.key == hypothesis.task]
    try:
        if rows and hypothesis.task not in data:
            measures = [_of_harness(hypothesis.metric, row, where) for row in rows]
        else:
            measures = [_measure(hypothesis.metric, task, data[task]) for task in tasks]
    except (UserError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None
    units = sorted({unit_of(measure) for measure in measures})
    scores = sorted({measure.of for measure in measures if measure.of and target_of(measure.metric)})
    for name in ("margin", "within"):
        if (value := getattr(hypothesis, name)) and len(units) > 1:
            raise UserError(f"{where}: {name} = {value:g} needs one metric, not {' and '.join(units)}")
    if len(scores) > 1:
        raise UserError(f"{where}: metric {hypothesis.metric!r} needs one metric to reach, not {' and '.join(scores)}")
    bound = hypothesis.within
    if bound is None and within and len(units) == 1:
        bound = next((within[name] for name in bound_names(measures) if name in within), None)
    if bound is not None and bound <= hypothesis.margin:
        raise UserError(f"{where}: margin = {hypothesis.margin:g} must be below within = {bound:g}")
    most = REACHED.get(units[0].partition("@")[0]) if len(units) == 1 else None
    for name, value in (("margin", hypothesis.margin), ("within", bound)):
        if most is not None and value is not None and value >= most:
            raise UserError(f"{where}: {name} = {value:g} must be below {most:g}, in {units[0]}")
    if hypothesis.same is not None and bound is None:
        raise UserError(f"{where}: same needs within, the difference in {' and '.join(units)} that counts as none")
    better, than = hypothesis.pair
    if hypothesis.than_metric:
        measures = [measure.but(than_metric=usual(hypothesis.than_metric)) for measure in measures]
        if better == than and any(measure.metric == measure.than_metric for measure in measures):
            raise UserError(f"{where}: metric and than_metric are both {measures[0].metric!r}, of the same variant")
    return HypothesisRow(
        claim=hypothesis.claim,
        better=better,
        than=than,
        kind="better" if hypothesis.same is None else "same",
        task=hypothesis.task,
        metric=hypothesis.metric,
        margin=hypothesis.margin,
        within=bound,
        measures=measures,
    )


def bound_names(measures: Sequence[Measure]) -> list[str]:
    """Under which names a study may declare the bounds of a claim, the nearest first: its metric (``exits@kl``), what
    kind of metric it is (``exits``), and the metric in whose unit that is. Several where its tasks have several.
    """
    spelled = [name for measure in measures for name in (measure.metric, unit_of(measure))]
    return list(dict.fromkeys(name for metric in spelled for name in (metric, metric.partition("@")[0])))


def check_bounds(within: Mapping[str, float], hypotheses: Sequence[Hypothesis], rows: Sequence[HypothesisRow]) -> None:
    """Raises UserError for bounds that a study declares for a metric of none of the claims that may take them: those
    without bounds of their own whose tasks have one unit.
    """
    asking = [row for claim, row in zip(hypotheses, rows, strict=True) if claim.within is None]
    asking = [row for row in asking if len({unit_of(measure) for measure in row.measures}) == 1]
    known = list(dict.fromkeys(name for row in asking for name in bound_names(row.measures)))
    for name in within:
        if name not in known:
            raise UserError(f"decide.within: {unknown('metric of a hypothesis that asks for it:', name, known)}")


def _of_harness(metric: str | None, row: HarnessRow, where: str) -> Measure:
    """What a hypothesis on a task of the harness is judged by."""
    chosen = metric or row.metric
    up = row.higher_is_better if chosen == row.metric else is_better(chosen, where)
    return Measure(task=row.task, metric=f"{chosen}@{row.key}", higher_is_better=up)


def usual(metric: str) -> str:
    """A metric, one of exits with its rule's usual name. Raises UserError for an exit rule that is not known."""
    from bench.evaluate.rules import ORACLES, get_rule  # start-up

    rule = rule_of(metric)
    return metric if rule is None or rule in ORACLES else f"{EXITS}@{get_rule(rule).key}"


def _measure(metric: str | None, task: str, data: TaskData) -> Measure:
    """What a hypothesis is judged by on a task. Raises UserError or ValueError for a metric that the task lacks."""
    own, text = data.metric, data.bytes_of("test") is not None
    known = {**HIGHER_IS_BETTER, **({BITS: False} if text else {}), own.name: own.higher_is_better}
    known |= {f"{name}@{test}": up for test in data.tests for name, up in HIGHER_IS_BETTER.items()}
    chosen = metric or own.name
    target = target_of(chosen)
    most = REACHED.get(own.name)
    if target is not None and most is not None and not 0 < target.score <= most:
        raise ValueError(
            f"metric {chosen!r}: {own.name} to reach must be above 0 and at most {most:g}, not {target.score:g}"
        )
    up = own.higher_is_better
    if target is not None or chosen == AREA:
        return Measure(
            task=task, metric=chosen, higher_is_better=up and target is None, of=own.name, of_higher_is_better=up
        )
    if rule_of(chosen):
        return Measure(task=task, metric=usual(chosen), higher_is_better=True, of=own.name, of_higher_is_better=up)
    if chosen not in known:
        allowed = [*known, *(f"{name}@X" for name in COSTS), AREA, f"{EXITS}@RULE"]
        raise unknown(f"metric of {task}:", chosen, allowed)
    return Measure(task=task, metric=chosen, higher_is_better=known[chosen])
