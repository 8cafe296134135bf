"""Middle Sequence: the first and last blocks run once, each block between them again and again before the next
(the map of Bae et al. 2025, arXiv 2507.10524, section 2).
"""

from __future__ import annotations

from bench.config import ModelConfig
from bench.model.schedule import Schedule, middle_sequence
from bench.model.variant import register
from variants.htc import HeadTailCycling


@register("middle_sequence")
class MiddleSequence(HeadTailCycling):
    """Middle Sequence: prelude and coda once, every block between n_cycles times in a row; one exit point."""

    def schedule(self, model: ModelConfig) -> Schedule:
        return middle_sequence(model.n_blocks, model.n_cycles, self.options.n_prelude, self.options.n_coda)
