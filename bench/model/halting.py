"""Learned halting for any cycled variant: after every cycle each token has a chance of being done."""

from __future__ import annotations

import torch
from torch import nn

from bench.errors import UserError
from bench.model.flops import Flops
from bench.model.parts import Part
from bench.model.walk import Walk


class HaltingGate(Part):
    """One linear head on the state: ``lambda_t = sigmoid(w h_t + b)`` is the chance of halting after cycle t, given
    that the token has come so far (PonderNet: Banino et al. 2021, arXiv 2107.05407, section 2; Ouro, arXiv 2510.25741).

    It keeps ``1 - prod_{j <= t} (1 - lambda_j)``, the chance of having halted by then, in ``state.memory["halting"]``.
    The last cycle takes what remains: there the gate does not run and the chance is 1.
    """

    label = "halting"

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d_model, 1)

    def forward(self, cycle: int, state: Walk) -> None:
        """Called after cycle 0, 1, ... Raises UserError if the variant halts by itself."""
        if cycle == 0 and "halting" in state.memory:
            raise UserError("model.halting: 'gate' with a variant that halts by itself (allowed: 'none')")
        if cycle + 1 == state.schedule.n_cycles:
            state.memory["halting"] = torch.ones_like(state.hidden[..., 0])
            return
        # 1 - lambda = sigmoid(-x), without the cancellation.
        going_on = torch.sigmoid(-self.linear(state.hidden).squeeze(-1).float())
        if "halting" in state.memory:
            going_on = going_on * (1 - state.memory["halting"])
        state.memory["halting"] = 1 - going_on

    def cycle_flops(self, length: int) -> Flops:
        """Forward FLOPs after every cycle but the last, for one sequence."""
        return Flops(2 * length * self.linear.in_features)
