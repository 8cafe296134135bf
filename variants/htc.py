"""Head-Tail Cycling: the first and last blocks run once, the middle is cycled (arXiv 2502.12214)."""

from __future__ import annotations

from pydantic import Field

from bench.config import ModelConfig, Strict
from bench.model.schedule import Schedule, middle_cycle
from bench.model.variant import Variant, register


@register("htc")
class HeadTailCycling(Variant):
    """Head-Tail Cycling: prelude and coda run once, the blocks between are cycled."""

    class Options(Strict):
        """n_prelude, n_coda: blocks that run once, before and after the cycled ones."""

        n_prelude: int = Field(1, ge=0, le=128)
        n_coda: int = Field(1, ge=0, le=128)

    def schedule(self, model: ModelConfig) -> Schedule:
        return middle_cycle(model.n_blocks, model.n_cycles, self.options.n_prelude, self.options.n_coda)
