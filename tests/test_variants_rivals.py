"""Rivals of 2025-26 against their published equations, which are stated here on their own, token by token."""

from __future__ import annotations

import pytest
import torch
from plain import embed, logits, run_block
from settings import make, tokens
from torch.nn.functional import layer_norm

T, CYCLES, MIDDLE = 5, 3, (1, 2)  # four blocks: prelude 0, cycled 1 and 2, coda 3


def test_sandwich_norms_are_before_and_after_each_branch() -> None:
    lm, x = make("bc", {}, norm="sandwich"), tokens(2, T)
    hidden = embed(lm, x)
    for block in [0, 1, 2, 3] * CYCLES:
        after = lm.blocks[block].after

        def gives(branch: str, update: torch.Tensor, after: torch.nn.ModuleDict = after) -> torch.Tensor:
            return layer_norm(update, update.shape[-1:], after[branch].weight, after[branch].bias).detach()

        hidden = run_block(lm, block, hidden, gives=gives)
    torch.testing.assert_close(lm(x).logits, logits(lm, hidden))


@pytest.mark.parametrize("n_cycles", [CYCLES, 5])
@pytest.mark.parametrize("scale", ["scalar", "channel"])
def test_each_cycle_has_norms_scales_and_biases_of_its_own(scale: str, n_cycles: int) -> None:
    lm, x = make("per_cycle", {"cycle_scale": scale, "cycle_bias": True}), tokens(2, T)
    own = {name: parameter.detach() for name, parameter in lm.adapter.named_parameters()}
    assert all(len(table) == CYCLES * len(MIDDLE) for table in own.values())
    hidden = run_block(lm, 0, embed(lm, x))
    for cycle in range(n_cycles):
        for place, block in enumerate(MIDDLE):
            row = min(cycle, CYCLES - 1) * len(MIDDLE) + place

            def reads(branch: str, z: torch.Tensor, row: int = row) -> torch.Tensor:
                return (1 + own[f"gain.{branch}"][row]) * z + own[f"shift.{branch}"][row]

            def gives(branch: str, update: torch.Tensor, row: int = row) -> torch.Tensor:
                return own[f"scale.{branch}"][row] * update

            hidden = run_block(lm, block, hidden + own["bias"][row], reads=reads, gives=gives)
    torch.testing.assert_close(lm(x, n_cycles=n_cycles).logits, logits(lm, run_block(lm, 3, hidden)))


def test_what_is_per_cycle_starts_as_head_tail_cycling() -> None:
    lm = make("per_cycle", {"cycle_bias": True}, perturb=False)
    assert torch.equal(lm(tokens()).logits, make("htc", {}, perturb=False)(tokens()).logits)
