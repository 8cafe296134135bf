"""What a pass is given, checked and brought into the form that its steps take: masks, positions, a cache."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from bench.config import ModelConfig
from bench.errors import InputError
from bench.model.keys import filled
from bench.model.schedule import Schedule
from bench.model.variant import Variant

if TYPE_CHECKING:
    from transformers.cache_utils import Cache


def traced() -> bool:
    """Whether a program is being made of what runs, for other values too: then nothing may hang on a value."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def check_whole(name: str, value: Any, least: int) -> None:
    """Raises InputError for a value that is given and is no whole number of at least so much."""
    if value is None or traced():
        return
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise InputError(f"{name}: {value!r} (allowed: a whole number from {least} on)")


def check_labels(labels: Tensor | None, input_ids: Tensor, logits_to_keep: int) -> None:
    """Raises InputError for labels that are not one for each token, or of whose tokens some have no logits."""
    if labels is None or traced():
        return
    if labels.shape != input_ids.shape:
        raise InputError(
            f"labels: of shape {tuple(labels.shape)} (allowed: that of input_ids, {tuple(input_ids.shape)})"
        )
    if logits_to_keep:
        raise InputError(f"logits_to_keep: {logits_to_keep} with labels, which are of all tokens (allowed: 0)")


def masks_of(
    attention_mask: Tensor | None, batch: int, heads: int, length: int, total: int
) -> tuple[Tensor | None, Tensor | None]:
    """What a mask tells: the real tokens [B, S], or which token sees which [B or 1, H or 1, T, S]; None where it tells
    nothing. Raises InputError for a mask of another form. The numbers are B, H, T and S.
    """
    if attention_mask is None:
        return None, None
    if attention_mask.dim() == 4:
        given = tuple(attention_mask.shape)
        if not traced() and (given[0] not in (1, batch) or given[1] not in (1, heads) or given[2:] != (length, total)):
            raise InputError(
                f"attention_mask: of shape {given} (allowed: {batch} or 1, {heads} or 1, {length}, {total})"
            )
        return None, attention_mask
    if attention_mask.dim() != 2:
        raise InputError(
            f"attention_mask: {attention_mask.dim()} dimensions (allowed: 2, of batch and keys, or 4, of batch, heads, "
            "queries and keys)"
        )
    if not traced() and attention_mask.shape != (batch, total):
        raise InputError(f"attention_mask: of shape {tuple(attention_mask.shape)} (allowed: {batch}, {total})")
    return (None if not traced() and bool(attention_mask.all()) else attention_mask), None


def added_scores(pairs: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask [B or 1, H or 1, T, S], of truth values or already that, adds to the scores."""
    lowest = torch.finfo(dtype).min
    if pairs.is_floating_point():
        return pairs.to(dtype).clamp_min(lowest)
    return torch.zeros_like(pairs, dtype=dtype).masked_fill(pairs == 0, lowest)


def check_counts(counts: Tensor, batch: int, schedule: Schedule, cache: Cache | None) -> None:
    """Raises InputError for numbers of cycles of a batch's sequences that are not [B], or not what the schedule runs
    (which is not asked of another device, that would have to be waited for).
    """
    if cache is not None:
        raise InputError("sequence_cycles: cannot be had with a cache, which all sequences fill alike")
    most = schedule.n_cycles
    if traced():
        return
    if counts.shape != (batch,) or (counts.device.type == "cpu" and not bool(((counts >= 1) & (counts <= most)).all())):
        raise InputError(
            f"sequence_cycles: {counts!r} (allowed: a number from 1 to {most} for each of {batch} sequences)"
        )


def depths(schedule: Schedule, counts: Tensor | None, input_ids: Tensor) -> Tensor:
    """[B], steps run for each sequence of a pass over tokens [B, T]. counts: [B], the cycles of each; None: all."""
    if counts is None:
        return torch.full((len(input_ids),), schedule.depth, device=input_ids.device)
    return torch.tensor(schedule.depths, device=counts.device)[counts - 1]


def check_own_cycles(name: str, variant: Variant, model: ModelConfig, schedule: Schedule, routes: bool) -> None:
    """Raises InputError where sequences cannot have numbers of cycles of their own.

    Args:
        name: of what asks for it.
        variant, model, schedule: the model's.
        routes: whether its cycles run on different tokens (``Recurrence.routes``).
    """
    in_a_row = variant.cycled and schedule.n_cycles != model.n_cycles
    if routes or in_a_row:
        why = "gives tokens numbers of cycles itself" if routes else "repeats its blocks within one pass"
        raise InputError(f"{name} with {variant.name!r}, which {why} (allowed: off)")


def check_positions(position_ids: Tensor | None, real: Tensor | None, total: int, learned: int) -> None:
    """Raises InputError for one of ``total`` tokens that stands beyond the learned positions. real: [B, total]."""
    last = total - 1
    if traced():
        return
    if position_ids is not None:
        first, last = map(int, position_ids.aminmax())
        if first < 0:
            raise InputError(f"position_ids: {first} (allowed: 0 to {learned - 1})")
    elif real is not None and last >= learned:
        last = int((real != 0).sum(-1).max()) - 1
    if last >= learned:
        raise InputError(
            f"position {last} is beyond the {learned} that the model has learned (allowed: 0 to {learned - 1}; family "
            "llama has no such end)"
        )


def default_positions(real: Tensor | None, past: int, input_ids: Tensor) -> Tensor:
    """Positions [B or 1, T] of tokens [B, T] behind ``past`` others, counted over a mask's [B, past + T] real ones."""
    length = input_ids.shape[1]
    if real is not None:
        return (real.cumsum(-1) - 1).clamp_min(0)[:, -length:]
    return torch.arange(past, past + length, device=input_ids.device)[None]


def packed(position_ids: Tensor, real: Tensor | None, past: int, cache: Cache | None) -> Tensor | None:
    """``documents_of`` the positions, None where all tokens are of one. A cache remembers that its tokens are not."""
    before = bool(getattr(cache, "packed", False))
    if position_ids.shape[1] == 1 and not before:
        return None
    found = documents_of(position_ids, None if real is None else real != 0, past)
    if not before and not traced() and not bool(found.any()):
        return None
    if cache is not None:
        cache.packed = True  # type: ignore[attr-defined]
    return found


def documents_of(positions: Tensor, real: Tensor | None, past: int) -> Tensor:
    """Which document each of S keys is of, [B, S], from the positions [B, T] of the last T of them.

    A token goes on with the document of the token before it if its position is the next one; any other begins another
    (0, 1, 2, ... in each row). Of the keys before these T, which stand in a cache, the first token sees so many as its
    position says: they are of its document, 0, and the others of none, -1.

    real: [B, S], False for padding. It is passed over, whether positions are counted with it or without.
    """
    index = torch.arange(positions.shape[1], device=positions.device)
    if real is None:
        begins = positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1
        first, behind = positions[:, :1], torch.arange(past, 0, -1, device=positions.device)[None]
    else:
        positions, own = positions.expand(len(real), -1), real[:, past:]
        before = pad(index.where(own, -1).cummax(1).values[:, :-1], (1, 0), value=-1)  # the real token before, if any
        gap = positions - positions.gather(1, before.clamp_min(0))
        begins = own & (before >= 0) & (gap != 1) & (gap != index - before)
        first = positions.gather(1, own.int().argmax(1, keepdim=True))
        behind = real[:, :past].flip(1).cumsum(1).flip(1)
    earlier = torch.where(behind <= first, 0, -1)
    return torch.cat([earlier, begins.cumsum(1)], 1)


def fit_cache(
    cache: Cache, variant: Variant, model: ModelConfig, schedule: Schedule, past: int, windows: Mapping[int, int]
) -> None:
    """Give a cache that is empty, and was made for fewer cycles, the slots of the schedule that runs; those of steps
    with a window (by their depth) hold no more than that.

    Raises InputError for one with tokens in it that another schedule has put there.
    """
    layers: list[Any] = cache.layers
    slots = variant.cache_slots(schedule)
    if past:
        kept = [*filled(model, schedule), *variant.remembered(schedule)]
        missing = [slot for slot, numbers in enumerate(kept) if numbers and not _filled(layers, slot)]
        if layers and (missing or any(int(layer.get_seq_length()) for layer in layers[slots:])):
            raise other_cycles(schedule)
    elif layers and cache.layer_class_to_replicate is None:
        while len(layers) < slots:
            layers.append(copy.deepcopy(layers[-1]))  # nothing is in it
    if windows and not past and (layers or cache.layer_class_to_replicate is not None):
        _narrow(layers, windows)


def _narrow(layers: list[Any], windows: Mapping[int, int]) -> None:
    """Let slots of an empty cache hold a window alone. Those of a fixed size stay as they are."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer  # start-up

    while len(layers) <= max(windows):
        layers.append(DynamicLayer())
    for at, window in windows.items():
        if type(layers[at]) is DynamicLayer:
            layers[at] = DynamicSlidingWindowLayer(window)


def _filled(layers: Sequence[Any], slot: int) -> bool:
    return slot < len(layers) and bool(layers[slot].is_initialized)


def other_cycles(schedule: Schedule) -> InputError:
    """The error for a cache that another schedule has filled."""
    return InputError(
        f"cache: filled with another number of cycles than {schedule.n_cycles}, which runs now (allowed: the same "
        "number in every pass)"
    )
