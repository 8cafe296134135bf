"""Attention, causal or full, with an optional prefix of tokens (zero tokens), on PyTorch's fused kernels.

For queries q, prefix keys k0 (M of them) and keys K: ``p = softmax([q.k0/sqrt(d), q.K/sqrt(d)])``, the output is
``sum_j p_j v_j`` and the zero attention ``p0`` the mass on the prefix (arXiv 2502.12214). Two exact forms are used:

* ``bench.model.zero_value`` (whole sequences): the plain kernel and its log-sum-exp;
* ``joined`` (with a mask or dropout, and where no kernel tells its log-sum-exp): the prefix is part of the keys the
  kernel sees, and an extra value column carries ``p0``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from bench.config import Count
from bench.form import TEXT, Form
from bench.model.attention_kernels import kernel_for
from bench.model.flops import Flops
from bench.model.stacks import folded, of_all
from bench.model.zero_value import with_lse

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
    kernel = kernel_for(query) if mask is None and query.shape[2] > 1 and not dropout else None
    if kernel is not None:
        out, mass = with_lse(query, key, value, prefix, kernel, causal)
        return out, mass if with_mass else None
    return joined(query, key, value, prefix, mask, with_mass, dropout, causal)


def attention_flops(
    n_heads: int,
    length: int,
    head_dim: int,
    n_prefix: int,
    with_mass: bool,
    trained_key: bool,
    queries: int | None = None,
    form: Form = TEXT,
    count: Count = "full",
) -> Flops:
    """FLOPs of ``attend`` on a whole sequence.

    Args:
        n_heads, length, head_dim: of the attention.
        n_prefix: tokens before the sequence that all see.
        with_mass: the attention to them is read.
        trained_key: their keys get a gradient.
        queries: only so many of the sequence's tokens ask, under a mask.
        form: of the sequence.
        count: of causal attention, see ``pairs``; a mask is counted in full.
    """
    asking = length if queries is None else queries
    if asking < length or form.padded or (n_prefix and length == 1):  # the prefix is among the keys
        wide = head_dim + (MASS_COLUMNS if with_mass and n_prefix else 0)
        return Flops(attention=4 * n_heads * asking * (length + n_prefix) * wide)
    scores = 2 * n_heads * length * head_dim * n_prefix
    kernel = 4 * n_heads * pairs(length, form.attention == "causal", count) * head_dim
    return Flops(attention=kernel, matmul=scores) if trained_key else Flops(attention=kernel, half=scores)


def pairs(length: int, causal: bool, count: Count) -> int:
    """Pairs of tokens that attention is counted for: all, or, where causal attention is counted as executed, each token
    with itself and those before it. PyTorch's CPU kernel leaves out blocks of 512 tokens, kernels of GPUs of about 128.
    """
    return length * (length + 1) // 2 if causal and count == "executed" else length * length


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
    if mask is not None and mask.dim() == 2 and of_all(mask):
        return folded(partial(scaled_dot_product_attention, attn_mask=mask, **how), query, key, value)
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
