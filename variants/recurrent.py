"""Prelude, recurrent core and coda with the input injected into every cycle (Geiping et al. 2025, arXiv 2502.05171).

With e the prelude's output and s[t] the state, a cycle runs on ``inject(s[t], e)``, for which the paper (section 3)
takes ``linear`` and finds ``add`` as good in small models. Choices: the paper's sandwich norms, the norm that ends its
core and the scale of its embeddings are left out, the block being the same for every variant; ``gate`` is a highway
(Srivastava et al. 2015, arXiv 1505.00387). Its random recurrence is training's ``random_cycles``, ``backward_cycles``.

``parcae`` is the injection of Parcae (arXiv 2604.12946; github.com/sandyresearch/parcae, modules/injection.py and
models/parcae): with a norm of e, per channel a decay below 1 for the state and a matrix for e, and a matrix C before
the coda. Its 2 + 2 + 2 blocks are ``n_prelude`` and ``n_coda``; its cycles are training's ``sequence_cycles`` and
``backward_cycles: 4`` at model.n_cycles 8. Choices: C is drawn as any matrix here; both matrices are without decay, as
in the authors' code.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, softplus

from bench.config import ModelConfig
from bench.model.blocks import make_norm
from bench.model.flops import Flops
from bench.model.parts import Recurrence
from bench.model.schedule import Schedule
from bench.model.variant import register
from bench.model.walk import Walk
from variants.htc import HeadTailCycling

Injection = Literal["add", "linear", "gate", "parcae"]
Start = Literal["noise", "noise at test too", "prelude"]
DECAY = math.sqrt(1 / 5)  # of the state in a cycle, which Parcae's starts from


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
        if self.start == "prelude":
            return
        # The embeddings' scale. Without training its mean, or one draw: what a model answers must not hang on another.
        std = (2 / (5 * self.width)) ** 0.5
        if self.training:
            state.hidden = std * torch.randn_like(prelude)
        elif self.start == "noise":
            state.hidden = torch.zeros_like(prelude)
        else:
            state.hidden = std * noise_at(state.positions, self.width).to(prelude).expand_as(prelude)

    def enter(self, cycle: int, state: Walk) -> None:
        own, injected = state.hidden, state.memory["injected"]
        if self.mix is None:
            state.advance(own + injected)
            return
        mixed = self.mix(torch.cat([own, injected], -1))
        state.advance(mixed if self.injection == "linear" else torch.lerp(injected, own, mixed.sigmoid().to(own.dtype)))

    def cycle_flops(self, cycle: int, length: int) -> Flops:
        return Flops() if self.mix is None else Flops(2 * length * 2 * self.width * self.width)


class Parcae(Injected):
    """Injects by ``exp(-D exp(A)) s + D (B norm(e))`` with ``D = softplus(b)`` for each channel; coda reads ``C s``."""

    def __init__(self, model: ModelConfig, start: Start) -> None:
        super().__init__(model, "add", start)
        wide = model.d_model
        self.norm = make_norm(model)
        self.log_rate, self.step = nn.Parameter(torch.empty(wide)), nn.Parameter(torch.empty(wide))
        self.into, self.out = nn.Parameter(torch.empty(wide, wide)), nn.Parameter(torch.empty(wide, wide))

    def reset_parameters(self) -> None:
        wanted = -math.log(DECAY)
        nn.init.zeros_(self.log_rate)
        nn.init.constant_(self.step, wanted + math.log(-math.expm1(-wanted)))  # whose softplus is what is wanted
        nn.init.eye_(self.into)
        nn.init.normal_(self.out, std=(2 / (5 * self.width)) ** 0.5)

    def begin(self, state: Walk) -> None:
        state.hidden = self.norm(state.hidden)
        super().begin(state)
        state.memory["injected"] = softplus(self.step) * linear(state.memory["injected"], self.into)

    def enter(self, cycle: int, state: Walk) -> None:
        decay = torch.exp(-softplus(self.step) * self.log_rate.exp())
        state.advance(decay * state.hidden + state.memory["injected"])

    def output(self, state: Walk) -> Tensor:
        return linear(state.hidden, self.out)

    def cycle_flops(self, cycle: int, length: int) -> Flops:
        return Flops() if cycle else self.output_flops(length)  # e is the same in every cycle, and B e with it

    def output_flops(self, length: int) -> Flops:
        return Flops(2 * length * self.width * self.width)


def noise_at(positions: Tensor, width: int) -> Tensor:
    """Standard normal numbers [B or 1, T, D] that a position [B or 1, T] has in every test."""
    last = int(positions.max())
    return torch.from_numpy(_noise(1 << last.bit_length(), width)).to(positions.device)[positions]


@lru_cache(maxsize=2)
def _noise(length: int, width: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """[length, width]; a longer table begins as a shorter one does."""
    return np.random.default_rng(0).standard_normal((length, width), dtype=np.float32)


@register("recurrent")
class Recurrent(HeadTailCycling):
    """Recurrent depth: the prelude's output is injected into every cycle."""

    class Options(HeadTailCycling.Options):
        """How the prelude's output gets into the cycles, and what they start from.

        Attributes:
            injection: how.
            start: of the state: ``noise`` in training and zero else; ``noise at test too``, as Geiping et al. publish
                it, but for each position always the same; or the ``prelude``'s output.
        """

        injection: Injection = "linear"
        start: Start = "noise"

    def recurrence(self, model: ModelConfig, schedule: Schedule) -> Injected:
        chosen = self.options
        if chosen.injection == "parcae":
            return Parcae(model, chosen.start)
        return Injected(model, chosen.injection, chosen.start)
