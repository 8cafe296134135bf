"""Relaxed Recursive Transformers (Bae et al. 2025, arXiv 2410.20672): shared blocks with a low-rank update of their own
for every cycle, ``h = W x + B A x`` (section 2.3), A random and B zero at the start (Hu et al. 2022, arXiv 2106.09685).

Choices: the update is not scaled (LoRA's alpha / r is 1), and the matrices of queries, keys and values, and of Llama's
gate and up projection, which are one matrix here, share one A.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import linear as project

from bench.config import ModelConfig
from bench.model.flops import Flops
from bench.model.parts import Adapter, Linear, StepTable
from bench.model.schedule import Schedule, Step
from bench.model.variant import register
from variants.htc import HeadTailCycling


class LowRank(Adapter):
    """Low-rank updates B A of all four linear layers of a block, different for each of the given steps."""

    linears = ("qkv", "attention_out", "mlp_up", "mlp_out")

    def __init__(self, model: ModelConfig, steps: Sequence[Step], rank: int) -> None:
        super().__init__()
        d, kv, ups = model.d_model, model.kv_heads * model.head_dim, 1 if model.family == "gpt2" else 2
        sizes = {
            "qkv": (d, d + 2 * kv),
            "attention_out": (d, d),
            "mlp_up": (d, ups * model.ff),
            "mlp_out": (model.ff, d),
        }
        self.rows = StepTable(steps)
        self.flops_per_token = {name: 2 * rank * (wide + out) for name, (wide, out) in sizes.items()}
        rows = len(self.rows)
        self.a = nn.ParameterDict({name: torch.empty(rows, rank, wide) for name, (wide, _) in sizes.items()})
        self.b = nn.ParameterDict({name: torch.empty(rows, out, rank) for name, (_, out) in sizes.items()})

    def reset_parameters(self) -> None:
        for down in self.a.values():
            nn.init.uniform_(down, -(down.shape[-1] ** -0.5), down.shape[-1] ** -0.5)
        for up in self.b.values():
            nn.init.zeros_(up)

    def delta(self, step: Step, linear: Linear, x: Tensor) -> Tensor | None:
        if step not in self.rows:
            return None
        row = self.rows[step]
        return project(project(x, self.a[linear][row]), self.b[linear][row])

    def delta_flops(self, step: Step, linear: Linear, length: int) -> Flops:
        return Flops(length * self.flops_per_token[linear]) if step in self.rows else Flops()


@register("relaxed")
class RelaxedRecursive(HeadTailCycling):
    """Relaxed recursion: cycled blocks with a low-rank update for each cycle."""

    class Options(HeadTailCycling.Options):
        """rank: of the updates; prelude and coda are empty as in the paper, hence the whole stack is cycled."""

        n_prelude: int = Field(0, ge=0, le=128)
        n_coda: int = Field(0, ge=0, le=128)
        rank: int = Field(8, ge=1, le=4096)

    def adapter(self, model: ModelConfig, schedule: Schedule) -> LowRank:
        return LowRank(model, schedule.recurrent, self.options.rank)
