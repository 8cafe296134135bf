"""What a CPU computes by its own fast forms against the formulas in float64, with every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from bench.model import kernels

SHAPES = [(4, 129), (3, 2, 256)]


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def turned(x: Tensor, angle: Tensor) -> Tensor:
    """The rotary embedding as products of complex numbers."""
    half = x.shape[-1] // 2
    found = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([found.real, found.imag], -1)


def rotated(x: Tensor, angle: Tensor) -> Tensor:
    twice = torch.cat([angle, angle], -1)
    return kernels.rotate(x, twice.cos(), twice.sin())


def agree(fast: Callable[..., Tensor], formula: Callable[..., Tensor], *tensors: Tensor) -> None:
    """Values and gradients of float32 are those of float64, to a few times the rounding."""
    ours = [tensor.requires_grad_() for tensor in tensors]
    theirs = [tensor.detach().double().requires_grad_() for tensor in tensors]
    found, wanted = fast(*ours), formula(*theirs)
    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    found.backward(weight)
    wanted.backward(weight.double())
    for got, want in [(found, wanted), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))]:
        assert got is not None and want is not None and want.abs().max() > 1e-2
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6 * float(want.detach().abs().max()))


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def seen(run: Callable[[], Tensor]) -> str:
    """The name of the last operation that autograd has noted."""
    return type(run().grad_fn).__name__


@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, ...]) -> None:
    agree(lambda x, w: kernels.rms_norm(x, w, 1e-5), rms, draw(*shape), draw(shape[-1]))


@pytest.mark.parametrize("cut", [slice(None), slice(1, 3)], ids=["whole", "view"])
def test_rotary_embedding(cut: slice) -> None:
    x, angle = draw(2, 4, 7, 16), 10 * draw(7, 8).abs()
    agree(lambda x: rotated(x[:, cut], angle), lambda x: turned(x[:, cut], angle.double()), x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(2, 256), (1, 512), (700,)])
def test_wide_linear_layers(rows: tuple[int, ...], bias: bool) -> None:
    tensors = [draw(*rows, 128), draw(136, 128), *([draw(136)] if bias else [])]
    agree(kernels.linear, functional.linear, *tensors)
    named = seen(lambda: kernels.linear(*tensors))
    assert (named == "_LinearBackward") == kernels._onednn(), named


def test_where_operations_are_looked_at_they_are_pytorchs_own() -> None:
    x, weight = draw(512, 128).requires_grad_(), draw(128, 128)
    with FlopCounterMode(display=False) as counter:
        named = seen(lambda: kernels.linear(x, weight))
        kernels.rms_norm(x, weight[0], 1e-5)
    assert named == "MmBackward0" and counter.get_total_flops() == 2 * 512 * 128 * 128
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kernels.linear(x, weight).dtype == torch.bfloat16
    double = kernels.linear(x.double(), weight.double())
    torch.testing.assert_close(torch.vmap(kernels.linear, (0, None))(x.double()[None], weight.double())[0], double)
    assert "_RMSNorm" not in seen(lambda: torch.vmap(lambda row: kernels.rms_norm(row, weight[0], 1e-5))(x))
