"""Gated keys and values of the first cycle: the gated sliding-window attention of Parallel Loop Transformer (Wu et al.
2025, arXiv 2510.24824).

The whole stack is looped. The first cycle is plain; in later cycles t each head gives ``g Attn(q, K[1], V[1]) + (1 - g)
Attn_w(q, K[t], V[t])``, the second within a window of w = 64 tokens, with ``g = sigmoid(w_head . q + b)`` of the query
as it is scored, both zero at first. The same stands in the code of models built so (IQuest LoopCoder, in
github.com/ml-explore/mlx-lm, models/iquestloopcoder.py), which run two cycles and have a gate in each layer. The cache
holds the first cycle and a window of each later one.

Choices: a block's gate is the same in all later cycles. The shift by a token between cycles, by which they run at the
same time (cross-loop parallelism), is left out: it is for latency, and those models do without it. The window is
computed under a mask, and counted as it is computed, in full.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from bench.config import ModelConfig, Strict
from bench.model.flops import Flops
from bench.model.parts import Adapter, StepTable
from bench.model.schedule import Schedule, Step
from bench.model.variant import register
from variants.bc import BasicCycling


class FirstCycle(Adapter):
    """A gate for each head of every block that is run again."""

    label = "gate"

    def __init__(self, model: ModelConfig, steps: Sequence[Step], window: int) -> None:
        super().__init__()
        self.window, self.numbers = window, 2 * model.n_heads * model.head_dim
        self.rows = StepTable(steps, "block")
        self.weight = nn.Parameter(torch.empty(len(self.rows), model.n_heads, model.head_dim))
        self.bias = nn.Parameter(torch.empty(len(self.rows), model.n_heads))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def looks_back(self, step: Step) -> bool:
        return step.cycle > 0

    def first_share(self, step: Step, query: Tensor) -> Tensor:
        row = self.rows[step]
        scores = torch.einsum("bhtd,hd->bht", query, self.weight[row].to(query.dtype))
        return torch.sigmoid(scores + self.bias[row].unsqueeze(-1))

    def flops(self, step: Step, length: int) -> Flops:
        return Flops(length * self.numbers) if self.looks_back(step) else Flops()


@register("gated_kv")
class GatedFirstCycle(BasicCycling):
    """Gated first-cycle keys and values: later cycles read the first's, and their own within a window."""

    class Options(Strict):
        """window: tokens, its own included, of whose keys and values of this cycle a token sees."""

        window: int = Field(64, ge=2, le=1 << 20)

    def adapter(self, model: ModelConfig, schedule: Schedule) -> FirstCycle | None:
        return FirstCycle(model, schedule.recurrent, self.options.window)
