"""Models of one shape run as a stack under ``torch.vmap`` (``bench.train.packing``): what is done to all at once.

Where vmap's own rule for an operation is slow or missing, the operation is done here on the tensors of the whole stack.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.nn import functional


def folded(kernel: Callable[..., Any], *tensors: Tensor) -> Any:
    """``kernel`` of tensors [B, ...], whose rows do not know of one another: in a stack of S models it is one call with
    [S B, ...].
    """
    level = _level(*tensors)
    if level is None:
        return kernel(*tensors)
    size = max(_whole(tensor).shape[0] for tensor in tensors if functorch.is_batchedtensor(tensor))
    flat = [_whole(tensor, size).flatten(0, 1) for tensor in tensors]
    with temporarily_pop_interpreter_stack():  # an ordinary call, which an autograd.Function may be asked for too
        found = kernel(*flat)
    if isinstance(found, Tensor):
        return functorch._add_batch_dim(found.unflatten(0, (size, -1)), 0, level)
    return tuple(functorch._add_batch_dim(tensor.unflatten(0, (size, -1)), 0, level) for tensor in found)


def of_all(tensor: Tensor) -> bool:
    """Whether all models of a stack share the tensor."""
    return not functorch.is_batchedtensor(tensor)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``; of a stack with weights of its own [S, out, in] one batched product."""
    level = _level(weight)
    if level is None:
        return functional.linear(x, weight, bias)
    stack = _whole(weight)
    inputs = _whole(x, len(stack))
    rows, transposed = inputs.flatten(1, -2), stack.transpose(1, 2)
    if bias is None:
        out = torch.bmm(rows, transposed)
    else:
        out = torch.baddbmm(_whole(bias, len(stack)).unsqueeze(1), rows, transposed)
    return functorch._add_batch_dim(out.view(*inputs.shape[:-1], -1), 0, level)


def _level(*tensors: Tensor) -> int | None:
    return next((functorch.maybe_get_level(t) for t in tensors if functorch.is_batchedtensor(t)), None)


def _whole(tensor: Tensor, size: int = 0) -> Tensor:
    """[S, ...]: the tensor of the whole stack, or one that the models share, S = size times."""
    if not functorch.is_batchedtensor(tensor):
        return tensor.expand(size, *tensor.shape)
    return functorch.get_unwrapped(tensor).movedim(functorch.maybe_get_bdim(tensor), 0)
