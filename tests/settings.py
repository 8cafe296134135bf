"""One table of settings for the contract tests, made from the registry: a variant added later is in it by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import pytest
import torch

from bench.config import ModelConfig
from bench.errors import UserError
from bench.model.language_model import CycleForCausalLM, build_model
from bench.model.variant import Variant, get_variant, variants

VOCAB, LENGTH = 19, 12
FAMILIES = ("gpt2", "llama")
SCALED = "llama with scaled updates"
SHARED = "llama with keys of the first cycle"
MODES: dict[str, dict[str, Any]] = {  # what stands for that family with further fields
    SCALED: {"residual_scale": 1.5, "norm": "sandwich"},
    SHARED: {"kv": "first"},
}


def shape(variant: Variant, family: str, **changes: Any) -> ModelConfig:
    """A small shape with grouped-query attention where the family has it."""
    if family in MODES:
        family, changes = "llama", {**MODES[family], **changes}
    fields: dict[str, Any] = {"family": family, "d_model": 16, "n_heads": 4, "n_blocks": 4, "n_cycles": 3}
    if family == "llama":
        fields["n_kv_heads"] = 2
    if not variant.cycled:
        fields["n_cycles"] = 1
    return ModelConfig(**{**fields, **changes})


def _values(annotation: Any, default: Any) -> list[Any]:
    """Values of an option worth trying: all of a choice, both of a switch, a few numbers."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if annotation is bool:
        return [False, True]
    if annotation is int:
        return [default, 0, default + 1]
    if annotation == int | None:
        return [default, 2]
    return [default]


def option_settings(name: str) -> Iterator[dict[str, Any]]:
    """Every option value of a variant with the others at their defaults, the defaults first. A value that is refused
    there stands beside the first value of another option that lets it in, and is left out if none does.
    """
    fields = variants.get(name).Options.model_fields
    axes = {key: _values(field.annotation, field.default) for key, field in fields.items()}
    yield {}
    for key, field in fields.items():
        for value in axes[key]:
            beside = ({key: value, other: at} for other in axes if other != key for at in axes[other])
            allowed = (options for options in ({key: value}, *beside) if _accepted(name, options))
            if value != field.default and (options := next(allowed, None)):
                yield options


def _accepted(name: str, options: dict[str, Any]) -> bool:
    try:
        variant = get_variant(name, options)
        variant.schedule(shape(variant, "gpt2"))
    except UserError:
        return False
    return True


def _name(name: str, options: dict[str, Any]) -> str:
    return "-".join([name, *(f"{key}={value}" for key, value in options.items())])


DEFAULTS = [(name, {}) for name in variants.names()]
DEFAULT_ID = [name for name, _ in DEFAULTS]
# Both families for every variant; .ci/run tries one with scaled updates too, and the variant's options, on the family
# that asks more (grouped heads, rotary positions, SwiGLU).
EVERY = [
    pytest.param(
        *(name, options, family),
        id=f"{family}-{_name(name, options)}",
        marks=[pytest.mark.long] * (bool(options) or family == SCALED),
    )
    for name in variants.names()
    for options in option_settings(name)
    for family in ((*FAMILIES, SCALED) if not options else FAMILIES[-1:])
]


def make(
    name: str, options: dict[str, Any], family: str = "gpt2", perturb: bool = True, **changes: Any
) -> CycleForCausalLM:
    """A seeded model. perturb: every parameter is moved off its start, so that nothing hides behind a zero."""
    variant = get_variant(name, options)
    lm = build_model(variant, shape(variant, family, **changes), VOCAB, 64)
    lm.reset_parameters(0)
    if perturb:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return lm.eval()


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    """Random tokens [B, T]."""
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def halts(lm: CycleForCausalLM) -> bool:
    """Whether the variant halts by itself."""
    state = lm.embed(tokens())
    next(lm.cycles(state))
    return "halting" in state.memory


def pointers(lm: torch.nn.Module) -> list[list[int]]:
    """For every step of the schedule the addresses of its block's parameters."""
    return [[p.data_ptr() for p in lm.blocks[step.block].parameters()] for step in lm.schedule.steps]


def shares_as_scheduled(lm: CycleForCausalLM) -> bool:
    """Steps use the same storage exactly where the schedule names the same block, and no copy hides elsewhere."""
    found, steps = pointers(lm), lm.schedule.steps
    same = all((found[i] == found[j]) == (a.block == b.block) for i, a in enumerate(steps) for j, b in enumerate(steps))
    storages = [p.data_ptr() for p in lm.parameters()]
    return same and len(storages) == len(set(storages))
