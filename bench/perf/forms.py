"""Exact forms of causal attention with one zero token that a gate reads: their time, and the error of their gradients.

``bench.model.attention`` takes the form that is the cheapest on its device. What is measured here is the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from bench.errors import typed_line
from bench.model.attention import attend, attend_formula, joined
from bench.perf.timing import Precision, Row, in_turns, quartiles, wait

TITLE = "attention, forward and backward: with a zero token / without; error of the gradients against the formula's"
HEAD_DIM = 64
Form = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""Output [B, H, T, d] and zero attention [B, H, T], if it is wanted, of query, key, value [B, H, T, d] and the zero
token's key [H, 1, d]."""


def without(query: Tensor, key: Tensor, value: Tensor, k0: Tensor) -> tuple[Tensor, Tensor | None]:
    """No zero token: what the others are held against."""
    return attend(query, key, value)


def padded(query: Tensor, key: Tensor, value: Tensor, k0: Tensor, with_mass: bool) -> tuple[Tensor, Tensor | None]:
    """The zero token among the keys of the device's fused kernel, whose heads are wider where p0 is wanted."""
    return joined(query, key, value, (k0, None), None, with_mass, 0.0)


def told(query: Tensor, key: Tensor, value: Tensor, k0: Tensor) -> tuple[Tensor, Tensor | None]:
    """By the log-sum-exp, with a backward pass that is told of it: as models are trained."""
    return attend(query, key, value, (k0, None), with_mass=True)


def flex(
    query: Tensor, key: Tensor, value: Tensor, k0: Tensor, kernel: Callable[..., Any] | None = None
) -> tuple[Tensor, Tensor | None]:
    """By flex_attention's log-sum-exp, through which its own backward pass goes. kernel: compiled by default."""
    if kernel is None and query.device.type == "cpu":
        raise NotImplementedError("flex_attention has no backward pass on a CPU")
    found = kernel or _compiled()
    block_mask = _causal(query.shape[2], query.device)
    out, more = found(query, key, value, block_mask=block_mask, return_aux=AuxRequest(lse=True))
    score = torch.einsum("bhtd,hmd->bhtm", query, k0.to(query.dtype) * query.shape[-1] ** -0.5).squeeze(-1)
    mass = torch.sigmoid(score - more.lse)
    return out * (1 - mass).unsqueeze(-1).to(out.dtype), mass


@lru_cache(maxsize=1)
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=8)
def _causal(length: int, device: torch.device) -> Any:
    return create_block_mask(lambda b, h, query, key: query >= key, None, None, length, length, device=device)


FORMS: dict[str, Form] = {
    "no zero token": without,
    "padded": partial(padded, with_mass=False),
    "padded, p0 read": partial(padded, with_mass=True),
    "log-sum-exp, p0 read": told,
    "flex_attention, p0 read": flex,
}


def rows(
    device: torch.device, rounds: int, heads: int, batch: int, length: int, precision: Precision = "float32"
) -> list[Row]:
    """A row for each form; all of them take turns. ``gradient_error``: the norm of the difference from the formula's
    gradients in float32 over their norm. A form that cannot run here has a ``note`` that says why, and no figures.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = [*[(batch, heads, length, HEAD_DIM)] * 4, (heads, 1, HEAD_DIM), (batch, heads, length)]
    query, key, value, weight, k0, weight0 = (
        torch.randn(size, generator=generator).to(device, getattr(torch, precision)) for size in sizes
    )
    inputs = [tensor.requires_grad_() for tensor in (query, key, value, k0)]
    found, steps = dict[str, Row](), dict[str, Callable[[], None]]()
    for name, form in FORMS.items():
        row: Row = {"form": name, "d_model": heads * HEAD_DIM, "heads": heads, "batch": batch, "length": length}
        found[name] = row
        try:
            row["gradient_error"] = _error(form, inputs, weight, weight0)
            steps[name] = partial(_step, form, inputs, weight, weight0)
        except Exception as error:  # kernels differ in what they refuse, and in how
            row["note"] = typed_line(error)
    seconds = in_turns(list(steps.values()), rounds)
    for place, name in enumerate(steps):
        found[name] |= {"seconds": float(np.median(seconds[:, place])), "rounds": rounds}
        found[name] |= {} if place == 0 else quartiles(seconds[:, place] / seconds[:, 0])
    return list(found.values())


def _gradients(form: Form, inputs: list[Tensor], weight: Tensor, weight0: Tensor) -> tuple[list[Tensor], bool]:
    """Of query, key, value and the zero token's key (zeros where it takes no part), and whether p0 was read."""
    out, mass = form(*inputs)
    outputs = [(out, weight)] if mass is None else [(out, weight), (mass, weight0.to(mass.dtype))]
    made = torch.autograd.grad(
        [output for output, _ in outputs], inputs, [part for _, part in outputs], materialize_grads=True
    )
    return list(made), mass is not None


def _step(form: Form, inputs: list[Tensor], weight: Tensor, weight0: Tensor) -> None:
    _gradients(form, inputs, weight, weight0)
    wait(weight.device)


def _error(form: Form, inputs: list[Tensor], weight: Tensor, weight0: Tensor) -> float:
    """How far the gradients are off the formula's of the same inputs in float32."""
    made, reads = _gradients(form, inputs, weight, weight0)

    def formula(query: Tensor, key: Tensor, value: Tensor, k0: Tensor) -> tuple[Tensor, Tensor | None]:
        out, mass = attend_formula(query, key, value, None if form is without else (k0, None))
        return out, mass if reads else None

    exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
    expected, _ = _gradients(formula, exact, weight.float(), weight0.float())
    off, size = (
        float(torch.stack([part.float().square().sum() for part in parts]).sum().sqrt())
        for parts in ([a - b for a, b in zip(made, expected, strict=True)], expected)
    )
    return off / size
