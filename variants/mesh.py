"""MeSH, memory as state highways (arXiv 2510.07739, section 3.2): cycles read their input from a memory of slots."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from bench.config import ModelConfig
from bench.model.flops import Flops
from bench.model.parts import Recurrence
from bench.model.schedule import Schedule
from bench.model.variant import register
from bench.model.walk import Walk
from variants.htc import HeadTailCycling


class SlotMemory(Recurrence):
    """B slots m [B, T, S, D] for each token, slot 0 holding its embedding at first and the others zero (equation 2).

    Cycle t runs on h[t] and gives f; routers of its own read from h[t] write and read weights, softmax over the slots
    (equation 3); then ``m_s += f write_s`` (equation 5) and ``h[t+1] = sum_s m_s read_s``. A transitional router does
    the same once for the prelude. Choices: it reads the embedding, the prelude's input, as the others read their
    cycle's input; cycles beyond the trained ones use the last router.
    """

    label = "memory"

    def __init__(self, model: ModelConfig, n_cycles: int, scratch: int) -> None:
        super().__init__()
        self.n_slots, self.width = n_cycles + 1 + scratch, model.d_model
        self.routers = nn.ModuleList(nn.Linear(model.d_model, 2 * self.n_slots) for _ in range(n_cycles + 1))

    def begin(self, state: Walk) -> None:
        slots = torch.zeros_like(state.embedded).unsqueeze(2).repeat(1, 1, self.n_slots - 1, 1)
        state.memory["slots"] = torch.cat([state.embedded.unsqueeze(2), slots], 2)
        state.memory["routes"] = self._routes(0, state.embedded)
        self._write_and_read(state)

    def enter(self, cycle: int, state: Walk) -> None:
        state.memory["routes"] = self._routes(min(cycle + 1, len(self.routers) - 1), state.hidden)

    def leave(self, cycle: int, state: Walk) -> None:
        self._write_and_read(state)

    def _routes(self, router: int, hidden: Tensor) -> Tensor:
        """Write and read weights [B, T, 2, S] of each token."""
        return self.routers[router](hidden).unflatten(-1, (2, self.n_slots)).softmax(-1).to(hidden.dtype)

    def _write_and_read(self, state: Walk) -> None:
        write, read = state.memory["routes"].unbind(2)
        slots = torch.addcmul(state.memory["slots"], state.hidden.unsqueeze(2), write.unsqueeze(3))
        state.memory["slots"] = slots
        state.advance((read.unsqueeze(2) @ slots).squeeze(2))

    def cycle_flops(self, cycle: int, length: int) -> Flops:
        route_and_read = 2 * length * self.width * 3 * self.n_slots
        return Flops(route_and_read * (2 if cycle == 0 else 1))


@register("mesh")
class Mesh(HeadTailCycling):
    """MeSH: Head-Tail Cycling whose state lives in a memory with step-wise write and read routers."""

    class Options(HeadTailCycling.Options):
        """scratch: slots beyond one for the prelude and one for each cycle (the paper's k = 2 gives n_cycles + 3)."""

        scratch: int = Field(2, ge=0, le=64)

    def recurrence(self, model: ModelConfig, schedule: Schedule) -> SlotMemory:
        return SlotMemory(model, schedule.n_cycles, self.options.scratch)
