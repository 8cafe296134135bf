"""Anchored cycles: ``h[t+1] = f(h[t]) + h[0]``, or the embedded tokens (arXiv 2510.07739, section 3.1)."""

from __future__ import annotations

from typing import Literal

from bench.config import ModelConfig
from bench.model.schedule import Schedule
from bench.model.variant import register
from variants.htc import HeadTailCycling
from variants.residual import AddedContext


@register("anchor")
class Anchor(HeadTailCycling):
    """Anchor: Head-Tail Cycling that adds the first cycle's input, or the embedding, to what every cycle gives."""

    class Options(HeadTailCycling.Options):
        """to: the ``prelude``'s output h[0] (anchor), or the ``embedding`` (anchor*)."""

        to: Literal["prelude", "embedding"] = "prelude"

    def recurrence(self, model: ModelConfig, schedule: Schedule) -> AddedContext:
        return AddedContext("anchor" if self.options.to == "prelude" else "anchor*")
