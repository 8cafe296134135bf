"""Making variants equal in parameters, FLOPs or depth to a reference, by changing their depth or width."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from bench.config import ModelConfig, parse
from bench.errors import UserError
from bench.model.costs import meta_model, non_embedding, pass_flops
from bench.model.schedule import TooDeepError
from bench.model.variant import Variant

Match = Literal["params", "flops", "depth"]
Measure = Callable[[ModelConfig], float]

TOLERANCE = 0.01
LIMITS = {"n_cycles": 512, "n_blocks": 512, "d_model": 16384, "d_ff": 131072}
UNITS = {"params": "non-embedding parameters", "flops": "forward FLOPs/token", "depth": "steps"}


def measure(kind: Match, variant: Variant, model: ModelConfig, vocab_size: int, length: int) -> float:
    """The quantity ``kind`` holds equal: non-embedding parameters, forward FLOPs per token, or effective depth."""
    if kind == "depth":
        return variant.schedule(model).depth
    lm = meta_model(variant, model, vocab_size, length)
    if kind == "params":
        return non_embedding(lm)
    return pass_flops(lm, length).forward / length


def solve(
    kind: Match, variant: Variant, model: ModelConfig, target: float, vocab_size: int, length: int
) -> tuple[ModelConfig, str]:
    """The nearest shape to ``model`` whose measure is within 1 % of the target (depth: equal), and what was chosen.

    What the variant is given is kept if it already fits; else the first of these changes that reaches the target is
    made: cycles (unless parameters are matched), blocks, width, MLP width, width and MLP width. Raises UserError if
    none does.
    """

    def value(shape: ModelConfig) -> float:
        return measure(kind, variant, shape, vocab_size, length)

    ways: list[tuple[str, ...]] = [("n_blocks",)]
    if kind != "depth":
        ways += [("d_model",), ("d_ff",), ("d_model", "d_ff")]
    if variant.cycled and kind != "params":
        ways.insert(0, ("n_cycles",))
    tolerance = 0.0 if kind == "depth" else TOLERANCE
    tried = []
    for fields in [(), *ways]:
        shape = model
        for field in fields:
            shape = _nearest(shape, field, value, target)
        found = _value_or_none(value, shape)
        if found is None or found == math.inf:
            continue
        off = found / target - 1
        if abs(off) <= tolerance:
            text = (
                ", ".join(f"{field} {_given(model, field)} -> {getattr(shape, field)}" for field in fields)
                or "as given"
            )
            return shape, f"{text} ({found:,.0f} {UNITS[kind]}, target {target:,.0f}, {off:+.2%})"
        tried.append((abs(off), f"{' and '.join(fields) or 'as given'} gives {found:,.0f}"))
    nearest = min(tried)[1] if tried else "no valid shape"
    raise UserError(
        f"match: {kind} of {variant.name} cannot come within {tolerance:.0%} of {target:,.0f} {UNITS[kind]} by "
        f"changing {' or '.join(' and '.join(fields) for fields in ways)} (nearest: {nearest})"
    )


def _given(model: ModelConfig, field: str) -> int:
    return model.ff if field == "d_ff" else getattr(model, field)


def _nearest(model: ModelConfig, field: str, value: Measure, target: float) -> ModelConfig:
    """The shape nearest the target by changing one field, on which every measure grows monotonically."""
    step = {"d_model": model.n_heads * (2 if model.family == "llama" else 1)}.get(field, 1)

    def shape(times: int) -> ModelConfig:
        return parse(ModelConfig, {**model.model_dump(), field: times * step}, "model")

    def sized(times: int) -> float:
        return value(shape(times))

    def below(times: int) -> bool:  # shapes too small to be valid count as below
        found = _value_or_none(sized, times)
        return found is None or found < target

    largest = LIMITS[field] // step
    high = 1
    while high < largest and below(high):
        high = min(2 * high, largest)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if below(middle) else (low, middle)
    near = {times: _value_or_none(sized, times) for times in (low, high) if times >= 1}
    known = {times: found for times, found in near.items() if found is not None and found < math.inf}
    return shape(min(known, key=lambda times: abs(known[times] - target))) if known else model


def _value_or_none(value: Callable[[Any], float], of: Any) -> float | None:
    """The measure of a shape; infinite of one that is too deep, None of one that cannot be otherwise."""
    try:
        return value(of)
    except TooDeepError:
        return math.inf
    except UserError:  # e.g. too few blocks for a prelude, a cycled middle and a coda
        return None
