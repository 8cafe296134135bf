"""What the ``sweep`` of a study file says."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from bench.config import ModelConfig, Strict, TrainConfig
from bench.errors import unknown

FIELDS = {"model": ModelConfig.model_fields, "train": TrainConfig.model_fields}


class Range(Strict):
    """Numbers from low to high, both included: whole ones if both are whole; step: between them; log: evenly spread
    over their logarithm.
    """

    low: int | float
    high: int | float
    step: int | float | None = Field(None, gt=0)
    log: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Range:
        if self.low > self.high:
            raise ValueError(f"low = {self.low} must not be above high = {self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log needs low above 0 and no step")
        return self


class ThresholdSweep(Strict):
    """Exit thresholds of the study's trained cells.

    Attributes:
        trials: for every rule, variant and task.
        rules: their keys, none for all that the traces have.
        per_cycle: a threshold for each exit point instead of one for all.
    """

    trials: int = Field(300, ge=1, le=1_000_000)
    rules: tuple[str, ...] = ()
    per_cycle: bool = False


class BudgetSweep(Strict):
    """Shapes and training budgets, each trial a cell.

    Attributes:
        trials: trained for every variant and task.
        ranges: by dotted key (``model.d_model``, ``train.steps``, ``options.NAME``), a range or a list of values; what
            a variant does not have is left out for it.
        prune: stop a trial that cannot be expected to be on the front.
        seed: of the cells, none of the study's own, so that what is reported of those was not chosen by its luck.
    """

    trials: int = Field(16, ge=1, le=100_000)
    ranges: dict[str, Range | list[Any]] = Field(min_length=1)
    prune: bool = True
    seed: int = Field(1_000_000, ge=0)

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
            if isinstance(values, list) and not values:
                raise ValueError(f"{key}: needs at least one value, not []")
        return value


class Sweep(Strict):
    """max_flops: executed forward FLOPs per token that may not be exceeded; None: no such limit, the best within each
    of several shares of the FLOPs at full depth is told; seed: of the samplers.
    """

    max_flops: float | None = Field(None, gt=0)
    thresholds: ThresholdSweep | None = None
    budgets: BudgetSweep | None = None
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _something(self) -> Sweep:
        if self.thresholds is None and self.budgets is None:
            raise ValueError("needs thresholds, budgets or both")
        return self
