"""ALBERT's sharing of all parameters between layers (Lan et al. 2020, arXiv 1909.11942, section 3.1).

Its factorised embedding is not part of it here: embeddings are held equal between variants.
"""

from __future__ import annotations

from bench.config import ModelConfig
from bench.model.schedule import Schedule, build
from bench.model.variant import Variant, register


@register("albert")
class Albert(Variant):
    """ALBERT: one block for all steps, as many as Basic Cycling runs at the same shape.

    A cycle is n_blocks steps: against ``bc`` only the blocks of a cycle have become one, at equal depth, FLOPs and exit
    points. n_blocks therefore sets the depth and no parameters.
    """

    def schedule(self, model: ModelConfig) -> Schedule:
        ends = [model.n_blocks * (done + 1) for done in range(model.n_cycles)]
        return build([0] * ends[-1], exits=ends)
