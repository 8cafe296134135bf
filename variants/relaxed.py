"""Relaxed Recursive Transformers (Bae et al. 2025, arXiv 2410.20672): shared blocks with a low-rank update of their own
for every cycle, ``h = W x + B A x`` (section 2.3).

Without a pretrained model A starts random and B zero (Hu et al. 2022, arXiv 2106.09685). Where a pretrained stack of L
blocks is shared among fewer, the update of a step starts from the residual between the block that stood where it runs
and the shared one, cut to its rank: ``U S V = SVD(W_l - W)``, ``B = U S``, ``A = V`` (section 2.3).

Choices: the matrices of queries, keys and values, and of Llama's gate and up projection, which are one matrix here,
share one A. A block's norms and biases are shared as well, so what they lack is made up for too: a norm's scale is part
of the matrix that reads it, and in family gpt2 each step gets biases of its own. At full rank the model is its source.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import linear as project

from bench.config import LARGE, ModelConfig
from bench.model.flops import Flops
from bench.model.parts import Adapter, Linear, StepTable
from bench.model.schedule import Schedule, Step
from bench.model.variant import register
from variants.htc import HeadTailCycling


class LowRank(Adapter):
    """Low-rank updates B A of all four linear layers of a block, different for each of the given steps.

    scale: of the updates, None for 1; recovers: start from what sharing has taken from a pretrained stack.
    """

    linears = ("qkv", "attention_out", "mlp_up", "mlp_out")

    def __init__(
        self, model: ModelConfig, steps: Sequence[Step], rank: int, scale: float | None = None, recovers: bool = False
    ) -> None:
        super().__init__()
        self.rank, self.scale, self.recovers = rank, scale, recovers
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
        own = {name: torch.empty(rows, out) for name, (_, out) in sizes.items()}
        self.bias = nn.ParameterDict(own) if recovers and model.family == "gpt2" else None

    def reset_parameters(self) -> None:
        for down in self.a.values():
            nn.init.uniform_(down, -(down.shape[-1] ** -0.5), down.shape[-1] ** -0.5)
        for up in self.b.values():
            nn.init.zeros_(up)
        for bias in [] if self.bias is None else self.bias.values():
            nn.init.zeros_(bias)

    def delta(self, step: Step, linear: Linear, x: Tensor) -> Tensor | None:
        if step not in self.rows:
            return None
        row = self.rows[step]
        down = project(x, self.a[linear][row])
        if self.scale is not None:
            down = down * self.scale
        return project(down, self.b[linear][row], None if self.bias is None else self.bias[linear][row])

    @torch.no_grad()
    def recover(self, step: Step, linear: Linear, weight: Tensor, bias: Tensor | None) -> None:
        row = self.rows[step]
        left, strength, right = torch.linalg.svd(weight.double(), full_matrices=False)
        kept = min(self.rank, len(strength))
        self.a[linear][row, :kept] = right[:kept]
        self.b[linear][row, :, :kept] = (left * strength)[:, :kept] / (1.0 if self.scale is None else self.scale)
        if self.bias is not None and bias is not None:
            self.bias[linear][row] = bias

    def delta_flops(self, step: Step, linear: Linear, length: int) -> Flops:
        return Flops(length * self.flops_per_token[linear]) if step in self.rows else Flops()


@register("relaxed")
class RelaxedRecursive(HeadTailCycling):
    """Relaxed recursion: cycled blocks with a low-rank update for each cycle."""

    # Without sharing every block is its own first use, which lacks nothing.
    shared_options: ClassVar[dict[str, Any]] = {"start": "svd"}

    class Options(HeadTailCycling.Options):
        """Prelude and coda are empty as in the paper, hence the whole stack is cycled.

        Attributes:
            rank: of the updates.
            alpha: they are scaled by alpha / rank, as LoRA's; None: not at all.
            start: where a pretrained stack is shared among fewer blocks: ``svd``, from what a step lacks of the block
                that stood there, or ``zero``.
        """

        n_prelude: int = Field(0, ge=0, le=128)
        n_coda: int = Field(0, ge=0, le=128)
        rank: int = Field(8, ge=1, le=4096)
        alpha: float | None = Field(None, gt=0.0, le=LARGE)
        start: Literal["zero", "svd"] = "zero"

    def adapter(self, model: ModelConfig, schedule: Schedule) -> LowRank:
        chosen = self.options
        scale = None if chosen.alpha is None else chosen.alpha / chosen.rank
        return LowRank(model, schedule.recurrent, chosen.rank, scale, chosen.start == "svd")
