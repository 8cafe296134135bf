"""What is stored of a cell, as pydantic models: its result, its failure, and what was measured of its exits afterwards.

Scores are named ``loss``, ``accuracy`` and, for text, ``bits_per_byte``. Costs in FLOPs are per token unless their name
says otherwise. Keys that this version does not know are kept; a file that lacks what is required here is damaged. Small
on purpose: nothing here imports torch, so that reports and the state of a study are there at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, RootModel

from bench.config import Cell
from bench.errors import Fault


class Stored(BaseModel):
    """A part of a stored file. What has no default must be there; kinds of values are not converted."""

    model_config = ConfigDict(extra="allow", strict=True, defer_build=True)

    def dump(self) -> dict[str, Any]:
        """As it is stored: what was never given is left out, what is not known is kept."""
        return self.model_dump(by_alias=True, exclude_unset=True)

    def but(self, **changes: Any) -> Self:
        """A copy with other values, which are not validated."""
        return self.model_copy(update=changes)


class Configuration(Stored):
    """What a cell is, as its record tells it; see ``bench.config.Cell``."""

    variant: str = ""
    options: dict[str, Any] = {}
    model: dict[str, Any] = {}
    train: dict[str, Any] = {}
    task: str = ""
    task_options: dict[str, Any] = {}
    seed: int
    evaluation: dict[str, Any] = {}
    init: dict[str, Any] | None = None
    fingerprint: str

    @classmethod
    def of(cls, cell: Cell) -> Configuration:
        """The configuration of a cell."""
        return cls.model_validate(cell.model_dump(mode="json"))

    def cell(self) -> Cell:
        """The cell itself. Raises ValidationError if this version has no such cell."""
        return Cell.model_validate(self.dump())


class CostRecord(Stored):
    """What a cell's model costs; see ``bench.model.costs.Costs``. train_flops: executed, of the whole training."""

    length: int
    depth: int
    n_blocks: int
    params: int
    params_non_embedding: int
    forward_flops_per_token: float
    train_flops_per_token: float
    kv_bytes_per_token: int
    activation_bytes: int
    train_flops: float


class Added(Stored):
    """What one part of a variant adds to the same model without it."""

    params: int
    flops_per_token: float


class SliceScores(Stored):
    """Scores on a part of the test data.

    Attributes:
        accuracy: share of the targets that are right.
        exact_match: share of the sequences with every target right.
        n: sequences.
    """

    accuracy: float
    exact_match: float
    n: int


class HistoryEntry(Stored):
    """A validation during training. flops, seconds: of the training so far."""

    step: int
    tokens: int
    flops: float
    seconds: float
    lr: float
    train_loss: float
    valid_loss: float
    valid_accuracy: float
    valid_bits_per_byte: float | None = None

    def valid(self, metric: str) -> float:
        """The validation score of that name."""
        return float(getattr(self, f"valid_{metric}"))


class Point(Stored):
    """Test scores when all sequences leave after a cycle, or of the model run for so many cycles.

    Attributes:
        valid: validation scores by name, of an exit point; results stored before 0.2 have none.
    """

    cycles: int
    flops_per_token: float
    loss: float
    accuracy: float
    bits_per_byte: float | None = None
    valid: dict[str, float] = {}

    def score(self, metric: str) -> float:
        """The score of that name."""
        return float(getattr(self, metric))


class LoopPoint(Stored):
    """What a cycle does, as means over tokens; None for what is not finite. See ``bench.evaluate.loops``.

    Attributes:
        cycle: 1, 2, ...
        state_norm: of a token's state after it.
        relative_change: ``|h[t] - h[t-1]| / |h[t]|`` of a token's state.
        spectral_radius: of the cycle's map at the state that it begins with, estimated.
    """

    cycle: int
    state_norm: float | None
    relative_change: float | None
    spectral_radius: float | None


class TunedThreshold(Stored):
    """A threshold chosen on validation data for a budget; see ``bench.evaluate.record.rule_record``.

    Attributes:
        budget: share of the FLOPs at full depth.
        threshold: None lets none leave early.
        valid: scores by name, ``flops_per_token`` and ``mean_cycles`` among them.
        test: the same on test data.
        share: of the test sequences that leave after cycle 1, 2, ... C.
    """

    budget: float
    threshold: float | None
    valid: dict[str, float]
    test: dict[str, float]
    share: list[float]


class Calibration(Stored):
    """Means in tenths of the sequences at all exit points, by rising signal."""

    signal: list[float]
    accuracy: list[float]


class RuleRecord(Stored):
    """What is stored of an exit rule; see ``bench.evaluate.record.rule_record``.

    What a rule does not have (oracles are not tuned, most are not calibrated) is empty. The columns of the curve, by
    name, are long: what is in them is not checked.
    """

    leave: Literal["above", "below"]
    curve: dict[str, Any]
    gain: float
    area: float
    tuned: list[TunedThreshold] = []
    rank: list[float | None] = []
    calibration: Calibration | None = None


class Example(Stored):
    """A test picture that has left early, or not.

    Attributes:
        rule: key of the exit rule that lets it leave.
        cycle: after which it leaves, 1, 2, ...
        label: its class; right: whether it is told right there.
        shape: of its pixels, [H, W, C]; pixels: bytes, in base 64.
    """

    rule: str
    cycle: int
    label: str
    right: bool
    shape: list[int]
    pixels: str


class ExitsRecord(Stored):
    """Scores at the exit points, the last at full depth, and what every exit rule gives, by its key.

    examples: pictures by the cycle they leave after, of tasks that have some.
    """

    points: list[Point]
    rules: dict[str, RuleRecord]
    examples: list[Example] | None = None


class ZeroAttention(Stored):
    """Mean probability that a query gives to the zero tokens of a step. step: its depth; cycle: from 0."""

    step: int
    block: int
    cycle: int
    mean: float


class Timing(Stored):
    """When a cell began, in seconds since 1970, and what it took. seconds: with its tests."""

    started: float
    train_seconds: float
    seconds: float
    tokens_per_second: float


class Environment(Stored):
    """The machine and the versions that numbers were made with. threads: of the CPU, for one cell."""

    python: str
    torch: str
    transformers: str
    platform: str
    cpu: str
    device: str
    threads: int
    git: str | None


class ExecutionRow(Stored):
    """What really leaving early saved on a finished cell's test data; see ``bench.exits.clock.measure``."""

    rule: str
    granularity: Literal["sequence", "token"] = "sequence"
    threshold: float
    loss: float
    accuracy: float
    mean_cycles: float
    flops_per_token: float
    flops_saved: float
    time_saved: float
    time_saved_quartiles: list[float]
    rounds: int


class Executions(RootModel[dict[str, list[ExecutionRow]]]):
    """By rule: its key, followed by `` by token`` where tokens leave on their own."""

    def dump(self) -> dict[str, Any]:
        """As it is stored."""
        return self.model_dump(exclude_unset=True)


class HarnessScores(Stored):
    """What a finished cell's model scores on a task of lm-evaluation-harness.

    Attributes:
        of: a digest of the task, where it is one of the user's or of ours; empty for one of the harness's own.
        scores: by metric.
        errors: their standard errors, where the harness tells them.
        flops_per_token: executed, forward.
        samples: documents, None of a group of tasks.
        version: of the harness.
    """

    of: str
    scores: dict[str, float]
    errors: dict[str, float] = {}
    flops_per_token: float
    samples: int | None = None
    version: str


class HarnessFile(RootModel[dict[str, HarnessScores]]):
    """By the key that a study has for a task, and for a part of a group ``KEY/PART``."""

    def dump(self) -> dict[str, Any]:
        """As it is stored."""
        return self.model_dump(exclude_unset=True)


class Record(Stored):
    """A finished cell's result.

    Attributes:
        metrics: scores on the test split as ``test_NAME``, on a further one as ``test_NAME@SPLIT``.
        valid_metrics: at full depth on the validation split, as ``valid_NAME``; results stored before 0.2 have none.
        slices: by axis and label.
        exits: None with a single exit point.
        cycles: the model run for 1, 2, ... cycles.
        loops: its state over those cycles; empty where nothing is looped, and in results stored before 0.2.
        ran: where sequences decide on how many tokens a cycle runs: the mean share of the test split's tokens by cycle.
            Forward FLOPs are then of that split. None elsewhere, and before 0.2, which counts as in training.
        stacked: whether it was trained in a stack.
        settings: ``options`` and ``task_options`` of the cell with those at their defaults.
        code: digests of what it used that was registered by hand (``bench.plugins.digests``).
        former: ids that the cell had in earlier versions of the store.
        files: SHA-256 by path of what the cell has left beside: its traces and its model.
        execution, harness: executed exits, and scores on tasks of lm-evaluation-harness, from files of their own.
    """

    version: int | None = Field(None, alias="schema")
    status: Literal["done"]
    id: str
    cell: Configuration
    schedule: str = ""
    metrics: dict[str, float]
    valid_metrics: dict[str, float] = {}
    slices: dict[str, dict[str, SliceScores]]
    costs: CostRecord
    additions: dict[str, Added]
    history: list[HistoryEntry]
    exits: ExitsRecord | None
    cycles: list[Point]
    loops: list[LoopPoint] = []
    ran: list[float] | None = None
    zero_attention: list[ZeroAttention] | None
    timing: Timing
    environment: Environment
    stacked: bool = False
    settings: dict[str, dict[str, Any]] = {}
    code: dict[str, str] = {}
    former: list[str] = []
    files: dict[str, str] = {}
    execution: dict[str, list[ExecutionRow]] = {}
    harness: dict[str, HarnessScores] = {}

    @property
    def scores(self) -> dict[str, float]:
        """All scores on test data: ``metrics``, and those of the harness as ``test_METRIC@KEY``."""
        more = {f"test_{name}@{key}": value for key, of in self.harness.items() for name, value in of.scores.items()}
        return {**self.metrics, **more}

    def test(self, metric: str) -> float:
        """The score of that name on test data. Raises KeyError if there is none (yet)."""
        return self.scores[f"test_{metric}"]

    @property
    def other_mode(self) -> bool:
        """Whether it was computed in another mode, in a stack or alone, than its configuration says."""
        return self.stacked is not self.cell.train.get("stacked", self.stacked)


class Failure(Stored):
    """Why a cell has no result.

    Attributes:
        kind: ``cell`` if it would fail again (its loss is not finite, its code is wrong), ``environment`` if it may not
            (no memory, no room on the disk, a killed process), None where that was not told.
        at: seconds since 1970.
        traceback: where in the code; of a process that has died, the end of what it wrote; None where neither is known.
        settings, former: as of a result.
    """

    version: int | None = Field(None, alias="schema")
    status: Literal["failed"]
    id: str
    cell: Configuration
    reason: str
    kind: Fault | None = None
    at: float
    traceback: str | None = None
    environment: Environment
    settings: dict[str, dict[str, Any]] = {}
    former: list[str] = []


Outcome = Record | Failure
"""What became of a cell; ``status`` tells which."""


def configuration(record: Outcome) -> dict[str, Any]:
    """All that a cell is, with the options at their defaults, which its own configuration leaves out."""
    return {**record.cell.dump(), **record.settings}


def dotted(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A nested configuration by dotted keys."""
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from dotted(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner
