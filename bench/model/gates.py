"""Gates: what scales the updates of the cycled steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from bench.config import ModelConfig
from bench.model.parts import Branch, Flops, Gate, StepTable
from bench.schedule import Step

Gating = Literal["none", "attention", "scalar", "head", "channel", "token", "tanh"]
OPEN = 2.0  # logit a learned sigmoid starts from: sigmoid(2) = 0.88, nearly open and still in its sensitive range


class AttentionGate(Gate):
    """Scales the MLP's update of each token by ``1 - p0``, the zero attention averaged over heads, with its gradient.

    The attention's own update already carries that factor head by head, since the zero token's value is zero.
    """

    reads_zero_attention = True

    def merge(
        self, step: Step, branch: Branch, hidden: Tensor, update: Tensor, zero_attention: Tensor | None
    ) -> Tensor:
        if branch == "attention" or zero_attention is None:
            return hidden + update
        return torch.addcmul(hidden, update, 1 - zero_attention.mean(1).unsqueeze(-1))


class _LearnedGate(Gate):
    """A trained tensor for each gated step."""

    def __init__(self, steps: Sequence[Step], *shape: int, start: float = OPEN) -> None:
        super().__init__()
        self.rows = StepTable(steps)
        self.start = start
        self.logit = nn.Parameter(torch.empty(len(self.rows), *shape))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.logit, self.start)


class SigmoidGate(_LearnedGate):
    """Scales both updates of a step by a trained sigmoid: one number a step (shape (1,)) or one a channel ((D,))."""

    def merge(
        self, step: Step, branch: Branch, hidden: Tensor, update: Tensor, zero_attention: Tensor | None
    ) -> Tensor:
        if step not in self.rows:
            return hidden + update
        return torch.addcmul(hidden, update, self.logit[self.rows[step]].sigmoid())


class TanhGate(_LearnedGate):
    """Scales both updates of a step by a trained tanh that starts at zero: the step starts as the identity."""

    def __init__(self, steps: Sequence[Step]) -> None:
        super().__init__(steps, 1, start=0.0)

    def merge(
        self, step: Step, branch: Branch, hidden: Tensor, update: Tensor, zero_attention: Tensor | None
    ) -> Tensor:
        if step not in self.rows:
            return hidden + update
        return torch.addcmul(hidden, update, self.logit[self.rows[step]].tanh())


class HeadGate(_LearnedGate):
    """Scales each attention head's output of a step by a trained sigmoid; the MLP has no heads and stays ungated."""

    def __init__(self, steps: Sequence[Step], n_heads: int) -> None:
        super().__init__(steps, n_heads)

    def heads(self, step: Step, hidden: Tensor) -> Tensor | None:
        return self.logit[self.rows[step]].sigmoid() if step in self.rows else None


class TokenGate(Gate):
    """Scales both updates of a token by a sigmoid read from its hidden state by a small MLP.

    One MLP (D -> D/8 -> 1) serves all steps; a trained bias tells the steps apart.
    """

    def __init__(self, model: ModelConfig, steps: Sequence[Step]) -> None:
        super().__init__()
        self.rows = StepTable(steps)
        self.width = (model.d_model, max(1, model.d_model // 8))
        self.hidden = nn.Linear(*self.width, bias=False)
        self.out = nn.Linear(self.width[1], 1, bias=False)
        self.logit = nn.Parameter(torch.empty(len(self.rows)))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.logit, OPEN)

    def flops(self, step: Step, length: int) -> Flops:
        wide, narrow = self.width
        return Flops(2 * 2 * length * narrow * (wide + 1)) if step in self.rows else Flops()  # on both branches

    def merge(
        self, step: Step, branch: Branch, hidden: Tensor, update: Tensor, zero_attention: Tensor | None
    ) -> Tensor:
        if step not in self.rows:
            return hidden + update
        logit = self.out(nn.functional.gelu(self.hidden(hidden))) + self.logit[self.rows[step]]
        return torch.addcmul(hidden, update, logit.sigmoid())


def make_gate(gating: Gating, model: ModelConfig, steps: Sequence[Step]) -> Gate | None:
    """The gate named ``gating`` on the given steps, or None for ``none``."""
    match gating:
        case "none":
            return None
        case "attention":
            return AttentionGate()
        case "scalar":
            return SigmoidGate(steps, 1)
        case "channel":
            return SigmoidGate(steps, model.d_model)
        case "head":
            return HeadGate(steps, model.n_heads)
        case "token":
            return TokenGate(model, steps)
        case "tanh":
            return TanhGate(steps)
