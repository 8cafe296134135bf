"""The fused zero-token attention against the plain formula: output, zero attention and every gradient, float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.model.attention import Prefix, attend, attend_formula, causal_mask, joined


def inputs(
    batch: int, heads: int, kv_heads: int, length: int, dim: int, n_prefix: int, learned_value: bool
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length * 1000 + dim)
    shapes = [
        (batch, heads, length, dim),
        (batch, kv_heads, length, dim),
        (batch, kv_heads, length, dim),
        (kv_heads, n_prefix, dim),
    ]
    if learned_value:
        shapes.append((kv_heads, n_prefix, dim))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def check(form: Callable[..., Any], tensors: list[torch.Tensor], with_mass: bool) -> None:
    query, key, value, k0, *v0 = tensors
    prefix = (k0, v0[0] if v0 else None)
    expected, mass = attend_formula(query, key, value, prefix)
    out, found = form(query, key, value, prefix, None, with_mass, 0.0)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    reference_loss, loss = (expected * weight).sum(), (out * weight).sum()
    if with_mass:
        assert found is not None
        torch.testing.assert_close(found, mass, rtol=0, atol=1e-10)
        reference_loss, loss = reference_loss + (mass**2).sum(), loss + (found**2).sum()
    else:
        assert found is None
    for got, want in zip(torch.autograd.grad(loss, tensors), torch.autograd.grad(reference_loss, tensors), strict=True):
        assert want.abs().max() > 1e-3  # a gradient that vanishes would prove nothing
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 2),
    length=st.integers(2, 20),
    dim=st.sampled_from([2, 5, 8, 16]),
    n_prefix=st.integers(1, 4),
    learned_value=st.booleans(),
    with_mass=st.booleans(),
)
def test_fused_equals_formula(
    batch: int, kv_heads: int, group: int, length: int, dim: int, n_prefix: int, learned_value: bool, with_mass: bool
) -> None:
    tensors = inputs(batch, kv_heads * group, kv_heads, length, dim, n_prefix, learned_value)
    for form in (attend, joined):  # what the CPU takes, and what other devices take
        check(form, tensors, with_mass)


def test_long_sequences() -> None:
    for form in (attend, joined):
        check(form, inputs(1, 2, 2, 700, 8, 2, False), True)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_zero_attention_keeps_its_gradient_when_the_output_has_little_or_none(scale: float) -> None:
    """The gradient of the zero attention travels on that of the output: it must survive where that one vanishes."""
    tensors = inputs(2, 3, 3, 11, 8, 2, False)
    query, key, value, k0 = tensors
    prefix: Prefix = (k0, None)
    weight = torch.randn(11, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight[3:6] = 0
    gradients = []
    for out, mass in (attend(query, key, value, prefix, with_mass=True), attend_formula(query, key, value, prefix)):
        assert mass is not None
        loss = scale * (out * weight).sum() + max(scale, 1.0) * mass.square().sum()
        gradients.append(torch.autograd.grad(loss, [query, key, k0]))
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10 * max(scale, 1.0))


def test_zero_value_scales_the_plain_output_by_one_minus_p0() -> None:
    query, key, value, k0 = inputs(2, 3, 3, 9, 8, 2, False)
    plain, _ = attend(query, key, value)
    scaled, p0 = attend(query, key, value, (k0, None), with_mass=True)
    assert p0 is not None
    torch.testing.assert_close(scaled, plain * (1 - p0).unsqueeze(-1), rtol=0, atol=1e-12)


def test_without_a_prefix_it_is_plain_causal_attention() -> None:
    query, key, value, _ = inputs(2, 3, 3, 9, 8, 1, False)
    torch.testing.assert_close(attend(query, key, value)[0], attend_formula(query, key, value)[0], rtol=0, atol=1e-12)


def test_one_query_over_a_cache_sees_prefix_and_past() -> None:
    query, key, value, k0 = inputs(2, 2, 2, 7, 8, 3, False)
    full, mass = attend(query, key, value, (k0, None), with_mass=True)
    last, last_mass = attend(query[:, :, -1:], key, value, (k0, None), with_mass=True)
    assert mass is not None and last_mass is not None
    torch.testing.assert_close(last[:, :, 0], full[:, :, -1], rtol=0, atol=1e-12)
    torch.testing.assert_close(last_mass[:, :, 0], mass[:, :, -1], rtol=0, atol=1e-12)


def test_causal_mask_pattern() -> None:
    mask = causal_mask(2, 3, 1, torch.zeros(()))
    assert (mask == 0).tolist() == [[True, True, True, False], [True, True, True, True]]


def test_scaling_by_the_log_sum_exp_would_have_the_wrong_gradient() -> None:
    """Why the prefix is given to the kernel: the shortcut's output is right and its gradient is not."""
    query, key, value, k0 = inputs(1, 2, 2, 12, 8, 1, False)
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = op(query, key, value, 0.0, True)
    shortcut = out * torch.sigmoid(lse - (query @ k0[None].mT).squeeze(-1) * 8**-0.5).unsqueeze(-1)
    exact, _ = attend(query, key, value, (k0, None))
    torch.testing.assert_close(shortcut, exact, rtol=0, atol=1e-10)
    wrong, right = (torch.autograd.grad(x.square().sum(), query, retain_graph=True)[0] for x in (shortcut, exact))
    assert (wrong - right).norm() / right.norm() > 0.01
