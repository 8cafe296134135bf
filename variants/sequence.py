"""Sequence: each block is run again and again before the next (Takase & Kiyono 2021, arXiv 2104.06022, section 2)."""

from __future__ import annotations

from bench.config import ModelConfig
from bench.model.schedule import Schedule, sequence
from bench.model.variant import Variant, register


@register("sequence")
class Sequence(Variant):
    """Sequence: every block n_cycles times in a row; the shared part is passed once, so there is one exit point."""

    def schedule(self, model: ModelConfig) -> Schedule:
        return sequence(model.n_blocks, model.n_cycles)
