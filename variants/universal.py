"""The Universal Transformer (Dehghani et al. 2019, arXiv 1807.03819) with adaptive computation time (Graves 2016, arXiv
1603.08983) for each token.

Choices: the block is pre-norm, as everywhere here; the halting probability is read from the state after the cycle
(Graves, equation 5), and the output is the mean-field state (equation 13), not the running interpolation of the
tensor2tensor code; sinusoids have the scale of the embeddings, whose ratio to them is one in the paper.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bench.config import LARGE, ModelConfig
from bench.model.flops import Flops
from bench.model.parts import Recurrence
from bench.model.schedule import Schedule
from bench.model.variant import register
from bench.model.walk import Walk, mean_of
from variants.bc import BasicCycling

Embedding = Literal["sinusoidal", "learned", "none"]
HALTING_BIAS = 1.0  # of the tensor2tensor code: a token starts by running for about two cycles


class CoordinateEmbedding(nn.Module):
    """What a cycle adds to its input. ``sinusoidal``: for position i, cycle t = 1, 2, ... and channels 2j, 2j + 1
    ``sin(i / 10000^(2j / D)) + sin(t / 10000^(2j / D))`` and the same of cosines (equations 6 and 7); ``learned``: a
    trained vector for each cycle, that of the last for cycles beyond the trained ones.
    """

    def __init__(self, n_cycles: int, width: int, kind: Embedding) -> None:
        super().__init__()
        self.width = width
        self.std = (2 / (5 * width)) ** 0.5
        self.cycle = nn.Parameter(torch.empty(n_cycles, width)) if kind == "learned" else None

    def forward(self, cycle: int, positions: Tensor) -> Tensor:
        """For positions [B or 1, T], broadcasting to [B, T, D]."""
        if self.cycle is not None:
            return self.cycle[min(cycle, len(self.cycle) - 1)]
        even = torch.arange(0, self.width, 2, device=positions.device, dtype=torch.float32)
        rate = 10000.0 ** (-even / self.width)
        where, when = positions[..., None] * rate, (cycle + 1) * rate
        waves = torch.stack([where.sin() + when.sin(), where.cos() + when.cos()], -1)
        return self.std * waves.flatten(-2)[..., : self.width]


class UniversalRecurrence(Recurrence):
    """Adds the coordinate embedding before a cycle; after it each token may halt.

    With ``p[n] = sigmoid(w.s[n] + b)`` after cycle n, a token halts at the first N with
    ``p[1] + .. + p[N] >= 1 - epsilon``, or at the last cycle. Its state is then frozen, and its output is
    ``sum_{n<N} p[n] s[n] + R s[N]`` with the remainder ``R = 1 - sum_{n<N} p[n]``. The loss gains ``cost`` times the
    mean of ``N + R``.
    """

    label = "halting"

    def __init__(
        self, model: ModelConfig, n_cycles: int, embedding: Embedding, halting: bool, epsilon: float, cost: float
    ) -> None:
        super().__init__()
        self.epsilon, self.cost, self.width = epsilon, cost, model.d_model
        self.embedding = None if embedding == "none" else CoordinateEmbedding(n_cycles, model.d_model, embedding)
        self.halt = nn.Linear(model.d_model, 1) if halting else None

    def reset_parameters(self) -> None:
        if self.embedding is not None and self.embedding.cycle is not None:
            nn.init.normal_(self.embedding.cycle, std=self.embedding.std)
        if self.halt is not None:
            nn.init.constant_(self.halt.bias, HALTING_BIAS)

    def begin(self, state: Walk) -> None:
        if self.halt is not None:
            nothing = torch.zeros_like(state.hidden[..., 0])
            state.memory |= {"halting": nothing, "ran": nothing, "remainder": nothing}
            state.memory["output"] = torch.zeros_like(state.hidden)

    def enter(self, cycle: int, state: Walk) -> None:
        if self.embedding is not None:
            state.advance(state.hidden + self.embedding(cycle, state.positions).to(state.hidden.dtype))

    def leave(self, cycle: int, state: Walk) -> None:
        if self.halt is None:
            return
        memory, before = state.memory, state.memory["halting"]
        running = before < 1
        total = before + self.halt(state.hidden).squeeze(-1).sigmoid().to(before.dtype)
        goes_on = running & (total < 1 - self.epsilon)
        after = total.where(goes_on, 1.0)
        memory["output"] = memory["output"] + (after - before).unsqueeze(-1) * state.hidden
        memory["halting"] = after
        memory["ran"] = memory["ran"] + running
        memory["remainder"] = (1 - before).where(running, memory["remainder"])
        state.active = goes_on if state.active is None else goes_on & state.active

    def end(self, state: Walk) -> None:
        if self.halt is not None and self.training and self.cost:
            state.losses.append(self.cost * mean_of(state.memory["ran"] + state.memory["remainder"], state.real))

    def output(self, state: Walk) -> Tensor:
        if self.halt is None:
            return state.hidden
        # A token that still runs has been given p[n] of its state: what is left of the remainder is added.
        return state.memory["output"] + (1 - state.memory["halting"]).unsqueeze(-1) * state.hidden

    def cycle_flops(self, cycle: int, length: int) -> Flops:
        return Flops() if self.halt is None else Flops(2 * length * self.width)


@register("universal")
class UniversalTransformer(BasicCycling):
    """Universal Transformer: Basic Cycling that knows its cycle and position and halts token by token."""

    class Options(BasicCycling.Options):
        """embedding: added before every cycle; halting: adaptive computation time, which stops a token when its
        remainder is below epsilon and adds cost times the expected number of cycles (and remainder) to the loss.

        All cycles are executed: a halted token is frozen and goes on serving keys and values.
        """

        embedding: Embedding = "sinusoidal"
        halting: bool = True
        epsilon: float = Field(0.001, gt=0.0, lt=1.0)
        cost: float = Field(0.01, ge=0.0, le=LARGE)

    def recurrence(self, model: ModelConfig, schedule: Schedule) -> UniversalRecurrence:
        chosen = self.options
        return UniversalRecurrence(
            model, schedule.n_cycles, chosen.embedding, chosen.halting, chosen.epsilon, chosen.cost
        )
