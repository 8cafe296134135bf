"""The Fully Looped Transformer (arXiv 2605.18797; github.com/FuRuF-11/FullyLoopedTransformer, nanochat/gpt.py, FLT).

Every cycle of the whole stack starts again from the normed embeddings, and what the cycle before has made, h, is told
to every layer by its attention: queries come from h, keys and values from the stream of this cycle. The first cycle
has no h and is an ordinary stack. The norms of embeddings and of h have no parameters, as in the authors' code; they
are the family's (there: RMSNorm). Choices: the block is the suite's, whose norm before attention is applied to h as
well; the authors' gates, query norms and squared ReLU are no part of the idea and left out.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from bench.config import ModelConfig
from bench.model.parts import Adapter, Recurrence
from bench.model.schedule import Schedule, Step
from bench.model.variant import register
from bench.model.walk import Walk
from variants.bc import BasicCycling

LAST = "last cycle"  # of a walk's memory: the normed state [B, T, D] that the cycle before has left


class Restarted(Recurrence):
    """Starts every cycle from the normed embeddings and remembers what it leaves, normed."""

    label = "restart"
    reinjects = True

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.layer_norm, self.eps = model.family == "gpt2", model.norm_eps

    def norm(self, x: Tensor) -> Tensor:
        """Without parameters, over the last dimension."""
        kind = layer_norm if self.layer_norm else rms_norm
        return kind(x, x.shape[-1:], eps=self.eps)

    def begin(self, state: Walk) -> None:
        state.memory["start"] = self.norm(state.hidden)

    def enter(self, cycle: int, state: Walk) -> None:
        if cycle:
            state.memory[LAST] = self.norm(state.hidden)
        state.advance(state.memory["start"])


class QueriesOfTheLastCycle(Adapter):
    """Makes a step's queries of what the cycle before has left."""

    def asks(self, step: Step, state: Walk) -> Tensor | None:
        return state.memory.get(LAST)


@register("fully_looped")
class FullyLooped(BasicCycling):
    """Fully Looped Transformer: every cycle starts again from the embeddings and asks with what the last one made."""

    def recurrence(self, model: ModelConfig, schedule: Schedule) -> Restarted:
        return Restarted(model)

    def adapter(self, model: ModelConfig, schedule: Schedule) -> QueriesOfTheLastCycle:
        return QueriesOfTheLastCycle()
