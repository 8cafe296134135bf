"""Prelude, recurrent core and coda with the input injected into every cycle (Geiping et al. 2025, arXiv 2502.05171).

With e the prelude's output and s[t] the state, a cycle runs on ``inject(s[t], e)``, for which the paper (section 3)
takes ``linear`` and finds ``add`` as good in small models. Choices: the paper's sandwich norms, the norm that ends its
core and the scale of its embeddings are left out, the block being the same for every variant; ``gate`` is a highway
(Srivastava et al. 2015, arXiv 1505.00387). Its random recurrence is training's ``random_cycles``, ``backward_cycles``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from bench.config import ModelConfig
from bench.model.flops import Flops
from bench.model.parts import Recurrence
from bench.model.schedule import Schedule
from bench.model.variant import register
from bench.model.walk import Walk
from variants.htc import HeadTailCycling

Injection = Literal["add", "linear", "gate"]
Start = Literal["noise", "prelude"]


class Injected(Recurrence):
    """Injects the prelude's output e into the state s: ``s + e`` (add), ``A [s, e]`` (linear), or ``z s + (1 - z) e``
    with ``z = sigmoid(A [s, e] + b)`` for each channel (gate).
    """

    label = "injection"
    reinjects = True

    def __init__(self, model: ModelConfig, injection: Injection, start: Start) -> None:
        super().__init__()
        self.injection, self.start, self.width = injection, start, model.d_model
        learned = injection != "add"
        self.mix = nn.Linear(2 * model.d_model, model.d_model, bias=injection == "gate") if learned else None

    def begin(self, state: Walk) -> None:
        state.memory["injected"] = prelude = state.hidden
        if self.start == "noise":
            # The embeddings' scale. Without training its mean: what a model answers must not hang on a draw.
            std = (2 / (5 * self.width)) ** 0.5
            state.hidden = std * torch.randn_like(prelude) if self.training else torch.zeros_like(prelude)

    def enter(self, cycle: int, state: Walk) -> None:
        own, injected = state.hidden, state.memory["injected"]
        if self.mix is None:
            state.advance(own + injected)
            return
        mixed = self.mix(torch.cat([own, injected], -1))
        state.advance(mixed if self.injection == "linear" else torch.lerp(injected, own, mixed.sigmoid().to(own.dtype)))

    def cycle_flops(self, cycle: int, length: int) -> Flops:
        return Flops() if self.mix is None else Flops(2 * length * 2 * self.width * self.width)


@register("recurrent")
class Recurrent(HeadTailCycling):
    """Recurrent depth: the prelude's output is injected into every cycle."""

    class Options(HeadTailCycling.Options):
        """injection: how; start: of the state, ``noise`` in training and zero else, or the ``prelude``'s output."""

        injection: Injection = "linear"
        start: Start = "noise"

    def recurrence(self, model: ModelConfig, schedule: Schedule) -> Injected:
        return Injected(model, self.options.injection, self.options.start)
