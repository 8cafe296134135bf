"""Mixture-of-Recursions (Bae et al. 2025, arXiv 2507.10524, section 2.2): tokens get a number of cycles each.

The formulas are those of the authors' code. Attention in a cycle is among the tokens that are in it ("recursion-wise"
caching). Which past tokens those are is remembered in a slot of the KV cache for each cycle (8 bytes a token); keys and
values of all tokens are kept.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot

from bench.config import LARGE, ModelConfig
from bench.model.flops import Flops
from bench.model.parts import Recurrence
from bench.model.schedule import Schedule
from bench.model.variant import register
from bench.model.walk import Walk
from variants.htc import HeadTailCycling


def keep_only(flags: Tensor, cycle: int, state: Walk) -> None:
    """Let the cycle change and attend to the tokens flags [B, T] only, and to the past tokens that were in it."""
    state.active = flags if state.active is None else flags & state.active
    cache, seen = state.context.cache, state.active
    if cache is not None:
        stored = state.active[:, None, :, None].to(state.hidden.dtype)
        seen = cache.update(stored, stored, state.schedule.depth + cycle)[0][:, 0, : state.context.total, 0] > 0
    state.context = state.context.seeing(seen)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows index [B, k] of x [B, T, D]."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class ExpertChoice(Recurrence):
    """Each cycle takes the best of the tokens the cycle before took, by a router of its own: ``x += g f(x)`` with
    ``g = alpha sigmoid(w.x)``.

    In training cycle c of N keeps the top ``max(1, floor((N - c) / N T))`` tokens of each sequence and runs on these
    alone. That choice looks ahead, so without training a token is in where ``sigmoid(w.x) > 1/2``, which a binary
    cross-entropy teaches the router; then all tokens are computed, and those that are not in are masked. FLOPs are
    counted as in training: without it they are executed in full, and would come down to about these if skipped.
    """

    label = "router"

    def __init__(self, model: ModelConfig, n_cycles: int, alpha: float, weight: float) -> None:
        super().__init__()
        self.n_cycles, self.alpha, self.weight, self.width = n_cycles, alpha, weight, model.d_model
        self.routers = nn.ModuleList(nn.Linear(model.d_model, 1, bias=False) for _ in range(n_cycles))

    def tokens(self, cycle: int, length: int) -> int:
        return max(1, max(1, self.n_cycles - cycle) * length // self.n_cycles)

    def enter(self, cycle: int, state: Walk) -> None:
        router, memory = self.routers[min(cycle, self.n_cycles - 1)], state.memory
        memory["before"] = whole = state.hidden
        if not self.training or state.context.cache is not None:
            logit = router(whole).squeeze(-1)
            memory["in"] = (logit > 0) & memory["in"] if cycle else logit > 0
            memory["gate"] = self.alpha * logit.sigmoid()
            keep_only(memory["in"], cycle, state)
            return
        candidates = take(whole, memory["index"]) if cycle else whole
        logit = router(candidates).squeeze(-1)
        chosen = logit.topk(self.tokens(cycle, whole.shape[1])).indices.sort(1).values
        target = torch.zeros_like(logit).scatter(1, chosen, 1.0)
        state.losses.append(self.weight * binary_cross_entropy_with_logits(logit, target))
        memory["index"] = index = memory["index"].gather(1, chosen) if cycle else chosen
        memory["gate"] = self.alpha * logit.gather(1, chosen).sigmoid()
        state.hidden, state.embedded, state.context = (
            take(whole, index),
            take(state.embedded, index),
            state.context.at(index),
        )

    def leave(self, cycle: int, state: Walk) -> None:
        before, update = state.memory["before"], state.memory["gate"].unsqueeze(-1) * state.hidden
        if "index" not in state.memory:
            state.hidden = torch.where(state.memory["in"].unsqueeze(-1), before + update, before)
            state.active = None
            return
        index = state.memory["index"].unsqueeze(-1).expand_as(update)
        state.hidden = before.scatter(1, index, before.gather(1, index) + update)

    def cycle_flops(self, cycle: int, length: int) -> Flops:
        return Flops(2 * self.width * (self.tokens(cycle - 1, length) if cycle else length))


class TokenChoice(Recurrence):
    """Each token chooses its number of cycles d at the start, the argmax of a router's softmax p, and becomes
    ``x + alpha p_d f^d(x)``; a balance loss ``N sum_i mean(p_i) share_i`` keeps all numbers in use.

    All cycles are computed for all tokens, in training as well, and those that are done are masked: the FLOPs counted
    are the executed ones, and what skipping could save is not in them. (The paper's equation also scales the states
    between cycles by p; the authors' code does not.)
    """

    label = "router"

    def __init__(self, model: ModelConfig, n_cycles: int, alpha: float, weight: float) -> None:
        super().__init__()
        self.n_cycles, self.alpha, self.weight, self.width = n_cycles, alpha, weight, model.d_model
        self.router = nn.Linear(model.d_model, n_cycles, bias=False)

    def begin(self, state: Walk) -> None:
        chances = self.router(state.hidden).softmax(-1)
        best, choice = chances.max(-1)
        if self.training:
            share = one_hot(choice, self.n_cycles).to(chances.dtype).mean((0, 1))
            state.losses.append(self.weight * self.n_cycles * (chances.mean((0, 1)) * share).sum())
        state.memory |= {"before": state.hidden, "gate": self.alpha * best, "cycles": choice + 1}

    def enter(self, cycle: int, state: Walk) -> None:
        if cycle:  # every token is in the first
            keep_only(state.memory["cycles"] > cycle, cycle, state)

    def leave(self, cycle: int, state: Walk) -> None:
        state.active = None

    def output(self, state: Walk) -> Tensor:
        return state.memory["before"] + state.memory["gate"].unsqueeze(-1) * state.hidden

    def cycle_flops(self, cycle: int, length: int) -> Flops:
        return Flops() if cycle else Flops(2 * length * self.width * self.n_cycles)


@register("mor")
class MixtureOfRecursions(HeadTailCycling):
    """Mixture-of-Recursions: Head-Tail Cycling with a router that gives each token its number of cycles."""

    class Options(HeadTailCycling.Options):
        """How tokens get their cycles. The defaults are the values of the authors' code.

        Attributes:
            routing: ``expert`` (a cycle chooses tokens) or ``token`` (a token chooses its cycles).
            alpha: scale of the router's gate, by default 0.1 (expert) or 1 (token).
            weight: of the router's loss, by default 0.001 (expert: of predicting the choice) or 0.1 (token: of the
                balance).
        """

        routing: Literal["expert", "token"] = "expert"
        alpha: float | None = Field(None, gt=0.0, le=LARGE)
        weight: float | None = Field(None, ge=0.0, le=LARGE)

    def remembered(self, schedule: Schedule) -> tuple[int, ...]:
        """A flag as key and as value for every cycle; none for the first where the token chooses: all are in it."""
        first = 2 if self.options.routing == "expert" else 0
        return (first, *[2] * (schedule.n_cycles - 1))

    def recurrence(self, model: ModelConfig, schedule: Schedule) -> Recurrence:
        chosen = self.options
        kind, alpha, weight = (ExpertChoice, 0.1, 0.001) if chosen.routing == "expert" else (TokenChoice, 1.0, 0.1)
        return kind(
            model,
            schedule.n_cycles,
            alpha if chosen.alpha is None else chosen.alpha,
            weight if chosen.weight is None else chosen.weight,
        )
