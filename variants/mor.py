"""Mixture-of-Recursions (Bae et al. 2025, arXiv 2507.10524, section 2.2): tokens get a number of cycles each.

The formulas are those of the authors' code. Attention in a cycle is among the tokens that are in it ("recursion-wise"
caching). Which past tokens those are is remembered in a slot of the KV cache for each cycle (8 bytes a token); keys and
values of all tokens are kept.

How many tokens are in a cycle when the model is tested depends on the text. A sequence that is run alone, without a
cache, is computed for these alone; in a batch, or with a cache, the others are computed too, and masked. The FLOPs of a
test are those of the tokens that are in.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot

from bench.config import LARGE, ModelConfig
from bench.model.flops import Flops
from bench.model.parts import Recurrence
from bench.model.schedule import Schedule
from bench.model.variant import register
from bench.model.walk import Walk, mean_of
from variants.htc import HeadTailCycling
from variants.relaxed import LowRank


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


class Router(Recurrence):
    """What both ways of routing have in common. alpha: scale of the gate; weight, z: of the losses."""

    label = "router"
    routes = True

    def __init__(self, model: ModelConfig, n_cycles: int, alpha: float, weight: float, z: float, ahead: bool) -> None:
        super().__init__()
        self.n_cycles, self.alpha, self.weight, self.z, self.ahead = n_cycles, alpha, weight, z, ahead
        self.width, self.chooses = model.d_model, not ahead

    def z_loss(self, logits: Tensor, real: Tensor | None) -> list[Tensor]:
        """``z mean(logsumexp(logits)^2)`` over the tokens, for logits [B, T, routes]; nothing where z is 0. real: as
        of ``mean_of``.
        """
        return [self.z * mean_of(logits.logsumexp(-1).square(), real)] if self.z else []

    def alone(self, state: Walk) -> bool:
        """Whether no other sequence's choice has to be waited for: a cycle may then run on its tokens alone."""
        return len(state.hidden) == 1 and not self.training and state.context.cache is None

    def run_on(self, index: Tensor, state: Walk) -> None:
        """Let the cycle run on the tokens index [B, k], in their order, alone."""
        state.memory["index"] = index
        state.hidden, state.embedded = take(state.hidden, index), take(state.embedded, index)
        state.context = state.context.at(index)


class ExpertChoice(Router):
    """Each cycle takes the best of the tokens the cycle before took, by a router of its own: ``x += g f(x)`` with
    ``g = alpha sigmoid(w.x)``.

    In training cycle c of N keeps the top ``max(1, floor((N - c) / N T))`` tokens of each sequence and runs on these
    alone. That choice looks ahead, so in a test a token is in where ``sigmoid(w.x) > 1/2``, which a binary
    cross-entropy teaches the router; ``ahead`` makes it the top tokens there, too, wherever all of the sequence is
    there to choose from: not with a cache, nor among padding.
    """

    def __init__(self, model: ModelConfig, n_cycles: int, alpha: float, weight: float, z: float, ahead: bool) -> None:
        super().__init__(model, n_cycles, alpha, weight, z, ahead)
        self.routers = nn.ModuleList(nn.Linear(model.d_model, 1, bias=False) for _ in range(n_cycles))

    def tokens(self, cycle: int, length: int) -> int:
        return max(1, max(1, self.n_cycles - cycle) * length // self.n_cycles)

    def enter(self, cycle: int, state: Walk) -> None:
        router, memory = self.routers[min(cycle, self.n_cycles - 1)], state.memory
        memory["before"] = whole = state.hidden
        best = (self.training or (self.ahead and state.context.visible is None)) and state.context.cache is None
        if not best and ("in" in memory if cycle else not self.alone(state)):
            logit = router(whole).squeeze(-1)
            memory["in"] = (logit > 0) & memory["in"] if cycle else logit > 0
            memory["gate"] = self.alpha * logit.sigmoid()
            keep_only(memory["in"], cycle, state)
            return
        candidates = take(whole, memory["index"]) if cycle else whole
        logits = router(candidates)
        logit = scores = logits.squeeze(-1)
        real = state.real
        if best and real is not None:  # padding comes last, and where it is in its gate is 0
            real = real.gather(1, memory["index"]) if cycle else real
            logit = logit.masked_fill(real == 0, -torch.inf)
        if best:
            chosen = logit.topk(self.tokens(cycle, whole.shape[1])).indices.sort(1).values
        else:
            chosen = (logit > 0).nonzero()[:, 1].unsqueeze(0)
        if self.training:
            target = torch.zeros_like(logit).scatter(1, chosen, 1.0)
            shares = None if real is None else real.numel() / real.sum() * real
            state.losses.append(self.weight * binary_cross_entropy_with_logits(scores, target, shares))
            state.losses += self.z_loss(logits, real)
        memory["gate"] = self.alpha * logit.gather(1, chosen).sigmoid()
        self.run_on(memory["index"].gather(1, chosen) if cycle else chosen, state)

    def leave(self, cycle: int, state: Walk) -> None:
        before, update = state.memory["before"], state.memory["gate"].unsqueeze(-1) * state.hidden
        if "index" not in state.memory:
            state.hidden = torch.where(state.memory["in"].unsqueeze(-1), before + update, before)
            state.active = None
            return
        index = state.memory["index"].unsqueeze(-1).expand_as(update)
        state.hidden = before.scatter(1, index, before.gather(1, index) + update)

    def ran(self, cycle: int, state: Walk) -> Tensor | None:
        inside, index = state.memory.get("in"), state.memory.get("index")
        if inside is not None:
            return inside.sum(1)
        assert index is not None
        return None if self.ahead or self.training else index.new_tensor([index.shape[1]])

    def cycle_flops(self, cycle: int, length: int) -> Flops:
        return self.chosen_flops(cycle, length, self.tokens(cycle - 1, length))

    def chosen_flops(self, cycle: int, length: int, before: int) -> Flops:
        return Flops(2 * self.width * (before if cycle else length))


class TokenChoice(Router):
    """Each token chooses its number of cycles d at the start, the argmax of a router's softmax p, and becomes
    ``x + alpha p_d f^d(x)``; a balance loss ``N sum_i mean(p_i) share_i`` keeps all numbers in use.

    In training all cycles are computed for all tokens, and those that are done are masked: the training FLOPs are the
    executed ones, and what skipping could save is not in them. (The paper's equation also scales the states between
    cycles by p; the authors' code does not.)
    """

    masks = True

    def __init__(self, model: ModelConfig, n_cycles: int, alpha: float, weight: float, z: float, ahead: bool) -> None:
        super().__init__(model, n_cycles, alpha, weight, z, ahead)
        self.router = nn.Linear(model.d_model, n_cycles, bias=False)

    def begin(self, state: Walk) -> None:
        logits = self.router(state.hidden)
        chances = logits.softmax(-1)
        best, choice = chances.max(-1)
        if self.training:
            share = mean_of(one_hot(choice, self.n_cycles).to(chances.dtype), state.real)
            state.losses.append(self.weight * self.n_cycles * (mean_of(chances, state.real) * share).sum())
            state.losses += self.z_loss(logits, state.real)
        state.memory |= {"before": state.hidden, "gate": self.alpha * best, "cycles": choice + 1}

    def enter(self, cycle: int, state: Walk) -> None:
        if not cycle:  # every token is in the first
            return
        inside = state.memory["cycles"] > cycle
        if self.alone(state):
            state.memory["whole"] = state.hidden
            self.run_on(inside.nonzero()[:, 1].unsqueeze(0), state)
        else:
            keep_only(inside, cycle, state)

    def leave(self, cycle: int, state: Walk) -> None:
        state.active = None
        if "whole" in state.memory:
            index = state.memory["index"].unsqueeze(-1).expand_as(state.hidden)
            state.hidden = state.memory.pop("whole").scatter(1, index, state.hidden)

    def ran(self, cycle: int, state: Walk) -> Tensor | None:
        return None if self.training else (state.memory["cycles"] > cycle).sum(1)

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
            z_loss: weight of the mean squared logsumexp of the router's logits, summed over the routers: 0 leaves it
                out, as the authors' code does unless told; with it they use 0.001 by default, and 1e-5 for ``token``.
            tested: how a cycle chooses tokens in a test, of ``expert``: those above a ``threshold``, as a model that
                generates has to, or the ``top`` ones of the sequence, as the authors' code does. The latter looks at
                tokens to come: its scores are not those of a language model.
            lora_rank: of low-rank updates of the shared blocks, different for each cycle, as ``relaxed`` has them
                (Bae et al. 2025, arXiv 2410.20672); 0: none.
        """

        routing: Literal["expert", "token"] = "expert"
        alpha: float | None = Field(None, gt=0.0, le=LARGE)
        weight: float | None = Field(None, ge=0.0, le=LARGE)
        z_loss: float = Field(0.0, ge=0.0, le=LARGE)
        tested: Literal["threshold", "top"] = "threshold"
        lora_rank: int = Field(0, ge=0, le=4096)

        @model_validator(mode="after")
        def _of_expert(self) -> MixtureOfRecursions.Options:
            if self.tested == "top" and self.routing != "expert":
                raise ValueError("tested = 'top' needs routing = 'expert'")
            return self

    @property
    def looks_ahead(self) -> bool:
        return self.options.tested == "top"

    def remembered(self, schedule: Schedule) -> tuple[int, ...]:
        """A flag as key and as value for every cycle; none for the first where the token chooses: all are in it."""
        first = 2 if self.options.routing == "expert" else 0
        return (first, *[2] * (schedule.n_cycles - 1))

    def adapter(self, model: ModelConfig, schedule: Schedule) -> LowRank | None:
        rank = self.options.lora_rank
        return LowRank(model, schedule.recurrent, rank) if rank else None

    def recurrence(self, model: ModelConfig, schedule: Schedule) -> Recurrence:
        chosen = self.options
        kind, alpha, weight = (ExpertChoice, 0.1, 0.001) if chosen.routing == "expert" else (TokenChoice, 1.0, 0.1)
        return kind(
            model,
            schedule.n_cycles,
            alpha if chosen.alpha is None else chosen.alpha,
            weight if chosen.weight is None else chosen.weight,
            chosen.z_loss,
            chosen.tested == "top",
        )
