"""Context added to the cycles' output: ``h[t+1] = f(h[t]) + context`` (arXiv 2510.07739, section 3.1, equation 1)."""

from __future__ import annotations

from typing import Literal

from bench.config import ModelConfig
from bench.model.parts import Recurrence
from bench.model.schedule import Schedule
from bench.model.variant import register
from bench.model.walk import Walk
from variants.htc import HeadTailCycling

Source = Literal["residual", "anchor", "anchor*"]


class AddedContext(Recurrence):
    """Adds to what a cycle makes of its input h[t] that input (``residual``), the first cycle's input h[0]
    (``anchor``), or the embedded tokens (``anchor*``).
    """

    label = "context"

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.source, self.reinjects = source, source == "anchor"

    def enter(self, cycle: int, state: Walk) -> None:
        if self.source == "residual" or cycle == 0:
            state.memory["context"] = state.embedded if self.source == "anchor*" else state.hidden

    def leave(self, cycle: int, state: Walk) -> None:
        state.advance(state.hidden + state.memory["context"])


@register("residual")
class Residual(HeadTailCycling):
    """Residual: Head-Tail Cycling that adds a cycle's input to what it gives."""

    def recurrence(self, model: ModelConfig, schedule: Schedule) -> AddedContext:
        return AddedContext("residual")
