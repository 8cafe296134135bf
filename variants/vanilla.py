"""The ordinary transformer: the control every sharing scheme is held against."""

from __future__ import annotations

from bench.config import ModelConfig
from bench.model.schedule import Schedule, stack
from bench.model.variant import Variant, register


@register("vanilla")
class Vanilla(Variant):
    """Every block once, nothing shared."""

    cycled = False

    def schedule(self, model: ModelConfig) -> Schedule:
        return stack(model.n_blocks)
