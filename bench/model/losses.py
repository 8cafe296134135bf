"""Training losses that read every exit point: fixed weights, or the chances that a halting module gives.

With ``L_t`` the loss of a scored token at exit point t and ``p_t`` the chance that it halts there, the loss of a token
is ``sum_t p_t L_t`` plus a penalty times ``halting_weight``:

* ``gate_cdf`` (Ouro, arXiv 2510.25741): minus the entropy of p, so that no depth is forgotten before it is tried;
* ``pondernet`` (Banino et al. 2021, arXiv 2107.05407, section 2.3): KL(p || a geometric prior cut at the last cycle);
* ``act`` (Graves 2016, arXiv 1603.08983, section 2): the expected number of cycles.

With ``shortcut_loss`` w it is ``L + w L' + w mean (x - x')^2`` with the loss L' and the states x' of a second pass of
fewer cycles, x being kept as it is (LoopFormer, arXiv 2602.11451, and its authors' train.py).

Without halting the weights are 1 at full depth and ``exit_loss`` shared among the earlier exit points, divided by their
sum (as LayerSkip trains its layers' exits: Elhoushi et al. 2024, arXiv 2404.16710).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bench.config import IGNORED, Objective
from bench.errors import UserError

SMALL = 1e-8  # chances below it count as it in logarithms, whose gradient at 0 is infinite


class Predicted(Protocol):
    """What a pass predicts: ``bench.model.outcome.Outcome``, or what the Hugging Face model makes of it."""

    @property
    def logits(self) -> Tensor | None: ...
    @property
    def exit_logits(self) -> tuple[Tensor, ...] | None: ...
    @property
    def halting(self) -> tuple[Tensor, ...] | None: ...
    @property
    def auxiliary_loss(self) -> Tensor | None: ...
    @property
    def shortcut(self) -> tuple[Tensor, Tensor] | None: ...


def halting_chances(halted: Sequence[Tensor]) -> Tensor:
    """Chances [C, ...] of halting at exit point 1..C from those of having halted [...] by the first C - 1 of them: the
    last takes the remainder. With ``lambda_t`` that of halting at t once there: ``p_t = lambda_t prod_{j<t} (1 -
    lambda_j)``.
    """
    by_now = torch.stack([torch.zeros_like(halted[0]), *halted, torch.ones_like(halted[0])])
    return by_now.diff(dim=0)


def exit_losses(out: Predicted, targets: Tensor, config: Objective) -> tuple[Tensor, Tensor]:
    """The loss at full depth and the loss to be trained, both summed over the scored targets [B, T], nats.

    out: of a pass, with ``output_exits`` if ``config.trains_exits``. Raises UserError if nothing halts though the
    loss is to be weighed by halting.
    """
    assert out.logits is not None
    exits = out.exit_logits or (out.logits,)
    flat = targets.flatten()
    scored = flat != IGNORED
    losses = torch.stack(
        [cross_entropy(at.flatten(0, -2).float(), flat, ignore_index=IGNORED, reduction="none") for at in exits]
    )
    last = losses[-1].sum()
    if out.shortcut is not None:
        second = cross_entropy(out.shortcut[0].flatten(0, -2).float(), flat, ignore_index=IGNORED, reduction="sum")
        return last, last + config.shortcut_loss * second
    if len(exits) == 1:
        return last, last
    if config.halting_loss == "none":
        earlier = losses[:-1].sum() / (len(exits) - 1)
        return last, (last + config.exit_loss * earlier) / (1 + config.exit_loss)
    if out.halting is None:
        raise UserError(
            f"train.halting_loss: {config.halting_loss!r} needs something that halts (allowed: 'none', or "
            "model.halting = 'gate', or a variant that halts by itself)"
        )
    chances = halting_chances(out.halting).flatten(1)
    penalty = halting_penalty(chances, config).where(scored, 0.0).sum()  # the losses of the others are zero already
    return last, (chances * losses).sum() + config.halting_weight * penalty


def added_loss(out: Predicted, config: Objective) -> Tensor | None:
    """What is added to the loss of the targets, a scalar as of a whole batch: what the variant's own parts add, and how
    far the states of a second pass are from those of the first. None if nothing is.
    """
    if out.shortcut is None:
        return out.auxiliary_loss
    far = config.shortcut_loss * out.shortcut[1]
    return far if out.auxiliary_loss is None else far + out.auxiliary_loss


def short_way(n_cycles: int, draw: Callable[[int, int], int]) -> tuple[int, ...]:
    """The steps of a second pass, whole numbers that add up to the cycles of the first, 2 or more: their number is
    drawn from 1 to n_cycles - 1, then the length of each from those that leave the others at least 1 (LoopFormer's
    sampler, arXiv 2602.11451, in its authors' utils.py).

    draw: a whole number from the first to below the second, all of them alike.
    """
    way, left = list[int](), n_cycles
    for others in range(draw(1, n_cycles) - 1, 0, -1):
        way.append(draw(1, left - others + 1))
        left -= way[-1]
    return (*way, left)


def halting_penalty(chances: Tensor, config: Objective) -> Tensor:
    """Of every token [...], before its weight, from its chances [C, ...] of halting at exit point 1..C."""
    number = torch.arange(1, len(chances) + 1, device=chances.device, dtype=chances.dtype)
    number = number.view(-1, *[1] * (chances.dim() - 1))
    if config.halting_loss == "act":
        return (number * chances).sum(0)
    logs = chances.clamp_min(SMALL).log()
    if config.halting_loss == "gate_cdf":
        return (chances * logs).sum(0)
    prior = config.halting_prior * (1 - config.halting_prior) ** (number - 1)
    return (chances * (logs - (prior / prior.sum()).log())).sum(0)
