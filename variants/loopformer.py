"""LoopFormer (Jeddi et al. 2026, arXiv 2602.11451): every cycle knows how far it has come and how far it goes.

Cycle i goes the way from t[i] to t[i] + d[i], all of n from 0 to 1; at test in equal steps of 1/n, so that their number
is elastic. It is conditioned on ``c = E_t(t[i]) + E_d(d[i])``, each an embedding of 256 sines and cosines and two
layers. Each branch is ``x + g f((1 + s) norm(x))``, with a block's g and s linear in silu(c) and zero at first. The
authors' code (github.com/armenjeddi/loopformer, models/loopformer.py) has the same, but fills the zeros again.

It is trained by a second pass of fewer, unequal steps, too: ``train.shortcut_loss``, 0.1 in the paper, which the name
``loopformer`` stands for in a study.

Choices: the norms are the family's, with parameters; leaving early is to stop on the way of n cycles.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from bench.config import ModelConfig
from bench.model.flops import Flops
from bench.model.parts import Adapter, Branch, Recurrence
from bench.model.schedule import Schedule, Step
from bench.model.variant import register
from bench.model.walk import Walk
from variants.bc import BasicCycling

WAVES = 256  # sines and cosines of a time
SCALE, GATE = {"attention": 0, "mlp": 1}, {"attention": 2, "mlp": 3}  # places among the four that a block has


class Timed(Recurrence):
    """Tells the scales and gates [B, L, 4, D] of a cycle's L blocks by its time and its step."""

    label = "conditioning"

    def __init__(self, model: ModelConfig, schedule: Schedule) -> None:
        super().__init__()
        wide, self.blocks = model.d_model, schedule.n_blocks
        self.wide = wide
        self.time, self.step = (
            nn.Sequential(nn.Linear(WAVES, wide), nn.SiLU(), nn.Linear(wide, wide)) for _ in range(2)
        )
        self.modulation = nn.Linear(wide, 4 * wide * self.blocks)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def common(self, cycle: int, state: Walk) -> Tensor:
        like, way = state.hidden, state.way or (1,) * state.schedule.n_cycles
        at = sum(way[:cycle]) / sum(way), way[cycle] / sum(way)
        when, far = (waves(value, like).expand(len(like), -1) for value in at)
        c = self.time(when) + self.step(far)
        return self.modulation(silu(c)).view(len(like), self.blocks, 4, self.wide)

    def cycle_flops(self, cycle: int, length: int) -> Flops:
        inner = 2 * self.wide * self.wide
        return Flops(matmul=2 * inner + 4 * inner * self.blocks, half=2 * 2 * WAVES * self.wide)


def waves(value: float, like: Tensor) -> Tensor:
    """Cosines and sines [1, 256] of a number at frequencies 1 to 1/10000, as a tensor of a kind."""
    frequency = torch.exp(-math.log(10000) * torch.arange(WAVES // 2, device=like.device) / (WAVES // 2))
    return torch.cat([(value * frequency).cos(), (value * frequency).sin()])[None].to(like.dtype)


class Modulated(Adapter):
    """Scales what the branches read and gates what they give."""

    def normed(self, step: Step, branch: Branch, x: Tensor, state: Walk) -> Tensor:
        return x if state.common is None else x * (1 + state.common[:, step.block, SCALE[branch], None])

    def scaled(self, step: Step, branch: Branch, update: Tensor, state: Walk) -> Tensor:
        return update if state.common is None else update * state.common[:, step.block, GATE[branch], None]


@register("loopformer")
class LoopFormer(BasicCycling):
    """LoopFormer: Basic Cycling whose cycles know their time and step, so that their number is elastic."""

    elastic = True

    def recurrence(self, model: ModelConfig, schedule: Schedule) -> Timed:
        return Timed(model, schedule)

    def adapter(self, model: ModelConfig, schedule: Schedule) -> Modulated:
        return Modulated()
