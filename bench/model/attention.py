"""Attention, causal or full, with an optional prefix of tokens (zero tokens), on PyTorch's fused kernels.

For queries q, prefix keys k0 (M of them) and keys K: ``p = softmax([q.k0/sqrt(d), q.K/sqrt(d)])``, the output is
``sum_j p_j v_j`` and the zero attention ``p0`` the mass on the prefix (arXiv 2502.12214). With value zero
this is the ordinary output scaled by ``1 - p0``, and ``p0 = sigmoid(lse(q.k0) - lse(q.K))`` with the log-sum-exp of
the scores. PyTorch's kernels return that log-sum-exp, but their backward ignores the gradient through it, so that
scaling by it gives the right output and the wrong gradient. Two exact forms are used:

* ``with_lse`` (CPU): the plain causal kernel and its log-sum-exp, with a backward pass that is told of both;
* ``joined`` (elsewhere, and with a mask or dropout): the prefix is part of the keys the kernel sees, and an extra
  value column carries ``p0``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, scaled_dot_product_attention

from bench.form import TEXT, Form
from bench.model.flops import Flops
from bench.model.stacks import folded

Prefix = tuple[Tensor, Tensor | None]  # keys and values [(B,) H_kv, M, d]; values None: zero
Attend = Callable[..., tuple[Tensor, Tensor | None]]
"""What ``attend`` is, but for whether it is causal."""

MASS_COLUMNS = 8  # columns added to the heads to carry p0: one holds it, the others keep the kernels' alignment


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: Prefix | None = None,
    mask: Tensor | None = None,
    with_mass: bool = False,
    dropout: float = 0.0,
    window: int | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attention output [B, H, T, d] and, if ``with_mass``, the attention on the prefix [B, H, T] (None without one).

    query [B, H, T, d]; key and value [B, H_kv, S, d] with S >= T, the last T of them the queries' own positions;
    mask: added to the scores, [.., T, M + S], with M columns only if there is a prefix; None means causal over the
    whole sequence (S = T) or, for T = 1, everything. window: a query sees so many keys up to its own alone (as many
    behind it where it is not causal); only the last S keys that the mask tells of need be there, and there is no
    prefix. causal: False lets a query see all keys where there is no mask.
    """
    if window is not None:
        length, keys = query.shape[2], key.shape[2]
        mask = None if mask is None else mask[..., -keys:]
        # A traced program meets other lengths than that it is made with.
        if keys > window or torch.jit.is_tracing():
            if mask is None:
                mask = causal_mask(length, keys, 0, query) if causal else query.new_zeros(length, keys)
            mask = within(window, mask, keys)
    if prefix is None:
        causal = causal and mask is None and query.shape[2] > 1
        return _kernel(query, key, value, mask, causal, dropout, query.shape[-1] ** -0.5), None
    if mask is None and query.shape[2] > 1 and not dropout and query.device.type == "cpu":
        out, mass = with_lse(query, key, value, prefix, causal=causal)
        return out, mass if with_mass else None
    return joined(query, key, value, prefix, mask, with_mass, dropout, causal)


def attention_flops(
    n_heads: int,
    length: int,
    head_dim: int,
    n_prefix: int,
    with_mass: bool,
    trained_key: bool,
    device: str,
    queries: int | None = None,
    form: Form = TEXT,
) -> Flops:
    """FLOPs of ``attend`` on a whole sequence as executed on the kind of device (``"cpu"`` or another); queries: by so
    many of its tokens alone, under a mask; form: of the sequence.
    """
    asking = length if queries is None else queries
    square = length > 1 and (form.attention == "causal" or device == "cpu")
    if asking < length or form.padded or (n_prefix and not square):  # the prefix has no queries of its own
        wide = head_dim + (MASS_COLUMNS if with_mass and n_prefix else 0)
        return Flops(attention=4 * n_heads * asking * (length + n_prefix) * wide)
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
    """Additive mask [length, n_prefix + total]: query i stands at total - length + i and sees all up to there."""
    mask = torch.full((length, n_prefix + total), -torch.inf, dtype=like.dtype, device=like.device)
    return mask.triu(n_prefix + total - length + 1)


def within(window: int, mask: Tensor, keys: int) -> Tensor:
    """The mask [.., T, S] of queries that see no key further away than the window; of ``keys`` = S keys, the last of
    those that the given one is of.
    """
    at = torch.arange(keys, device=mask.device)
    away = (at[keys - mask.shape[-2] :, None] - at).abs() >= window
    return mask[..., -keys:].masked_fill(away, torch.finfo(mask.dtype).min)


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
    """Attention, causal or full, on the CPU's fused kernel beside a prefix of zero value, known by its scores'
    log-sum-exp s.

    With the kernel's output O and log-sum-exp l, the zero attention is ``p0 = sigmoid(s - l)`` and the output
    ``Z = (1 - p0) O``. With the gradients dZ and dp0 and the probabilities P of the whole softmax, whose log-sum-exp is
    ``L = log(e^l + e^s)``, the exact gradients of the scores are ``dS = P (dZ.V - c)`` and ``ds = p0 (dp0 - c)`` with
    ``c = dZ.Z + p0 dp0``. The kernel's backward, handed L, computes ``dS = P (dZ.V - dZ.Z')`` from the Z' it is handed,
    so it is handed ``Z' = Z + dZ p0 dp0 / |dZ|^2``, for which ``dZ.Z' = c``.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, score: Tensor, causal: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Z [B, H, T, d] and p0 [B, H, T] of query, key, value [B, H, T, d] and s [B, H, T]."""
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal)
        ctx.causal = causal
        out, mass, lse = beside_score(out, lse, score)
        ctx.save_for_backward(query, key, value, out, mass, lse)
        ctx.set_materialize_grads(False)
        return out, mass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_mass: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of query, key, value and score."""
        query, key, value, out, mass, lse = ctx.saved_tensors
        grad, out, grad_score = handed_back(grad, grad_mass, out, mass)
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, lse, 0.0, ctx.causal
        )
        return (*gradients, grad_score, None)


def with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: Prefix,
    function: type[torch.autograd.Function] = ZeroValueAttention,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Output and zero attention of a whole sequence by the log-sum-exp. function: on the device's kernel."""
    repeat = query.shape[1] // key.shape[1]
    if repeat > 1:
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    k0 = prefix[0].to(query.dtype).repeat_interleave(repeat, -3)
    pattern = "bhtd,hmd->bhtm" if k0.dim() == 3 else "bhtd,bhmd->bhtm"
    scores = torch.einsum(pattern, query, k0 * query.shape[-1] ** -0.5)
    score = scores.squeeze(-1) if scores.shape[-1] == 1 else scores.logsumexp(-1)
    apply = function.apply if causal else lambda *tensors: function.apply(*tensors, False)
    out, mass = folded(apply, query, key, value, score)
    if prefix[1] is not None:
        weights = (scores.softmax(-1) * mass.unsqueeze(-1)).to(out.dtype)
        v0 = prefix[1].to(out.dtype).repeat_interleave(repeat, -3)
        out = out + (weights.unsqueeze(-1) * v0.expand(len(out), *v0.shape[-3:]).unsqueeze(2)).sum(3)
    return out, mass.to(out.dtype)


def joined(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: Prefix,
    mask: Tensor | None,
    with_mass: bool,
    dropout: float,
    causal: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Output and zero attention with the prefix among the keys; the general form."""
    length, head_dim, scale = query.shape[2], query.shape[3], query.shape[3] ** -0.5
    key, value, n_prefix = _put_before(key, value, prefix)
    causal = causal and mask is None and length > 1
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
    # Under torch.jit.trace sizes are tensors, and so is what is made of them.
    # A length that is not known yet, of a program in the making, makes no truth value: it is asked for here.
    how: dict[str, Any] = {"dropout_p": dropout, "scale": float(scale)}
    how["is_causal"] = True if causal else False  # noqa: SIM210
    how["enable_gqa"] = bool(query.shape[1] != key.shape[1])
    if mask is not None and (mask.dim() < 4 or len(mask) != len(query)):  # one for all sequences
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, **how)
    if mask is not None:
        return folded(partial(scaled_dot_product_attention, **how), query, key, value, mask)
    return folded(partial(scaled_dot_product_attention, **how), query, key, value)


def _put_before(key: Tensor, value: Tensor, prefix: Prefix) -> tuple[Tensor, Tensor, int]:
    """Keys and values [B, H_kv, M + S, d] with the prefix in front, and M."""
    first = prefix[0].to(key.dtype)
    n_prefix = first.shape[-2]
    key = torch.cat([first.expand(key.shape[0], *first.shape[-3:]), key], 2)
    if prefix[1] is None:
        return key, pad(value, (0, 0, n_prefix, 0)), n_prefix
    second = prefix[1].to(value.dtype)
    return key, torch.cat([second.expand(value.shape[0], *second.shape[-3:]), value], 2), n_prefix
