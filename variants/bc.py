"""Basic Cycling: the whole stack is run again and again (a baseline of arXiv 2502.12214)."""

from __future__ import annotations

from bench.config import ModelConfig
from bench.model.schedule import Schedule, cycle
from bench.model.variant import Variant, register


@register("bc")
class BasicCycling(Variant):
    """Basic Cycling: all blocks are cycled."""

    def schedule(self, model: ModelConfig) -> Schedule:
        return cycle(model.n_blocks, model.n_cycles)
