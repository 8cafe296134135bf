"""What the form of a task's sequences (``bench.form``) makes of a model: its first layer, and what is judged."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, pixel_unshuffle

from bench.config import ModelConfig
from bench.errors import InputError
from bench.form import Form
from bench.model.flops import Flops


def first_layer(model: ModelConfig, vocab_size: int) -> nn.Embedding | nn.Linear:
    """What brings what stands at a place to the model's width: tokens are looked up, vectors projected."""
    features = model.form.features
    return nn.Embedding(vocab_size, model.d_model) if features is None else nn.Linear(features, model.d_model)


def first_flops(model: ModelConfig, length: int) -> Flops:
    """FLOPs of it for one sequence; what goes in gets no gradient."""
    features = model.form.features
    return Flops() if features is None else Flops(half=2 * length * features * model.d_model)


def real_of(inputs: Tensor, real: Tensor | None, form: Form) -> tuple[Tensor, Tensor | None]:
    """The inputs without what is not a number, and which places [B, T] are real: as the mask ``real`` says, and where
    the vectors [B, T, F] do.
    """
    if not form.padded:
        return inputs, real
    number = ~inputs[..., 0].isnan()
    return inputs.nan_to_num(), number if real is None else number & (real != 0)


def judged(states: Tensor, real: Tensor | None, form: Form) -> Tensor:
    """What is judged of the states [B, T, ...] of a sequence: [B, T, ...] or, once a sequence, [B, 1, ...]."""
    if form.judged == "tokens":
        return states
    if form.judged == "last":
        return states[:, -1:]
    if real is None:
        return states.mean(1, keepdim=True)
    share = real.to(states.dtype) / real.sum(1, keepdim=True)
    return (states * share.view(*share.shape, *[1] * (states.dim() - 2))).sum(1, keepdim=True)


def blank(form: Form, batch: int, length: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Inputs and targets of the form, all zero, to count or to try something on."""
    shape, kind = ((length,), torch.long) if form.features is None else ((length, form.features), torch.float)
    targets = torch.zeros(batch, form.places(length), dtype=torch.long, device=device)
    return torch.zeros(batch, *shape, dtype=kind, device=device), targets


def cut(pictures: Tensor, form: Form) -> Tensor:
    """The vectors of pictures [B, C, H, W]: patches [B, T, C p p], row by row, with a class token behind them where the
    form judges the last state.

    Raises InputError if the form has no patches, or pictures are no multiple of them.
    """
    size = form.patch
    if size is None:
        raise InputError("pixel_values: 4 dimensions, of pictures (allowed: 3, of vectors: the model has no patches)")
    height, width = pictures.shape[2:]
    if height % size or width % size:
        raise InputError(
            f"pixel_values: {height} x {width} pixels (allowed: multiples of the patches, {size} x {size})"
        )
    found = pixel_unshuffle(pictures, size).flatten(2).transpose(1, 2)
    return found if form.judged != "last" else with_class_token(found)


def with_class_token(vectors: Tensor) -> Tensor:
    """Vectors [B, T, F] with one more behind them that is 1 in a feature of its own, [B, T + 1, F + 1]: the first layer
    learns what stands there.
    """
    found = pad(vectors, (0, 1, 0, 1))
    found[:, :-1, -1] = vectors[..., 0] * 0  # or not a number, where there is padding
    found[:, -1, -1] = 1.0
    return found
