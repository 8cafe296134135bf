"""Causal attention with an optional prefix of tokens (zero tokens), on PyTorch's fused kernels.

For queries q, prefix keys k0 (M of them) and keys K: ``p = softmax([q.k0/sqrt(d), q.K/sqrt(d)])``, the output is
``sum_j p_j v_j`` and the zero attention ``p0`` the mass on the prefix (arXiv 2502.12214, section 3.2). With value zero
this is the ordinary output scaled by ``1 - p0``, and ``p0 = sigmoid(lse(q.k0) - lse(q.K))`` with the log-sum-exp of
the scores. PyTorch's kernels return that log-sum-exp, but their backward ignores the gradient through it, so that
scaling by it gives the right output and the wrong gradient. Two exact forms are used:

* ``_with_lse`` (CPU): the plain causal kernel, with the log-sum-exp's gradient put back into its backward pass;
* ``_joined`` (elsewhere, and with a mask or dropout): the prefix is part of the keys the kernel sees, and an extra
  value column carries ``p0``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, scaled_dot_product_attention

from bench.model.parts import Flops

Prefix = tuple[Tensor, Tensor | None]  # keys and values [(B,) H_kv, M, d]; values None: zero

MASS_COLUMNS = 8  # columns added to the heads to carry p0: one holds it, the others keep the kernels' alignment


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: Prefix | None = None,
    mask: Tensor | None = None,
    with_mass: bool = False,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """Attention output [B, H, T, d] and, if ``with_mass``, the attention on the prefix [B, H, T] (None without one).

    query [B, H, T, d]; key and value [B, H_kv, S, d] with S >= T, the last T of them the queries' own positions;
    mask: added to the scores, [.., T, M + S], with M columns only if there is a prefix; None means causal over the
    whole sequence (S = T) or, for T = 1, everything.
    """
    if prefix is None:
        causal = mask is None and query.shape[2] > 1
        return _kernel(query, key, value, mask, causal, dropout, query.shape[-1] ** -0.5), None
    if mask is None and query.shape[2] > 1 and not dropout and query.device.type == "cpu":
        out, mass = _with_lse(query, key, value, prefix)
        return out, mass if with_mass else None
    return _joined(query, key, value, prefix, mask, with_mass, dropout)


def attention_flops(
    n_heads: int, length: int, head_dim: int, n_prefix: int, with_mass: bool, trained_key: bool, device: str
) -> Flops:
    """FLOPs of ``attend`` on a full causal sequence as executed on the kind of device (``"cpu"`` or another)."""
    if not n_prefix or device == "cpu":
        scores = 2 * n_heads * length * head_dim * n_prefix
        kernel = 4 * n_heads * length * length * head_dim
        return Flops(attention=kernel, matmul=scores) if trained_key else Flops(attention=kernel, half=scores)
    total, wide = length + n_prefix, head_dim + (MASS_COLUMNS if with_mass else 0)
    return Flops(attention=4 * n_heads * total * total * wide)


def attend_formula(query: Tensor, key: Tensor, value: Tensor, prefix: Prefix | None = None) -> tuple[Tensor, Tensor]:
    """The formula of the module's docstring word for word, causal: the reference ``attend`` is tested against."""
    n_prefix = 0
    if prefix is not None:
        key, value, n_prefix = _put_before(key, value, prefix)
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    length, total = query.shape[2], key.shape[2]
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    future = torch.ones(length, total, dtype=torch.bool, device=query.device).triu(total - length + 1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return weights @ value, weights[..., :n_prefix].sum(-1)


def causal_mask(length: int, total: int, n_prefix: int, like: Tensor) -> Tensor:
    """Additive mask [length, n_prefix + total]: query i, at position total - length + i, sees the prefix and the past."""
    mask = torch.full((length, n_prefix + total), -torch.inf, dtype=like.dtype, device=like.device)
    return mask.triu(n_prefix + total - length + 1)


class CausalWithLse(torch.autograd.Function):
    """The CPU's fused causal attention with a differentiable log-sum-exp of its scores [B, H, T].

    With scores S, P = softmax(S) and the gradients dO and dl of output and log-sum-exp, the exact gradient is
    ``dS = P (dO.V - (dO.O - dl))``; the kernel's backward computes ``dS = P (dO.V - dO.O)`` from the O it is handed.
    Handing it ``O' = O - dO dl / |dO|^2``, for which ``dO.O' = dO.O - dl``, makes it compute the former.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Output [B, H, T, d] and log-sum-exp [B, H, T] of query, key, value [B, H, T, d]."""
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True)
        ctx.save_for_backward(query, key, value, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Gradients of query, key and value."""
        query, key, value, out, lse = ctx.saved_tensors
        # A row without gradient has no direction to carry dl: it is given one too short to be seen in the result.
        tiny = torch.finfo(grad.dtype).tiny ** 0.4
        norm = grad.square().sum(-1, keepdim=True)
        short = norm < tiny**2
        grad = torch.where(short, tiny, grad)
        norm = torch.where(short, tiny**2 * grad.shape[-1], norm)
        carrying = torch.addcmul(out, grad, (grad_lse.unsqueeze(-1) / norm).to(grad.dtype), value=-1)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, carrying, lse, 0.0, True
        )


def _with_lse(query: Tensor, key: Tensor, value: Tensor, prefix: Prefix) -> tuple[Tensor, Tensor]:
    """Output and zero attention of a full causal sequence on the CPU, by the log-sum-exp."""
    heads, batch = query.shape[1], query.shape[0]
    repeat = heads // key.shape[1]
    if repeat > 1:
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    out, lse = CausalWithLse.apply(query, key, value)
    k0 = prefix[0].to(query.dtype).repeat_interleave(repeat, -3)
    pattern = "bhtd,hmd->bhtm" if k0.dim() == 3 else "bhtd,bhmd->bhtm"
    scores = torch.einsum(pattern, query, k0) * query.shape[-1] ** -0.5
    mass = torch.sigmoid(scores.logsumexp(-1) - lse)
    out = out * (1 - mass).unsqueeze(-1).to(out.dtype)
    if prefix[1] is not None:
        weights = (scores.softmax(-1) * mass.unsqueeze(-1)).to(out.dtype)
        v0 = prefix[1].to(out.dtype).repeat_interleave(repeat, -3)
        out = out + (weights.unsqueeze(-1) * v0.expand(batch, *v0.shape[-3:]).unsqueeze(2)).sum(3)
    return out, mass.to(out.dtype)


def _joined(
    query: Tensor, key: Tensor, value: Tensor, prefix: Prefix, mask: Tensor | None, with_mass: bool, dropout: float
) -> tuple[Tensor, Tensor | None]:
    """Output and zero attention with the prefix among the keys; the general form."""
    length, head_dim, scale = query.shape[2], query.shape[3], query.shape[3] ** -0.5
    key, value, n_prefix = _put_before(key, value, prefix)
    causal = mask is None and length > 1
    if causal:
        # Dummy queries for the prefix make the pattern square: the kernels' own causal form is faster than a mask.
        query = pad(query, (0, 0, n_prefix, 0))
    if with_mass:
        # An extra value column, 1 for the prefix and 0 for real tokens, makes the kernel sum p0 as it sums the output.
        # Queries and keys get zeros there (the scores do not change) because fused kernels want equal head sizes.
        query, key = pad(query, (0, MASS_COLUMNS)), pad(key, (0, MASS_COLUMNS))
        indicator = torch.zeros(key.shape[2], MASS_COLUMNS, dtype=value.dtype, device=value.device)
        indicator[:n_prefix, 0] = 1
        value = torch.cat([value, indicator.expand(*value.shape[:3], MASS_COLUMNS)], -1)
    out = _kernel(query, key, value, mask, causal, dropout, scale)[:, :, -length:]
    return (out[..., :head_dim], out[..., head_dim]) if with_mass else (out, None)


def _kernel(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, dropout: float, scale: float
) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def _put_before(key: Tensor, value: Tensor, prefix: Prefix) -> tuple[Tensor, Tensor, int]:
    """Keys and values [B, H_kv, M + S, d] with the prefix in front, and M."""
    first = prefix[0].to(key.dtype)
    n_prefix = first.shape[-2]
    key = torch.cat([first.expand(key.shape[0], *first.shape[-3:]), key], 2)
    if prefix[1] is None:
        return key, pad(value, (0, 0, n_prefix, 0)), n_prefix
    second = prefix[1].to(value.dtype)
    return key, torch.cat([second.expand(value.shape[0], *second.shape[-3:]), value], 2), n_prefix
