"""What is stored of a study, as pydantic models: its cells and what they are about, and the result of its sweep."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from bench.config import FIRST_PILOT
from bench.store.records import Environment, Stored

TUNING, SWEPT = "-tuning", "-sweep"  # ends of the names under which a study's tuning and its trained trials are kept


class VariantRow(Stored):
    """A variant of a study.

    Attributes:
        label: of the study's own.
        variant: its registered name.
        match: what is held equal to the reference, None for nothing.
        chosen: what the matching chose, in words.
        notes: what there is to know of its scores, a sentence each; older manifests have none.
    """

    label: str
    variant: str
    match: str | None
    chosen: str
    notes: list[str] = Field(default_factory=list)


class TaskRow(Stored):
    """A task of a study. metric: its own; levels: trivial ones in the metric's unit, by name; solvers: levels of those
    that do a part of the task (``bench.data.task.Metric``); notes: what there is to know of how its data were made.
    Older manifests have neither solvers nor notes.
    """

    label: str
    task: str
    metric: str
    higher_is_better: bool
    levels: dict[str, float]
    solvers: dict[str, float] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)


class HarnessRow(Stored):
    """A task of lm-evaluation-harness that a study's models are scored on.

    Attributes:
        key: what its scores are called, ``METRIC@KEY``.
        task: label of the task of the study whose models they are.
        metric: that it is judged by; higher_is_better: of it.
    """

    key: str
    task: str
    metric: str
    higher_is_better: bool

    @property
    def score(self) -> str:
        """The metric as records know it."""
        return f"{self.metric}@{self.key}"


class CellRow(Stored):
    """A cell's place in a study: labels, its seed and its id."""

    variant: str
    task: str
    seed: int
    id: str

    @property
    def name(self) -> str:
        """The cell in words."""
        return f"{self.variant} {self.task} seed {self.seed}"


class Measure(Stored):
    """What a hypothesis is judged by on one task (its label).

    metric: on the test split, or one of ``bench.evaluate.targets``, of the metric ``of``; than_metric: that of the
    second variant, where it is another one; higher_is_better: of ``metric``; of_higher_is_better: of ``of``.
    """

    task: str
    metric: str
    than_metric: str | None = None
    higher_is_better: bool
    of: str | None = None
    of_higher_is_better: bool | None = None


class HypothesisRow(Stored):
    """A claim of a study, with the metric on every task that it is about; see ``bench.study.hypotheses.Hypothesis``.

    Attributes:
        kind: "same" claims that better and than differ by no more than within.
        within: a mean difference up to this, in the metric's unit, counts as none; None: that is not declared.
    """

    claim: str
    better: str
    than: str
    kind: Literal["better", "same"] = "better"
    task: str
    metric: str | None = None
    margin: float
    within: float | None = None
    measures: list[Measure]


class DecideRow(Stored):
    """How a study decides, as it was declared; see ``bench.study.decide.Decide``.

    Attributes:
        starts: the label whose cells a variant starts from, by the variant's label.
        changed: the looks, alpha or hypotheses were others when the first of the cells were run: what alpha promises
            does not hold.
    """

    looks: list[int]
    shares: list[float]
    alpha: float
    max_flops: float | None = None
    max_cells: int | None = None
    starts: dict[str, str] = Field(default_factory=dict)
    changed: bool = False


class DecisionRow(Stored):
    """Where a hypothesis stood when the manifest was written, for people: whoever needs it replays the results.

    pairs: of the look that decided it, else of the last look reached.
    """

    claim: str
    verdict: str
    pairs: int
    open: bool


class TrialRow(Stored):
    """A trial of the tuning. id: of its cell; value: its validation score, None if it failed."""

    id: str
    value: float | None

    @property
    def params(self) -> dict[str, Any]:
        """What was tried, by ``train.NAME`` and ``options.NAME``."""
        return self.model_extra or {}


class TuningRow(Stored):
    """What tuning has chosen for a variant on a task. value: the best trial's validation score."""

    variant: str
    task: str
    seed: int
    metric: str
    value: float
    chosen: dict[str, float]
    trials: list[TrialRow]


class Manifest(Stored):
    """What a study's last run consists of.

    Attributes:
        study: what the run is called: the study's name, and a digest behind it where ``--set`` has changed the study
            (``bench.study.naming``).
        changed: what differs from the study as it is written, in words.
        exit_rule: the one rule, by its key, whose points fronts may use beside exit points.
        git: the revision it was run at, None outside a checkout.
        lock: every installed distribution as ``name==version``.
        config: the study as it was given.
        tuning: empty where nothing was tuned.
        verdicts_at: with how many seeds verdicts on these hypotheses were given before seeds were added by hand.
        decide: of a study that adds seeds until its hypotheses are decided. Its cells are those of the looks so far:
            variants may have different numbers.
    """

    study: str
    changed: list[str] = Field(default_factory=list)
    question: str
    reference: str | None
    exit_rule: str | None = None
    seeds: list[int]
    variants: list[VariantRow]
    tasks: list[TaskRow]
    harness: list[HarnessRow] = Field(default_factory=list)
    hypotheses: list[HypothesisRow] = Field(default_factory=list)
    cells: list[CellRow]
    command: str
    git: str | None
    lock: list[str] = Field(default_factory=list)
    config: dict[str, Any]
    tuning: list[TuningRow] = Field(default_factory=list)
    verdicts_at: list[int] = Field(default_factory=list)
    decide: DecideRow | None = None
    decisions: list[DecisionRow] = Field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """What there is to know of the variants and of the tasks' data, with their labels."""
        of = [*((row.label, row.notes) for row in self.variants), *((row.label, row.notes) for row in self.tasks)]
        return [f"{label}: {note}" for label, notes in of for note in notes]

    @property
    def pilot(self) -> bool:
        """Whether all seeds are for choosing settings: no verdict is given."""
        return bool(self.seeds) and min(self.seeds) >= FIRST_PILOT

    @property
    def tested(self) -> bool:
        """Whether all seeds may be tested at once: none were added by what others showed, and they are no pilots."""
        return self.decide is None and not self.pilot


class TunedShares(Stored):
    """The best trial of a threshold search within a budget; see ``bench.sweep.thresholds.search``.

    Attributes:
        max_flops: the budget, FLOPs per token.
        share_of_full: the same as a share of those at full depth.
        shares: of the validation signals that say "leave".
        thresholds: [cell][exit point], None lets none leave.
        valid: mean scores over the cells, by name.
        test: the same on test data.
        single: on test data, of each cell's own best single threshold; None if some cell cannot keep the budget.
        test_by_seed: the metric of each cell.
    """

    max_flops: float
    share_of_full: float
    trial: int
    shares: list[float]
    thresholds: list[list[float | None]]
    valid: dict[str, float]
    test: dict[str, float]
    single: dict[str, float] | None
    test_by_seed: list[float]


class ThresholdRow(Stored):
    """A search of thresholds.

    Attributes:
        study: of Optuna.
        cells: ids.
        full_flops_per_token: at full depth.
        front: (validation metric, FLOPs per token) of trials.
    """

    study: str
    variant: str
    task: str
    rule: str
    per_cycle: bool
    metric: str
    cells: list[str]
    trials: int
    full_flops_per_token: float
    front: list[list[float]]
    tuned: list[TunedShares]


class BudgetTrial(Stored):
    """A trained trial of a budget search: its cell's id, what was tried by key, its costs and its scores."""

    trial: int
    id: str
    params: dict[str, Any]
    flops_per_token: float
    train_flops: float
    valid: float
    test: float


class BudgetRow(Stored):
    """A search of training budgets.

    Attributes:
        study: of Optuna.
        cells: ids of those that were trained to their end.
        front: the trials that no other beats in both metric and FLOPs on validation data.
        chosen: the best trial within the limit, None if there is none.
    """

    study: str
    variant: str
    task: str
    metric: str
    seed: int
    trials: int
    pruned: int
    failed: int
    refused: int
    cells: list[str]
    front: list[BudgetTrial]
    chosen: BudgetTrial | None


SearchRow = ThresholdRow | BudgetRow
"""What a search of a sweep has found."""


class SweepResult(Stored):
    """What a study's sweep has found.

    Attributes:
        study: what the sweep is called: as the run that it is of, with what ``--set`` has changed of the sweep.
        of: what that run is called; older results do not tell it, and are called like it.
        changed: what differs from the study as it is written, in words.
        max_flops: the limit, FLOPs per token.
        storage: the trials' database.
    """

    study: str
    of: str = ""
    changed: list[str] = Field(default_factory=list)
    question: str
    max_flops: float | None
    storage: str
    command: str
    git: str | None
    tasks: list[TaskRow]
    thresholds: list[ThresholdRow]
    budgets: list[BudgetRow]
    environment: list[Environment]
