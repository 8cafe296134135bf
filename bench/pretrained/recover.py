"""What sharing takes from a pretrained stack, and a variant's adapter can give back to every step.

Where a step runs at depth l, the stack had a linear layer W_l, c_l (weight, bias) behind a norm g_l, b_l (scale, shift)
and the shared block has W, c behind g, b. Of the shared norm's output y the stack's layer would have made
``W_l (g_l / g) y + W_l (b_l - (g_l / g) b) + c_l``: what the step lacks is a matrix and a bias.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bench.config import ModelConfig, Sharing
from bench.errors import UserError
from bench.model.parts import Adapter, Linear
from bench.model.schedule import Schedule
from bench.pretrained.stock import State

if TYPE_CHECKING:
    from bench.model.language_model import CycleModel

LAYERS: dict[Linear, tuple[str, str | None]] = {  # the name in a block, and of the norm that it reads
    "qkv": ("attention.qkv", "norm1"),
    "attention_out": ("attention.out", None),
    "mlp_up": ("mlp.up", "norm2"),
    "mlp_out": ("mlp.out", None),
}


def recovers(
    adapter: Adapter | None, model: ModelConfig, sharing: Sharing | None, n_source: int, schedule: Schedule
) -> bool:
    """Whether the adapter starts from what sharing takes from a stack of ``n_source`` blocks.

    Raises UserError if it should and the schedule is of another depth, so that no block of the stack stood where a step
    runs, or if updates are normed: what sharing takes from such a norm is behind the matrices.
    """
    if adapter is None or not adapter.recovers or sharing is None:
        return False
    if model.norm == "sandwich":
        raise UserError(
            "options.start: 'svd' cannot make up for the norms of updates that blocks share (allowed: 'zero', or a "
            "source whose model.norm is 'pre')"
        )
    if schedule.depth != n_source:
        raise UserError(
            f"options.start: 'svd' needs a schedule as deep as the source ({n_source} steps), not {schedule.depth} "
            "(change model.n_blocks or model.n_cycles, or set options.start to 'zero')"
        )
    return True


@torch.no_grad()
def recover(lm: CycleModel, stack: State) -> None:
    """Let the model's adapter make up for what its steps lack of the blocks of a stack, under our names."""
    assert lm.adapter is not None
    for step in lm.schedule.recurrent:
        shared, before = lm.blocks[step.block].state_dict(), f"blocks.{step.depth}."
        stood = {name.removeprefix(before): tensor for name, tensor in stack.items() if name.startswith(before)}
        # A product of differences: in single precision it would lose what it is for.
        now, then = ({name: tensor.double() for name, tensor in of.items()} for of in (shared, stood))
        for linear in lm.adapter.linears:
            layer, norm = LAYERS[linear]
            weight, bias = then[f"{layer}.weight"], None
            if f"{layer}.bias" in then:
                bias = then[f"{layer}.bias"] - now[f"{layer}.bias"]
            if norm is not None:
                scale = now[f"{norm}.weight"]
                gain = (then[f"{norm}.weight"] / scale).masked_fill(scale == 0, 0.0)
                if bias is not None:
                    bias = bias + weight @ (then[f"{norm}.bias"] - gain * now[f"{norm}.bias"])
                weight = weight * gain
            lm.adapter.recover(step, linear, weight - now[f"{layer}.weight"], bias)
