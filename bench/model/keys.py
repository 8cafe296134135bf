"""Keys and values that the cycles of a block share: where they are kept in a pass and in the cache.

``own``: every step makes its own. ``first``: the steps of later cycles read what the block's first cycle has made, in
training as in tests (recursive sharing of Mixture-of-Recursions, Bae et al. 2025, arXiv 2507.10524, section 2.2.2; the
shared keys of Parallel Loop Transformer, arXiv 2510.24824). ``last``: the cache keeps those of the last cycle alone,
for every block, as Ouro does in decoding (arXiv 2510.25741): trained and scored as ``own``, while a token that is
generated sees of the passes before it what their last cycle has made.

Steps that look back (``Adapter.looks_back``) read what their block's first cycle has made, and beside it make their
own, of which the cache keeps what is within a window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.config import ModelConfig
from bench.model.schedule import Schedule, Step
from bench.model.walk import Walk

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from bench.model.parts import Adapter


def borrows(model: ModelConfig, step: Step) -> bool:
    """Whether the step reads the keys and values of its block's first cycle and makes none."""
    return model.kv == "first" and step.cycle > 0


def slot(model: ModelConfig, schedule: Schedule, step: Step) -> int:
    """The step's slot in the cache."""
    return step.depth if model.kv == "own" else schedule.first_use[step.block]


def filled(model: ModelConfig, schedule: Schedule) -> list[bool]:
    """For each step whether the slot of its depth holds anything."""
    return [slot(model, schedule, step) == step.depth for step in schedule.steps]


def windows(adapter: Adapter | None, schedule: Schedule) -> dict[int, int]:
    """By their depth the steps that look back, and the window in which they see their own keys, in tokens."""
    window = None if adapter is None else adapter.window
    if adapter is None or window is None:
        return {}
    return {step.depth: window for step in schedule.steps if adapter.looks_back(step)}


def first(state: Walk, step: Step) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H_kv, S, d] that the block's first cycle has made, in this pass and before."""
    cache = state.context.cache
    if cache is None:
        return unpacked(state.memory[name_of(step)])
    return stored(cache, state.schedule.first_use[step.block], state.context.total)


def name_of(step: Step) -> str:
    """What the block's keys and values are called in the memory of a pass without a cache."""
    return f"keys and values of block {step.block}"


def packed(key: Tensor, value: Tensor) -> Tensor:
    """Keys and values [B, H_kv, T, d] as memory is kept, [B, T, 2, H_kv, d]."""
    return torch.stack([key.transpose(1, 2), value.transpose(1, 2)], 2)


def unpacked(kept: Tensor) -> tuple[Tensor, Tensor]:
    """What was packed."""
    key, value = kept.unbind(2)
    return key.transpose(1, 2), value.transpose(1, 2)


def stored(cache: Cache, at: int, total: int) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H_kv, S, d] of the first ``total`` tokens in a slot."""
    if hasattr(cache, "stored"):
        found: tuple[Tensor, Tensor] = cache.stored(at, total)
        return found
    layer: Any = cache.layers[at]
    return layer.keys[:, :, :total], layer.values[:, :, :total]


def replaced(cache: Cache, at: int, key: Tensor, value: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """``stored`` with these [B, H_kv, T, d] in the place of the last T, there from now on."""
    if hasattr(cache, "stored"):  # which writes where its tokens stand
        return cache.update(key, value, at)
    layer: Any = cache.layers[at]
    start = total - key.shape[2]
    layer.keys, layer.values = (
        torch.cat([old[:, :, :start], new, old[:, :, total:]], 2)
        for old, new in ((layer.keys, key), (layer.values, value))
    )
    return layer.keys[:, :, :total], layer.values[:, :, :total]
