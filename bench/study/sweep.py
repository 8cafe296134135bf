"""What the ``sweep`` of a study file says."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from bench.config import LARGE, LARGEST, ModelConfig, Strict, TrainConfig
from bench.errors import unknown

Number = Annotated[int, Field(ge=-LARGEST, le=LARGEST)] | Annotated[float, Field(ge=-LARGE, le=LARGE)]
ALIKE = (("train", "device"), ("train", "precision"), ("model", "flops"))
"""Fields that all cells of a study have alike: else what differs by them would be taken for what variants differ by."""
FIELDS = {"model": ModelConfig.model_fields, "train": TrainConfig.model_fields}


class Range(Strict):
    """Numbers from low to high, both included. If both are whole numbers, so are the values.

    Attributes:
        low, high: the two ends.
        step: the distance from one value to the next; None: any value.
        log: the values are spread evenly over their logarithm.
    """

    low: Number
    high: Number
    step: Number | None = None
    log: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Range:
        if self.low > self.high:
            raise ValueError(f"low = {self.low} must not be above high = {self.high}")
        if self.step is not None and self.step <= 0:
            raise ValueError(f"step = {self.step} must be above 0")
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        if whole and not isinstance(self.step or 1, int):
            raise ValueError(f"step = {self.step} must be whole between whole numbers")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log needs low above 0 and no step")
        return self


class ThresholdSweep(Strict):
    """Exit thresholds of the study's trained cells.

    Attributes:
        trials: tried for every rule, variant and task.
        rules: keys of the rules; empty: all that the traces have.
        per_cycle: each exit point has a threshold of its own, instead of one for all.
    """

    trials: int = Field(300, ge=1, le=1_000_000)
    rules: tuple[str, ...] = ()
    per_cycle: bool = False


class BudgetSweep(Strict):
    """Shapes and training budgets. Each trial is a cell that is trained.

    Attributes:
        trials: trained for every variant and task.
        ranges: what is tried for a dotted key (``model.d_model``, ``train.steps``, ``options.NAME``): a range, or a
            list of values. A key that a variant does not have is left out for that variant.
        prune: stop a trial early if its result is not expected to be on the front.
        seed: of the trials' cells. It is none of the study's seeds: those are reported, and a setting must not be
            chosen because one of them was lucky.
    """

    trials: int = Field(16, ge=1, le=100_000)
    ranges: dict[str, Range | list[Any]] = Field(min_length=1)
    prune: bool = True
    seed: int = Field(1_000_000, ge=0, le=LARGEST)

    @field_validator("ranges")
    @classmethod
    def _keys(cls, value: dict[str, Range | list[Any]]) -> dict[str, Range | list[Any]]:
        for key, values in value.items():
            group, _, name = key.partition(".")
            if group not in ("model", "train", "options") or not name:
                raise ValueError(f"{key!r} must be model.NAME, train.NAME or options.NAME")
            known = FIELDS.get(group)
            if known is not None and name not in known:
                raise ValueError(str(unknown(f"key of {group}", name, known)))
            if (group, name) in ALIKE:
                raise ValueError(f"{key!r} must be the same for all cells of a study, and cannot be searched")
            if isinstance(values, list) and not values:
                raise ValueError(f"{key}: needs at least one value, not []")
        return value


class Sweep(Strict):
    """What is searched, and within which limit.

    Attributes:
        max_flops: the most forward FLOPs per token that a chosen setting may execute. None: no limit; then the best
            setting is told for several shares of the FLOPs at full depth.
        thresholds: the search for exit thresholds, if any.
        budgets: the search for shapes and training budgets, if any.
        seed: of the samplers that propose trials.
    """

    max_flops: float | None = Field(None, gt=0, le=LARGE)
    thresholds: ThresholdSweep | None = None
    budgets: BudgetSweep | None = None
    seed: int = Field(0, ge=0, le=LARGEST)

    @model_validator(mode="after")
    def _something(self) -> Sweep:
        if self.thresholds is None and self.budgets is None:
            raise ValueError("needs thresholds, budgets or both")
        return self
