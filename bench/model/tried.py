"""Parts that do not come with the suite, tried before anything is trained with them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from bench.errors import UserError, shown
from bench.model.network import Network
from bench.model.parts import Branch, Gate
from bench.model.schedule import Step
from bench.registry import SUITE

M = TypeVar("M", bound=Network)
MADE_BY = {"prefix": "attention_prefix", "adapter": "adapter", "recurrence": "recurrence", "gate": "gate"}
"""The method of a variant that makes each part."""


@contextmanager
def all_set(tensors: Callable[[], Mapping[str, Tensor]], variant: str) -> Iterator[None]:
    """Around ``reset_parameters`` of a variant's parts, which must set every number of these tensors, told by their
    paths: what memory happens to hold would be where they start from.

    Raises UserError for the first tensor that is not set.
    """
    for tensor in tensors().values():
        if tensor.is_floating_point():
            tensor.detach().fill_(torch.nan)
    yield
    for key, tensor in tensors().items():  # asked for again: a part may have put others in their place
        if tensor.isnan().any():
            raise UserError(f"variant {variant!r}: {key} is not set by reset_parameters() of the part that it is of")


def check_parts(lm: Network) -> None:
    """Raises UserError for a parameter of a part from outside that is not set; lm: without storage. Parts of the suite
    are under its tests.
    """
    names = [
        name for name in MADE_BY if type(getattr(lm, name)).__module__.partition(".")[0] not in (*SUITE, "builtins")
    ]
    if not names:
        return
    made = {name: getattr(lm.variant, MADE_BY[name])(lm.model_shape, lm.schedule) for name in names}
    tried = copy.copy(lm)  # shallow: what is not tried stays without storage
    tried._modules = {**lm._modules, **made}

    def tensors() -> dict[str, Tensor]:
        return {f"{name}.{key}": tensor for name, part in made.items() for key, tensor in part.named_parameters()}

    with all_set(tensors, lm.variant.name):
        tried.reset_parameters(0, tuple(names))


def telling(lm: M) -> M:
    """The model, which is run once, without numbers; its gate tells by its name where it gives no stream."""
    if lm.gate is not None:
        vars(lm.gate)["merge"] = partial(_merge, lm.gate)
    return lm


def _merge(
    gate: Gate, step: Step, branch: Branch, hidden: Tensor, update: Tensor, zero_attention: Tensor | None
) -> Tensor:
    """``gate.merge``. Raises TypeError, with the gate's name, for what is no stream."""
    found: object = type(gate).merge(gate, step, branch, hidden, update, zero_attention)
    if not isinstance(found, Tensor) or found.shape != hidden.shape:
        given = f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else shown(found)
        name, allowed = getattr(gate, "name", type(gate).__name__), f"the new stream, a tensor {tuple(hidden.shape)}"
        raise TypeError(f"gate {name!r}: merge() returns {given} (allowed: {allowed})")
    return found
