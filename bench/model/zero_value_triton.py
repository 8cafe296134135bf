"""``bench.model.zero_value`` on a GPU: what is done beside the fused attention kernel, in three small kernels.

One operation after another, the same arithmetic takes as long as the attention itself: each reads and writes the whole
output. Here every tensor is read once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from bench.model.attention_kernels import Kernel

ROWS = 64  # queries of one head that a program does at a time


@triton.jit
def _tile(length, SIZE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """A program's head (of all sequences), its rows [ROWS] and columns [WIDE], and which of them there are."""
    at, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, column = at * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDE)
    there, inside = row < length, column < SIZE
    return head, row, column, there, inside, there[:, None] & inside[None, :]


@triton.jit
def _places(head, heads, row, column, of_b, of_h, of_t):  # type: ignore[no-untyped-def]
    """Where the elements [ROWS, WIDE] of a tensor [B, H, T, d] with such strides lie."""
    return (head // heads) * of_b + (head % heads) * of_h + row[:, None] * of_t + column[None, :]


@triton.jit
def _score(q, k0, m, column, inside, SIZE: tl.constexpr, scale):  # type: ignore[no-untyped-def]  # noqa: N803
    """The key of zero token m [D] and the scores [ROWS] of queries [ROWS, D] with it."""
    key = tl.load(k0 + m * SIZE + column, mask=inside, other=0.0).to(tl.float32) * scale
    return key, tl.sum(q * key[None, :], 1)


@triton.jit
def _beside(  # type: ignore[no-untyped-def]
    q, k0, out, lse, mass, total, q_b, q_h, q_t, o_b, o_h, o_t, heads, length, scale,
    TOKENS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Z in the place of O, p0 and L, of O and l."""
    head, row, column, there, inside, tile = _tile(length, SIZE, WIDE, ROWS)
    queries = q + _places(head, heads, row, column, q_b, q_h, q_t)
    query = tl.load(queries, mask=tile, other=0.0).to(tl.float32)
    score = tl.full([ROWS], -float("inf"), tl.float32)
    for m in tl.static_range(TOKENS):
        _, one = _score(query, k0 + head * TOKENS * SIZE, m, column, inside, SIZE, scale)
        top = tl.maximum(score, one)
        score = top + tl.log(tl.exp(score - top) + tl.exp(one - top))
    known = tl.load(lse + head * length + row, mask=there, other=0.0)
    share = 1 / (1 + tl.exp(known - score))
    top = tl.maximum(known, score)
    both = top + tl.log(tl.exp(known - top) + tl.exp(score - top))
    tl.store(mass + head * length + row, share, mask=there)
    tl.store(total + head * length + row, both, mask=there)
    outputs = out + _places(head, heads, row, column, o_b, o_h, o_t)
    value = tl.load(outputs, mask=tile, other=0.0).to(tl.float32) * (1 - share)[:, None]
    tl.store(outputs, value.to(out.dtype.element_ty), mask=tile)


@triton.jit
def _handed_back(  # type: ignore[no-untyped-def]
    grad, grad_mass, out, mass, grad_made, out_made, slope, g_b, g_h, g_t, o_b, o_h, o_t, heads, length, tiny,
    READ: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """What the kernel's backward is handed for dZ and for Z, and ``dp0 - c``."""
    head, row, column, there, inside, tile = _tile(length, SIZE, WIDE, ROWS)
    gradients = grad + _places(head, heads, row, column, g_b, g_h, g_t)
    outputs = _places(head, heads, row, column, o_b, o_h, o_t)
    dz = tl.load(gradients, mask=tile, other=0.0).to(tl.float32)
    z = tl.load(out + outputs, mask=tile, other=0.0).to(tl.float32)
    centre = tl.sum(dz * z, 1)
    if READ:
        share = tl.load(mass + head * length + row, mask=there, other=0.0)
        dp0 = tl.load(grad_mass + head * length + row, mask=there, other=0.0).to(tl.float32)
        extra = share * dp0
        # No direction to carry it, if there is anything: take one too short to be seen in the result.
        norm = tl.sum(dz * dz, 1)
        short = norm < tiny * tiny
        need = short & (extra != 0)
        dz = tl.where(need[:, None], tl.where(inside[None, :], tiny, 0.0), dz)
        norm = tl.where(need, tiny * tiny * SIZE, tl.where(short, 1.0, norm))
        z += dz * (extra / norm)[:, None]
        tl.store(slope + head * length + row, dp0 - centre - extra, mask=there)
        tl.store(out_made + outputs, z.to(out.dtype.element_ty), mask=tile)
        tl.store(grad_made + outputs, dz.to(out.dtype.element_ty), mask=tile)
    else:
        tl.store(slope + head * length + row, -centre, mask=there)


@triton.jit
def _of_the_scores(  # type: ignore[no-untyped-def]
    grad, grad_key, q, k0, total, slope, g_b, g_h, g_t, q_b, q_h, q_t, heads, length, scale,
    TOKENS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """What the scores with the zero tokens add to the queries' gradient, and that of their keys, a program's share."""
    head, row, column, there, inside, tile = _tile(length, SIZE, WIDE, ROWS)
    query = tl.load(q + _places(head, heads, row, column, q_b, q_h, q_t), mask=tile, other=0.0)
    query = query.to(tl.float32)
    gradients = grad + _places(head, heads, row, column, g_b, g_h, g_t)
    dq = tl.load(gradients, mask=tile, other=0.0).to(tl.float32)
    whole = tl.load(total + head * length + row, mask=there, other=float("inf"))
    rise = tl.load(slope + head * length + row, mask=there, other=0.0)
    mine = grad_key + (head * tl.num_programs(0) + tl.program_id(0)) * TOKENS * SIZE
    for m in tl.static_range(TOKENS):
        key, score = _score(query, k0 + head * TOKENS * SIZE, m, column, inside, SIZE, scale)
        ds = tl.exp(score - whole) * rise
        dq += ds[:, None] * key[None, :]
        tl.store(mine + m * SIZE + column, tl.sum(ds[:, None] * query, 0) * scale, mask=inside)
    tl.store(gradients, dq.to(grad.dtype.element_ty), mask=tile)


class FusedZeroValue(torch.autograd.Function):
    """``ZeroValueAttention`` on a GPU, of the zero tokens' keys themselves.

    The scores' gradients are ``ds_m = p_m (dp0 - c)`` with the attention p_m on each of M zero tokens.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, k0: Tensor, kernel: Kernel, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """Z [B, H, T, d] and p0 [B, H, T] of query, key, value [B, H, T, d] and k0 [B, H, M, d]."""
        query, k0 = _rows(query), k0.contiguous()
        out, lse, rest = kernel.forward(query, key, value, causal)
        out, lse = _rows(out), lse.contiguous()
        mass, total = torch.empty_like(lse), torch.empty_like(lse)
        grid, shape, scale = _launch(query, k0)
        steps = (*query.stride()[:3], *out.stride()[:3])
        _beside[grid](query, k0, out, lse, mass, total, *steps, *query.shape[1:3], scale, k0.shape[2], *shape)
        ctx.kernel, ctx.causal = kernel, causal
        ctx.save_for_backward(query, key, value, k0, out, mass, total, *rest)
        ctx.set_materialize_grads(False)
        return out, mass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_mass: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of query, key, value and k0."""
        query, key, value, k0, out, mass, total, *rest = ctx.saved_tensors
        grid, shape, scale = _launch(query, k0)
        heads, length = query.shape[1:3]
        grad = torch.zeros_like(out) if grad is None else _rows(grad)
        slope, read = torch.empty_like(total), grad_mass is not None
        made = (torch.empty_like(out), torch.empty_like(out)) if read else (grad, out)
        asked = grad_mass.contiguous() if grad_mass is not None else mass
        tiny = torch.finfo(grad.dtype).tiny ** 0.4
        steps = (*grad.stride()[:3], *out.stride()[:3])
        _handed_back[grid](grad, asked, out, mass, *made, slope, *steps, heads, length, tiny, read, *shape)
        of_query, *others = ctx.kernel.backward(made[0], query, key, value, made[1], total, rest, ctx.causal)
        of_query = _rows(of_query)
        of_key = k0.new_empty(*k0.shape[:2], grid[0], *k0.shape[2:], dtype=torch.float)
        steps = (*of_query.stride()[:3], *query.stride()[:3])
        _of_the_scores[grid](
            of_query, of_key, query, k0, total, slope, *steps, heads, length, scale, k0.shape[2], *shape
        )
        return (of_query, *others, of_key.sum(2).to(k0.dtype), None, None)


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension in one piece."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _launch(query: Tensor, k0: Tensor) -> tuple[tuple[int, int], tuple[int, int, int], float]:
    """Programs of a kernel, the sizes it is made for, and what scores are scaled by."""
    batch, heads, length, size = query.shape
    grid = triton.cdiv(length, ROWS), batch * heads
    return grid, (size, triton.next_power_of_2(size), ROWS), size**-0.5
