"""Gates: what scales the updates of the cycled steps.

A gate is a class decorated with ``@register("name")`` that is made from a model's shape and the steps it gates; a
variant that takes a gate by name, as ``ztt`` does, then takes it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from bench.config import ModelConfig
from bench.model.flops import Flops
from bench.model.parts import Branch, Gate, StepTable
from bench.model.schedule import Step
from bench.registry import Registry

NONE = "none"  # the name that stands for no gate
gates: Registry[type[Gate]] = Registry(
    "gate", "cyclebench.gates", "bench.model.gates", {NONE: "stands for no gate"}, Gate
)
register = gates.register


def gated(hidden: Tensor, update: Tensor, factor: Tensor) -> Tensor:
    """The stream [B, T, D] with its update times the factor. In mixed precision, where the stream has more bits than
    the update, the product is taken with those of the update: half of the memory moves.
    """
    if hidden.dtype == update.dtype:
        return torch.addcmul(hidden, update, factor)
    return hidden + update * factor.to(update.dtype)


def gate_names() -> list[str]:
    """What an option that chooses a gate may be: no gate, then all that are registered."""
    return [NONE, *gates.names()]


def _known(name: str) -> str:
    if name not in gate_names():
        raise ValueError(f"unknown gate {name!r} (allowed: {', '.join(gate_names())})")
    return name


Gating = Annotated[str, AfterValidator(_known)]
"""The type of an option that chooses a gate."""
OPEN = 2.0  # logit a learned sigmoid starts from: sigmoid(2) = 0.88, nearly open and still in its sensitive range


@register("attention")
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
        return gated(hidden, update, 1 - zero_attention.mean(1).unsqueeze(-1))


class _LearnedGate(Gate):
    """A trained tensor for each gated step."""

    start = OPEN

    def __init__(self, model: ModelConfig, steps: Sequence[Step], *shape: int) -> None:
        super().__init__(model, steps)
        self.rows = StepTable(steps)
        self.logit = nn.Parameter(torch.empty(len(self.rows), *shape))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.logit, self.start)


@register("scalar")
class ScalarGate(_LearnedGate):
    """Scales both updates of a step by a trained sigmoid, one number a step."""

    def __init__(self, model: ModelConfig, steps: Sequence[Step], size: int = 1) -> None:
        super().__init__(model, steps, size)

    def merge(
        self, step: Step, branch: Branch, hidden: Tensor, update: Tensor, zero_attention: Tensor | None
    ) -> Tensor:
        if step not in self.rows:
            return hidden + update
        return gated(hidden, update, self.logit[self.rows[step]].sigmoid())


@register("channel")
class ChannelGate(ScalarGate):
    """Scales both updates of a step by a trained sigmoid, one number a channel [D]."""

    def __init__(self, model: ModelConfig, steps: Sequence[Step]) -> None:
        super().__init__(model, steps, model.d_model)


@register("tanh")
class TanhGate(_LearnedGate):
    """Scales both updates of a step by a trained tanh that starts at zero: the step starts as the identity."""

    start = 0.0

    def __init__(self, model: ModelConfig, steps: Sequence[Step]) -> None:
        super().__init__(model, steps, 1)

    def merge(
        self, step: Step, branch: Branch, hidden: Tensor, update: Tensor, zero_attention: Tensor | None
    ) -> Tensor:
        if step not in self.rows:
            return hidden + update
        return gated(hidden, update, self.logit[self.rows[step]].tanh())


@register("head")
class HeadGate(_LearnedGate):
    """Scales each attention head's output of a step by a trained sigmoid; the MLP has no heads and stays ungated."""

    def __init__(self, model: ModelConfig, steps: Sequence[Step]) -> None:
        super().__init__(model, steps, model.n_heads)

    def heads(self, step: Step, hidden: Tensor) -> Tensor | None:
        return self.logit[self.rows[step]].sigmoid() if step in self.rows else None


@register("token")
class TokenGate(Gate):
    """Scales both updates of a token by a sigmoid read from its hidden state by a small MLP.

    One MLP (D -> D/8 -> 1) serves all steps; a trained bias tells the steps apart.
    """

    def __init__(self, model: ModelConfig, steps: Sequence[Step]) -> None:
        super().__init__(model, steps)
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
        return gated(hidden, update, logit.sigmoid())


def make_gate(gating: str, model: ModelConfig, steps: Sequence[Step]) -> Gate | None:
    """The gate of that name on the given steps, or None for ``none``. Raises UserError if there is no such gate."""
    return None if gating == NONE else gates.get(gating)(model, steps)
