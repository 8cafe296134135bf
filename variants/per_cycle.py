"""Head-Tail Cycling whose blocks have scales, norms and biases of their own in every cycle: what is cheap to leave
unshared is not shared.

No single paper states it: layer norms of their own for every use of shared layers are common among looped models. All
of it is a choice of ours: each of the three is per step, that is per block and cycle; they start such that the model is
Head-Tail Cycling; cycles beyond the trained ones take what the last trained one has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from bench.config import ModelConfig
from bench.model.parts import Adapter, Branch, StepTable
from bench.model.schedule import Schedule, Step
from bench.model.variant import register
from bench.model.walk import Walk
from variants.htc import HeadTailCycling

Scale = Literal["none", "scalar", "channel"]
BRANCHES: tuple[Branch, ...] = ("attention", "mlp")


class PerCycle(Adapter):
    """Of every given step its own: bias ``hidden + b``, norms ``(1 + g) norm(hidden) + c`` for both branches (c where
    the family's norms have a bias) and scales ``s f(.)`` of both updates.
    """

    def __init__(self, model: ModelConfig, steps: Sequence[Step], norm: bool, scale: Scale, bias: bool) -> None:
        super().__init__()
        self.rows = StepTable(steps)

        def tables(wanted: bool, width: int) -> nn.ParameterDict | None:
            of = {branch: torch.empty(len(self.rows), width) for branch in BRANCHES}
            return nn.ParameterDict(of) if wanted else None

        self.gain = tables(norm, model.d_model)
        self.shift = tables(norm and model.family == "gpt2", model.d_model)
        self.scale = tables(scale != "none", model.d_model if scale == "channel" else 1)
        self.bias = nn.Parameter(torch.empty(len(self.rows), model.d_model)) if bias else None

    def reset_parameters(self) -> None:
        for table, start in ((self.gain, 0.0), (self.shift, 0.0), (self.scale, 1.0)):
            for parameter in () if table is None else table.values():
                nn.init.constant_(parameter, start)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, step: Step, hidden: Tensor, embedded: Tensor) -> Tensor:
        return hidden if self.bias is None or step not in self.rows else hidden + self.bias[self.rows[step]]

    def normed(self, step: Step, branch: Branch, x: Tensor, state: Walk) -> Tensor:
        if self.gain is None or step not in self.rows:
            return x
        row = self.rows[step]
        x = torch.addcmul(x, x, self.gain[branch][row])
        return x if self.shift is None else x + self.shift[branch][row]

    def scaled(self, step: Step, branch: Branch, update: Tensor, state: Walk) -> Tensor:
        return update if self.scale is None or step not in self.rows else update * self.scale[branch][self.rows[step]]


@register("per_cycle")
class PerCycleParameters(HeadTailCycling):
    """Head-Tail Cycling with norms and scales of its own in every cycle."""

    class Options(HeadTailCycling.Options):
        """What each cycle of a block has of its own.

        Attributes:
            cycle_norm: weights (and biases) of both norms.
            cycle_scale: factors of both updates, one for all channels (``scalar``) or one for each.
            cycle_bias: a vector added to the block's input, as a cycle embedding is.
        """

        cycle_norm: bool = True
        cycle_scale: Scale = "channel"
        cycle_bias: bool = False

    def adapter(self, model: ModelConfig, schedule: Schedule) -> PerCycle:
        chosen = self.options
        return PerCycle(model, schedule.recurrent, chosen.cycle_norm, chosen.cycle_scale, chosen.cycle_bias)
