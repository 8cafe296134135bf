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


@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_heads_of_attention(kv_heads: int, rotary: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.model.kernels.PIECE", 1)
    x, angle = draw(2, 7, (4 + 2 * kv_heads) * 16), 10 * draw(7, 8).abs()

    def fast(x: Tensor) -> Tensor:
        twice = torch.cat([angle, angle], -1)
        heads = kernels.attention_heads(x, 4, kv_heads, (twice.cos(), twice.sin()) if rotary else None)
        assert {type(part.grad_fn).__name__ for part in heads} == {"_HeadsBackward"}
        return torch.cat(heads, 1)

    def formula(x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (-1, 16)).transpose(1, 2)
        turns, value = heads[:, :-kv_heads], heads[:, -kv_heads:]
        return torch.cat([turned(turns, angle.double()) if rotary else turns, value], 1)

    agree(fast, formula, x)


@pytest.mark.parametrize("piece", [2**18, 100])
@pytest.mark.parametrize("shape", SHAPES)
def test_gelu_in_its_tanh_form(shape: tuple[int, ...], piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.model.kernels.PIECE", piece)
    x = 4 * draw(*shape)

    def formula(x: Tensor) -> Tensor:
        return x * (1 + ((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh()) / 2

    agree(kernels.gelu_tanh, formula, x)
    with torch.no_grad():
        torch.testing.assert_close(kernels.gelu_tanh(x), formula(x.double()).float(), rtol=1e-6, atol=1e-6)
        ends = torch.tensor([-1e30, -50.0, 0.0, 50.0, 1e15, torch.inf, torch.nan])
    found = kernels.gelu_tanh(ends.requires_grad_())
    found[1:5].sum().backward()
    assert torch.equal(found[1:5], torch.tensor([0.0, 0.0, 50.0, 1e15])) and found[5] == torch.inf and found[6].isnan()
    assert ends.grad is not None and torch.equal(ends.grad[1:5], torch.tensor([0.0, 0.5, 1.0, 1.0]))


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_swiglu(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.model.kernels.PIECE", 1)

    def formula(x: Tensor) -> Tensor:
        gate, up = x.tensor_split(2, -1)
        return gate / (1 + (-gate).exp()) * up

    agree(kernels.swiglu, formula, draw(*shape))
    assert seen(lambda: kernels.swiglu(draw(*shape).requires_grad_())) == "_SwigluBackward"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(2, 256), (1, 512), (700,)])
def test_wide_linear_layers(rows: tuple[int, ...], bias: bool) -> None:
    tensors = [draw(*rows, 128), draw(136, 128), *([draw(136)] if bias else [])]
    agree(kernels.linear, functional.linear, *tensors)
    named = seen(lambda: kernels.linear(*tensors))
    assert (named == "_LinearBackward") == kernels._onednn(), named


def test_where_operations_are_looked_at_they_are_pytorchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.model.kernels.PIECE", 1)
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
    assert "_Swiglu" not in seen(lambda: torch.vmap(kernels.swiglu)(x))
    rows = x[None, None]
    assert "_Heads" not in seen(lambda: torch.vmap(lambda row: kernels.attention_heads(row, 2, 1, None)[0])(rows))
