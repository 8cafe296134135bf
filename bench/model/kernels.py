"""Linear layers, RMSNorm, GELU, SwiGLU and heads of attention as a CPU computes them fastest in float32, by the same
formulas.

PyTorch has no kernel of its own for RMSNorm and the rotary embedding on a CPU and runs a chain of operations, each a
pass over memory, with twice as many in the backward pass, which also joins the gradients of a matrix's parts in passes
of their own; for linear layers it calls MKL, which does not use all of the instructions of a CPU that is not Intel's,
while oneDNN, which PyTorch carries as well, does, and adds the bias on its way. What stands here is for a plain call
alone: under a compiler, a tracer, ``torch.func`` (stacks of models) or a mode that looks at the operations (counting
FLOPs), on another device or in another precision, PyTorch's own operations are called.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from bench.model.context import Rotation

WIDE, MANY = 128, 512  # from so many features in and out, and rows, on oneDNN wins over MKL (x86-64, one thread)
Heads = tuple[Tensor, Tensor, Tensor]
"""Queries [B, H, T, d], keys and values [B, H_kv, T, d]."""
LINEAR, CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715 * 2 * math.sqrt(2 / math.pi)  # of x and x^3, in GELU's 2 u
PIECE = 2**18  # numbers that are computed at once in several passes, and from which on fewer passes are worth a call
KINDS = (Tensor, nn.Parameter, FakeTensor)  # fake ones tell what would be kept in memory


def plain(*tensors: Tensor) -> bool:
    """Whether tensors are the CPU's own, in float32, and nothing looks at the operations on them."""
    return (
        all(t.dtype == torch.float32 and t.device.type == "cpu" and type(t) in KINDS for t in tensors)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_dispatch_stack() <= isinstance(tensors[0], FakeTensor)
    )


class Linear(nn.Linear):
    """``torch.nn.Linear``, on a CPU by oneDNN where that is faster."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., out] of [..., in]."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``: [..., out] of x [..., in], weight [out, in] and bias [out]."""
    size = min(weight.shape)
    if size < WIDE or x.numel() < MANY * weight.shape[1] or not plain(x, weight) or not _onednn():
        return functional.linear(x, weight, bias)
    out: Tensor = _Linear.apply(x, weight, bias)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``torch.nn.functional.rms_norm`` over the last dimension of x [..., D]; weight [D]."""
    if not plain(x, weight):
        return functional.rms_norm(x, weight.shape, weight, eps)
    out: Tensor = _RMSNorm.apply(x, weight, eps)
    return out


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` with fewer passes over memory on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] of the same."""
        assert self.weight is not None and self.eps is not None
        return rms_norm(x, self.weight, self.eps)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of x [B, H, T, d] (Su et al. 2021, half-split form); cosine and sine [B or 1, 1, T, d] repeat
    their first half.
    """
    if plain(x, cosine):
        out: Tensor = _Rotate.apply(x, cosine, sine)
        return out
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat([-second, first], -1) * sine


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """Heads [B, H, T, d] of x [B, T, H d]."""
    return x.view(*x.shape[:2], x.shape[2] // head_dim, head_dim).transpose(1, 2)


def attention_heads(x: Tensor, n_heads: int, kv_heads: int, rotation: Rotation | None) -> Heads:
    """Queries [B, H, T, d], keys and values [B, H_kv, T, d] of x [B, T, (H + 2 H_kv) d]; ``rotation``, cosine and sine
    as in ``rotate``, turns queries and keys.
    """
    if x.numel() >= PIECE and plain(x):  # of less, what is saved is not what the call costs
        out: Heads = _Heads.apply(x, n_heads, kv_heads, *(rotation or (None, None)))
        return out
    turned, value = split_heads(x, x.shape[2] // (n_heads + 2 * kv_heads)).split([n_heads + kv_heads, kv_heads], 1)
    query, key = (turned if rotation is None else rotate(turned, *rotation)).split([n_heads, kv_heads], 1)
    return query, key, value


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form, x (1 + tanh u) / 2, u = sqrt(2 / pi) (x + 0.044715 x^3) (Hendrycks and Gimpel 2016)."""
    if torch.compiler.is_compiling():  # it makes one pass of it, and a sigmoid is faster there, too
        return x * torch.sigmoid(x * (LINEAR + CUBIC * x * x))
    if not plain(x) or not x.is_contiguous():
        return functional.gelu(x, approximate="tanh")
    if not torch.is_grad_enabled():
        return _gelu_tanh(x)[0]
    out: Tensor = _GeluTanh.apply(x)
    return out


def swiglu(x: Tensor) -> Tensor:
    """SiLU of the first half of x [..., 2 F] times the second half, [..., F] (Shazeer 2020)."""
    if x.numel() >= PIECE and plain(x):
        out: Tensor = _Swiglu.apply(x)
        return out
    gate, up = x.chunk(2, -1)
    return functional.silu(gate) * up


@cache
def _onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            _product(grad, weight.t()) if for_x else None,
            rows.t() @ x.flatten(0, -2) if for_weight else None,
            rows.new_ones(len(rows)) @ rows if for_bias else None,  # as a product it is faster than a sum
        )


class _RMSNorm(torch.autograd.Function):
    """y = x r w with r = (mean x^2 + eps)^(-1/2), whose gradient for x is r w dy - x r^3 (x . w dy) / D."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(x, scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        products, rows = (grad * x).flatten(0, -2), scale.flatten()
        along = (products @ weight).mul_(rows**3).div_(-len(weight)).view_as(scale)
        return torch.mul(grad, weight).mul_(scale).addcmul_(x, along), rows @ products, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _turned(x, cosine, sine, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _turned(grad, cosine, sine, -1), None, None


class _Heads(torch.autograd.Function):
    """Views of one matrix, whose gradients are written into one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n_heads: int, kv_heads: int, cosine: Tensor | None, sine: Tensor | None) -> Heads:
        ctx.sizes = (n_heads, kv_heads)
        ctx.save_for_backward(cosine, sine)
        heads = split_heads(x, x.shape[2] // (n_heads + 2 * kv_heads))
        turned, value = heads[:, : n_heads + kv_heads], heads[:, n_heads + kv_heads :]
        if cosine is not None and sine is not None:
            turned = _turned(turned, cosine, sine, 1)
        return turned[:, :n_heads], turned[:, n_heads:], value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        n_heads, kv_heads = ctx.sizes
        cosine, sine = ctx.saved_tensors
        batch, _, length, head_dim = grads[0].shape
        out = grads[0].new_empty(batch, length, (n_heads + 2 * kv_heads) * head_dim)
        query, key, value = split_heads(out, head_dim).split([n_heads, kv_heads, kv_heads], 1)
        for grad, into in zip(grads[:2], (query, key), strict=True):
            if cosine is None:
                into.copy_(grad)
            else:
                _turned(grad, cosine, sine, -1, into)
        value.copy_(grads[2])
        return out, None, None, None, None


class _GeluTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out, slope = _gelu_tanh(x, slope=True)
        ctx.save_for_backward(slope)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return grad * slope


def _gelu_tanh(x: Tensor, slope: bool = False) -> tuple[Tensor, Tensor]:
    """x s with the sigmoid s = (1 + tanh u) / 2 of 2 u, and its slope s + 2 u' x s (1 - s), or s alone: a CPU computes
    a sigmoid in a sixth of the time of a tanh. In pieces that stay in its cache.
    """
    out, second = torch.empty_like(x), torch.empty_like(x)
    linear = torch.tensor(LINEAR)
    for one, product, s in zip(*(whole.view(-1).split(PIECE) for whole in (x, out, second)), strict=True):
        torch.addcmul(linear, one, one, value=CUBIC, out=s).mul_(one).sigmoid_()
        torch.mul(one, s, out=product)
        if slope:
            s.addcmul_(torch.addcmul(linear, one, one, value=3 * CUBIC), product.addcmul(product, s, value=-1))
    return out, second


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        inner = functional.silu(gate)
        ctx.save_for_backward(x, inner)
        return inner * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, inner = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        out = torch.empty_like(x)
        for_gate, for_up = out.chunk(2, -1)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=for_gate)
        torch.mul(grad, inner, out=for_up)
        return out


def _turned(x: Tensor, cosine: Tensor, sine: Tensor, way: int, out: Tensor | None = None) -> Tensor:
    """x rotated by the angles, or, ``way`` = -1, back; written into ``out`` if it is given."""
    half = x.shape[-1] // 2
    out, sine = torch.mul(x, cosine, out=out), sine[..., :half]
    out[..., :half].addcmul_(x[..., half:], sine, value=-way)
    out[..., half:].addcmul_(x[..., :half], sine, value=way)
    return out
