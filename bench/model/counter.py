"""PyTorch's own counter of FLOPs, which the suite's counts are held against, and where they are taken from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from bench.config import Count
from bench.model.attention import pairs

Shape = Sequence[int]


def counted_flops(run: Callable[[], Any], count: Count = "full") -> int:
    """FLOPs that PyTorch's own counter sees while ``run`` is called; count: of causal attention."""
    with flop_counter(count) as counter:
        run()
    return counter.get_total_flops()


def flop_counter(count: Count = "full") -> FlopCounterMode:
    """PyTorch's own counter, a context manager, which knows the CPU's fused attention too. count: of causal attention
    (``bench.model.attention.pairs``); PyTorch itself counts it in full.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_cpu_attention(count))
    counter.mod_tracker = _Whole()  # type: ignore[assignment]
    return counter


class _Whole:
    """In the place of what tells PyTorch's counter which module runs: nobody asks, and views of parameters stop it."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _cpu_attention(count: Count) -> dict[Any, Callable[..., int]]:
    aten = torch.ops.aten

    def forward(q: Shape, k: Shape, v: Shape, dropout: float = 0.0, causal: bool = False, **_: Any) -> int:
        return _seen(sdpa_flop_count(q, k, v), q, causal)

    def backward(grad: Shape, q: Shape, k: Shape, v: Shape, *rest: Any, **_: Any) -> int:
        return _seen(sdpa_backward_flop_count(grad, q, k, v), q, rest[3])  # after output, log-sum-exp and dropout

    def _seen(flops: int, q: Shape, causal: bool) -> int:
        return flops // q[-2] ** 2 * pairs(q[-2], True, count) if causal else flops

    return {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
