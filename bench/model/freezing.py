"""What is trained of a model: everything, or what its variant adds to plain blocks."""

from __future__ import annotations

from torch import nn

from bench.config import Trained
from bench.errors import UserError
from bench.model.network import Network
from bench.model.parts import PARTS


def freeze(lm: Network, trained: Trained) -> None:
    """Let gradients reach only what is trained: ``all``; ``additions``, the parts the variant attaches; or these and
    the norms. Raises UserError if nothing would be left to train.
    """
    if trained == "all":
        return
    norms = (
        {f"{name}." for name, module in lm.named_modules() if isinstance(module, nn.LayerNorm | nn.RMSNorm)}
        if trained == "additions+norms"
        else set()
    )
    chosen = tuple({f"{name}." for name in PARTS} | norms)
    for name, parameter in lm.named_parameters():
        parameter.requires_grad_(name.startswith(chosen))
    if not any(parameter.requires_grad for parameter in lm.parameters()):
        raise UserError(
            f"train.trained: {trained!r} leaves nothing to train in variant {lm.variant.name!r} "
            "(allowed: all, additions+norms)"
        )
