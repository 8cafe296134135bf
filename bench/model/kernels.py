"""Linear layers, RMSNorm and rotary embedding as a CPU computes them fastest in float32, by the same formulas.

PyTorch has no kernel of its own for the last two on a CPU and runs a chain of operations, each a pass over memory, with
twice as many in the backward pass; for linear layers it calls MKL, which does not use all of the instructions of a CPU
that is not Intel's, while oneDNN, which PyTorch carries as well, does, and adds the bias on its way. What stands here
is for a plain call alone: under a compiler, a tracer, ``torch.func`` (stacks of models) or a mode that looks at the
operations (counting FLOPs), on another device or in another precision, PyTorch's own operations are called.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

WIDE, MANY = 128, 512  # from so many features in and out, and rows, on oneDNN wins over MKL (x86-64, one thread)
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


def _turned(x: Tensor, cosine: Tensor, sine: Tensor, way: int) -> Tensor:
    """x rotated by the angles, or, ``way`` = -1, back."""
    half = x.shape[-1] // 2
    out, sine = x * cosine, sine[..., :half]
    out[..., :half].addcmul_(x[..., half:], sine, value=-way)
    out[..., half:].addcmul_(x[..., :half], sine, value=way)
    return out
