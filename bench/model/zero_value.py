"""Attention beside a prefix of zero value (zero tokens), causal or full, by the log-sum-exp of a fused kernel.

The output is the kernel's ordinary output scaled by ``1 - p0``, and ``p0 = sigmoid(lse(q.k0) - lse(q.K))`` with the
log-sum-exp of the scores. PyTorch's kernels return that log-sum-exp, but their backward ignores the gradient through
it, so that scaling by it gives the right output and the wrong gradient: here the backward pass is told of it.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from bench.model.attention_kernels import CPU, Kernel
from bench.model.stacks import folded


def beside_score(out: Tensor, lse: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Z, p0 and L (see ``ZeroValueAttention``) of a kernel's O [B, H, T, d] and l [B, H, T], and of s [B, H, T]."""
    mass = torch.sigmoid(score - lse)
    return out * (1 - mass).unsqueeze(-1).to(out.dtype), mass, torch.logaddexp(lse, score.to(lse.dtype))


def handed_back(
    grad: Tensor | None, grad_mass: Tensor | None, out: Tensor, mass: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What a kernel's backward is handed for the gradient of its output and for the output, Z', and the gradient of s
    (see ``ZeroValueAttention``); of dZ, dp0, Z and p0.
    """
    if grad is None:
        grad = torch.zeros_like(out)
    centre = (grad * out).sum(-1).to(mass.dtype)
    grad_score = -mass * centre
    if grad_mass is None:
        return grad, out, grad_score
    extra = mass * grad_mass
    grad_score = grad_score + extra - mass * extra
    norm = grad.square().sum(-1)
    tiny = torch.finfo(grad.dtype).tiny ** 0.4
    short = norm < tiny**2
    # No direction to carry p0 dp0, if there is any: take one too short to be seen in the result. A GPU, which would
    # have to be waited for, tensors without storage, on which FLOPs are counted, and those of a program in the making
    # are not asked whether there is.
    unasked = short.device.type != "cpu" or isinstance(short, FakeTensor) or torch.compiler.is_compiling()
    if unasked or short.any():
        need = short & (extra != 0)
        grad = torch.where(need.unsqueeze(-1), tiny, grad)
        norm = torch.where(need, tiny**2 * grad.shape[-1], norm.masked_fill(short, 1.0))
    return grad, torch.addcmul(out, grad, (extra / norm).unsqueeze(-1).to(grad.dtype)), grad_score


class ZeroValueAttention(torch.autograd.Function):
    """Attention, causal or full, on a fused kernel beside a prefix of zero value, known by its scores' log-sum-exp s.

    With the kernel's output O and log-sum-exp l, the zero attention is ``p0 = sigmoid(s - l)`` and the output
    ``Z = (1 - p0) O``. With the gradients dZ and dp0 and the probabilities P of the whole softmax, whose log-sum-exp is
    ``L = log(e^l + e^s)``, the exact gradients of the scores are ``dS = P (dZ.V - c)`` and ``ds = p0 (dp0 - c)`` with
    ``c = dZ.Z + p0 dp0``. The kernel's backward, handed L, computes ``dS = P (dZ.V - dZ.Z')`` from the Z' it is handed,
    so it is handed ``Z' = Z + dZ p0 dp0 / |dZ|^2``, for which ``dZ.Z' = c``.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, score: Tensor, kernel: Kernel = CPU, causal: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Z [B, H, T, d] and p0 [B, H, T] of query, key, value [B, H, T, d] and s [B, H, T]."""
        out, lse, rest = kernel.forward(query, key, value, causal)
        ctx.kernel, ctx.causal = kernel, causal
        out, mass, lse = beside_score(out, lse, score)
        ctx.save_for_backward(query, key, value, out, mass, lse, *rest)
        ctx.set_materialize_grads(False)
        return out, mass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_mass: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of query, key, value and score."""
        query, key, value, out, mass, lse, *rest = ctx.saved_tensors
        grad, out, grad_score = handed_back(grad, grad_mass, out, mass)
        gradients = ctx.kernel.backward(grad, query, key, value, out, lse, rest, ctx.causal)
        return (*gradients, grad_score, None, None)


def _fused(device: torch.device) -> type[torch.autograd.Function] | None:
    """What does the arithmetic beside the kernel in fewer steps, where that is needed and can be had."""
    return None if device.type != "cuda" or torch.compiler.is_compiling() else _with_triton()


@lru_cache(maxsize=1)
def _with_triton() -> type[torch.autograd.Function] | None:
    if find_spec("triton") is None:
        return None
    from bench.model.zero_value_triton import FusedZeroValue  # start-up

    return FusedZeroValue


def with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: tuple[Tensor, Tensor | None],
    kernel: Kernel,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Output and zero attention of a whole sequence by the log-sum-exp; see ``bench.model.attention.attend``."""
    repeat = query.shape[1] // key.shape[1]
    if repeat > 1:
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    k0 = prefix[0].to(query.dtype).repeat_interleave(repeat, -3)
    fused = None if prefix[1] is not None else _fused(query.device)
    if fused is not None:
        k0 = k0.expand(len(query), *k0.shape[-3:])
        out, mass = folded(lambda *tensors: fused.apply(*tensors, kernel, causal), query, key, value, k0)
        return out, mass.to(out.dtype)
    pattern = "bhtd,hmd->bhtm" if k0.dim() == 3 else "bhtd,bhmd->bhtm"
    scores = torch.einsum(pattern, query, k0 * query.shape[-1] ** -0.5)
    score = scores.squeeze(-1) if scores.shape[-1] == 1 else scores.logsumexp(-1)
    out, mass = folded(lambda *tensors: ZeroValueAttention.apply(*tensors, kernel, causal), query, key, value, score)
    if prefix[1] is not None:
        weights = (scores.softmax(-1) * mass.unsqueeze(-1)).to(out.dtype)
        v0 = prefix[1].to(out.dtype).repeat_interleave(repeat, -3)
        out = out + (weights.unsqueeze(-1) * v0.expand(len(out), *v0.shape[-3:]).unsqueeze(2)).sum(3)
    return out, mass.to(out.dtype)
