"""PyTorch's fused attention kernels that return the log-sum-exp of the scores, and the backward pass of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

Saved = tuple[Tensor | None, ...]  # what a kernel's backward wants besides
aten = torch.ops.aten


@dataclass(frozen=True)
class Kernel:
    """A fused attention kernel that returns its log-sum-exp.

    Attributes:
        forward: output O [B, H, T, d], log-sum-exp l [B, H, T] and what is saved, of query, key, value and whether
            it is causal.
        backward: gradients of query, key and value, of the gradient of O, query, key, value, O, l, what was saved
            and whether it is causal. Of O and l it makes ``P = exp(scores - l)`` and ``dS = P (dO.V - dO.O)``.
    """

    forward: Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor, Saved]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _cpu(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor, Saved]:
    return *aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal), ()


def _cpu_backward(grad: Tensor, *saved: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, out, lse, _, causal = saved
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, query, key, value, out, lse, 0.0, causal)


def _cudnn(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor, Saved]:
    found = aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, 0.0, causal, False)
    return found[0], found[1].squeeze(-1), (found[6], found[7])  # the state of random numbers, of which none are drawn


def _cudnn_backward(grad: Tensor, *saved: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, out, lse, state, causal = saved
    lengths = (None, None, query.shape[2], key.shape[2])
    return aten._scaled_dot_product_cudnn_attention_backward(
        grad, query, key, value, out, lse.unsqueeze(-1), *state, None, *lengths, 0.0, causal
    )


def _flash(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor, Saved]:
    found = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False)
    return found[0], found[1], (found[6], found[7])


def _flash_backward(grad: Tensor, *saved: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, out, lse, state, causal = saved
    lengths = (None, None, query.shape[2], key.shape[2])
    return aten._scaled_dot_product_flash_attention_backward(
        grad, query, key, value, out, lse, *lengths, 0.0, causal, *state
    )


def _efficient(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor, Saved]:
    out, lse, *state = aten._scaled_dot_product_efficient_attention(query, key, value, None, True, 0.0, causal)
    return out, lse[..., : query.shape[2]], tuple(state)  # the kernel fills a multiple of 32 queries


def _efficient_backward(grad: Tensor, *saved: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, out, lse, state, causal = saved
    lse = pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))
    wanted = [True, True, True, False]
    return aten._scaled_dot_product_efficient_attention_backward(
        grad, query, key, value, None, out, lse, *state, 0.0, wanted, causal
    )[:3]


CPU = Kernel(_cpu, _cpu_backward)
CUDNN = Kernel(_cudnn, _cudnn_backward)
FLASH = Kernel(_flash, _flash_backward)
EFFICIENT = Kernel(_efficient, _efficient_backward)


def kernel_for(query: Tensor) -> Kernel | None:
    """The fastest kernel that takes queries [B, H, T, d] of this kind, None where there is none. In float16 the
    gradient of p0 could not be handed back: what is too short to be seen there is zero.
    """
    if query.dtype == torch.half:
        return None
    if query.device.type == "cpu":
        return CPU
    if query.device.type != "cuda" or query.dtype == torch.double or query.shape[-1] % 8:
        return None
    newest, _ = torch.cuda.get_device_capability(query.device)
    if query.dtype == torch.float or newest < 8:
        return EFFICIENT
    return CUDNN if newest >= 9 and query.shape[-1] <= 128 else FLASH
