"""Which exit rules a model can be left by, known before it is trained."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.config import ModelConfig
from bench.errors import UserError
from bench.evaluate.rules import ORACLES, Rule, SignalWatch, all_rules, named, rules
from bench.model.forms import blank
from bench.model.network import Network
from bench.model.variant import Variant


@torch.no_grad()
def usable_rules(variant: Variant, model: ModelConfig) -> list[str]:
    """The keys of the rules that models of a variant and a shape have; none with a single exit point.

    A model of the same kind, as narrow as can be, is looked at after its first cycle: what a model shows to rules does
    not depend on its width.
    """
    narrow = model.model_copy(update={"d_model": 2 * model.n_heads, "d_ff": 2})
    if variant.schedule(narrow).n_cycles < 2:
        return []
    lm = Network(variant, narrow, 2, 2).eval()
    lm.reset_parameters(0)  # what memory happens to hold may be no number
    state, watch = lm.embed(blank(model.form, 1, 2)[0], with_mass=True), SignalWatch(all_rules())
    _, signals = watch.look(lm, state, next(lm.cycles(state)))
    for rule in outside_rules():
        if (signal := signals.get(rule.key)) is not None:
            _try(rule, signal)
    return [*sorted(signals), *ORACLES]


@torch.no_grad()
def check_usable(lm: Network, rule: Rule, n_cycles: int | None) -> None:
    """Raises UserError if a model, at a number of cycles, cannot be left by a rule: before anything is generated."""
    state = lm.embed(
        blank(lm.model_shape.form, 1, 2, lm.device)[0], with_mass=rule.reads_zero_attention, n_cycles=n_cycles
    )
    if state.schedule.n_cycles == 1:
        raise UserError(f"exit rule {rule.key!r} with a single cycle, after which all leave (allowed: none)")
    if rule.key not in SignalWatch([rule]).look(lm, state, next(lm.cycles(state)))[1]:
        raise unusable(lm, rule)


def unusable(lm: Network, rule: Rule) -> UserError:
    """The error for a rule that reads what a model does not show."""
    return UserError(f"exit rule {rule.key!r} cannot be used with this {lm.variant.name!r} model")


def outside_rules() -> list[Rule]:
    """Every rule that does not come with the suite: every cell reads it, so that it had better be tried before."""
    return [rule for rule in all_rules() if type(rule).__module__ != rules.builtin]


def _try(rule: Rule, signal: Tensor) -> None:
    """Raises RuntimeError, with its name, for a rule whose signal [1, T] is of no use."""
    with named(rule):
        pooled = rule.pool(signal)
        if tuple(pooled.shape) != (1,):
            raise ValueError(f"it pools the signals of 1 sequence into the shape {tuple(pooled.shape)} (allowed: (1,))")
        if pooled.isnan().any():
            raise ValueError("its signal is NaN")
        rule.leaves(pooled, 0.0)
