"""What a study file says: a question, its variants, tasks, seeds and hypotheses."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import Field, PrivateAttr, field_validator, model_validator

from bench.config import CELL_SOURCE, FIRST_PILOT, LARGEST, EvalConfig, ModelConfig, Strict, TrainConfig, parse
from bench.errors import UserError, shown
from bench.model.variant import Variant, get_variant
from bench.study.decide import Decide, with_seeds
from bench.study.designs import expand
from bench.study.entries import TaskEntry, VariantEntry, check_distinct, check_reference, one_line
from bench.study.harness import HarnessEntry
from bench.study.hypotheses import ALL, Hypothesis, check_labels
from bench.study.naming import LONGEST_NAME, NAME, Change, name_of
from bench.study.searched import check_searches
from bench.study.sweep import Sweep

MOST_SEEDS = FIRST_PILOT
SEED_RANGE = r"^(\d+)-(\d+)$"
MOST_CELLS = 100_000
MOST_CLAIMS = 1000
Seed = Annotated[int, Field(ge=0, le=LARGEST)]
Rate = Annotated[float, Field(gt=0.0, le=10.0)]


class Tune(Strict):
    """Hyper-parameters are chosen before the seeds are run, on validation data.

    Every variant gets the same number of trials on every task.

    Attributes:
        trials: of a variant on a task.
        lr: the lowest and the highest peak learning rate, searched on a log scale. The options that a variant declares
            (``Variant.tunable``) are searched together with it.
        seed: of the trials' cells and of the sampler. It is none of the study's seeds: nothing is tuned on a seed that
            is reported.
    """

    trials: int = Field(8, ge=1, le=1000)
    lr: tuple[Rate, Rate] = (1e-4, 1e-2)
    seed: int = Field(1_000_000, ge=0, le=LARGEST)

    @field_validator("lr")
    @classmethod
    def _range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] < value[1] <= 10:
            raise ValueError("must be [low, high] with 0 < low < high <= 10")
        return value


class Study(Strict):
    """A question, the cells that answer it (variants x tasks x seeds), and what they have in common.

    Attributes:
        name: of its results, report and tracking.
        question: what it is to answer; shown on its report.
        imports: Python files that register what the study names (variants, tasks, rules, gates, figures).
        reference: the label of the variant that others are compared with, and matched to.
        init: what every variant starts from. It is a source that ``cyclebench convert`` takes, or ``cell:LABEL``. The
            latter is the trained model of another variant, for the same task and seed. LABEL is that variant's label.
            It must itself be trained from scratch.
        model: shape of all models, see ModelConfig.
        train: training of all models, see TrainConfig.
        evaluation: how trained models are tested, see EvalConfig.
        tasks: what models are trained and judged on; names, or entries as in TaskEntry.
        variants: what is compared; names, or entries as in VariantEntry.
        seeds: a list, a range such as 100-149 (both ends with it), or a number n, which means 0 to n - 1. Those from
            10,000 on are pilots. A study with ``decide`` leaves it out: it may use 0 to its last look, in order. Run on
            pilots, it takes all of them and decides nothing.
        harness: tasks of lm-evaluation-harness that finished models are scored on.
        exit_rule: key of the one exit rule whose thresholds, tuned on validation data, fronts may use beside the exit
            points; for all variants, or for none if one of them does not have it. By default there are exit points
            alone.
        hypotheses: claims that the report answers, see Hypothesis.
        tune: hyper-parameters are chosen before the seeds are run, see Tune.
        decide: seeds are added until the hypotheses are decided, see Decide.
        sweep: what ``cyclebench sweep`` searches, see Sweep.
    """

    name: str = Field(pattern=f"^{NAME}$", max_length=LONGEST_NAME)
    question: str
    imports: tuple[str, ...] = ()
    reference: str | None = None
    init: str | None = None
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvalConfig = EvalConfig()
    tasks: tuple[TaskEntry, ...] = Field(min_length=1)
    variants: tuple[VariantEntry, ...] = Field(min_length=1)
    seeds: tuple[Seed, ...] = Field(min_length=1, max_length=MOST_SEEDS)
    harness: tuple[HarnessEntry, ...] = ()
    hypotheses: tuple[Hypothesis, ...] = Field((), max_length=MOST_CLAIMS)
    exit_rule: str | None = None
    tune: Tune | None = None
    decide: Decide | None = None
    sweep: Sweep | None = None
    _changes: tuple[Change, ...] = PrivateAttr(())
    _written: str = PrivateAttr("")  # its name before these changes

    @model_validator(mode="before")
    @classmethod
    def _seeds_of_looks(cls, value: Any) -> Any:
        return with_seeds(value) if isinstance(value, dict) and value.get("decide") is not None else value

    @field_validator("tasks", "variants")
    @classmethod
    def _designs(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        return expand(value)

    @field_validator("seeds", mode="before")
    @classmethod
    def _seeds(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            value = f"0-{value - 1}"
        if not isinstance(value, list | tuple):
            ends = re.match(SEED_RANGE, value) if isinstance(value, str) else None
            first, last = map(int, ends.groups()) if ends else (0, -1)
            if not 1 <= last - first + 1 <= MOST_SEEDS:
                raise ValueError(f"must be a number from 1 to {MOST_SEEDS}, a range such as 100-149, or a list")
            return tuple(range(first, last + 1))
        return value

    @field_validator("question")
    @classmethod
    def _question(cls, value: str) -> str:
        return one_line(value)

    @field_validator("exit_rule")
    @classmethod
    def _rule(cls, value: str | None) -> str | None:
        if value is None:
            return None
        from bench.evaluate.rules import get_rule  # start-up

        try:
            return get_rule(value).key
        except UserError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {shown(list(self.seeds))} must be different")
        cells = len(self.variants) * len(self.tasks) * len(self.seeds)
        if cells > MOST_CELLS:
            raise ValueError(
                f"{len(self.variants)} variants on {len(self.tasks)} tasks with {len(self.seeds)} seeds are {cells:,} "
                f"cells (allowed: up to {MOST_CELLS:,})"
            )
        if self.decide is not None:
            self.decide.check(self.seeds, len(self.hypotheses))
        if self.tune is not None and self.tune.seed in self.seeds:
            raise ValueError(
                f"tune.seed = {self.tune.seed} must be none of the seeds that are reported: {shown(list(self.seeds))}"
            )
        if min(self.seeds) < FIRST_PILOT <= max(self.seeds):
            raise ValueError(
                f"seeds = {shown(list(self.seeds))} must be all below {FIRST_PILOT:,}, or all pilots, from there on"
            )
        if self.sweep is not None and self.sweep.budgets is not None and self.sweep.budgets.seed in self.seeds:
            raise ValueError(
                f"sweep.budgets.seed = {self.sweep.budgets.seed} must be none of the seeds that are reported: "
                f"{shown(list(self.seeds))}"
            )
        check_distinct("tasks", self.tasks)
        check_distinct("variants", self.variants)
        check_reference(self.reference, self.variants)
        labels = [entry.label for entry in self.variants]
        for field, taken in (("tasks", [t.label for t in self.tasks]), ("harness", [t.key for t in self.harness])):
            if ALL in taken:
                raise ValueError(f"{field}: the label {ALL!r} stands for all tasks together; give the task another one")
        if both := sorted({t.label for t in self.tasks} & {t.key for t in self.harness}):
            raise ValueError(f"tasks: the label {both[0]!r} is that of a task of harness; give the task another one")
        try:
            tasks = [*(entry.label for entry in self.tasks), *(entry.key for entry in self.harness)]
            check_labels(self.hypotheses, labels, tasks)
        except UserError as error:
            raise ValueError(str(error)) from None
        check_searches(self.tune is not None, self.sweep, self.tasks, self.variants)
        for entry in self.variants:
            init = self.init_of(entry)
            if init is not None and init.startswith(CELL_SOURCE) and self._starting(init) is None:
                raise ValueError(f"init = {init!r} must name a variant that does not start from a cell itself")
            if init is not None and entry.match is not None:
                raise ValueError(f"{entry.label}: match = {entry.match!r} cannot reshape a pretrained model")
            if init is None and entry.sharing is not None:
                raise ValueError(f"{entry.label}: sharing = {entry.sharing!r} needs init, whose blocks are shared")
        return self

    @property
    def pilot(self) -> bool:
        """Whether the seeds are for choosing settings: they are never mixed with others, and decide nothing."""
        return min(self.seeds) >= FIRST_PILOT

    @property
    def decides(self) -> bool:
        """Whether seeds are added until the hypotheses are decided: not on pilots."""
        return self.decide is not None and not self.pilot

    def as_changed(self, changes: tuple[Change, ...]) -> Study:
        """The study under the name that it has with these changes to what is written."""
        found = self.model_copy()
        found._changes, found._written = changes, self.name
        return found.model_copy(update={"name": name_of(self.name, found._of_cells)})

    @property
    def _of_cells(self) -> list[Change]:
        """Changes to more than the sweep, which looks at a study and changes nothing of it."""
        return [change for change in self._changes if change.key.split(".")[0] != "sweep"]

    @property
    def changed(self) -> list[str]:
        """What ``--set`` has made another than it is written, in words; nothing of the sweep."""
        return [str(change) for change in self._of_cells]

    @property
    def sweep_name(self) -> str:
        """What the study's sweep is called, with what has been changed of the sweep itself."""
        return name_of(self._written or self.name, self._changes)

    @property
    def sweep_changed(self) -> list[str]:
        """``changed``, with what has been changed of the sweep itself."""
        return [str(change) for change in self._changes]

    def init_of(self, entry: VariantEntry) -> str | None:
        """What the entry's models start from; None: random weights."""
        return entry.init or (None if self.init == f"{CELL_SOURCE}{entry.label}" else self.init)

    def _starting(self, init: str) -> VariantEntry | None:
        """The entry that ``cell:LABEL`` names. None if there is none, or if it starts from a cell itself."""
        named = next((entry for entry in self.variants if f"{CELL_SOURCE}{entry.label}" == init), None)
        start = self.init_of(named) if named is not None else None
        return None if start is not None and start.startswith(CELL_SOURCE) else named

    def init_entry(self, entry: VariantEntry) -> VariantEntry | None:
        """The entry whose trained models this entry starts from. None if it starts from something else."""
        init = self.init_of(entry)
        return self._starting(init) if init is not None and init.startswith(CELL_SOURCE) else None

    def variant(self, entry: VariantEntry) -> Variant:
        """The entry's variant with its options."""
        return get_variant(entry.name, entry.options, self.init_of(entry) is not None, entry.sharing is not None)

    def cell_model(self, variant: VariantEntry, task: TaskEntry) -> ModelConfig:
        """The shape of a cell: the study's, changed by the task, then by the variant."""
        return _merge(self.model, "model", variant, task)

    def cell_train(self, variant: VariantEntry, task: TaskEntry) -> TrainConfig:
        """The training of a cell: the study's, changed by the task, then by the variant."""
        return _merge(self.train, "train", variant, task)


def _merge(base: Any, field: str, variant: VariantEntry, task: TaskEntry) -> Any:
    changes = {**getattr(task, field), **getattr(variant, field)}
    where = f"variants.{variant.label}.{field}" if getattr(variant, field) else f"tasks.{task.label}.{field}"
    return parse(type(base), {**base.model_dump(), **changes}, where if changes else field)
