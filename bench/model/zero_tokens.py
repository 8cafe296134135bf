"""The Zero-Token Pool (arXiv 2502.12214, section 3.2): trainable keys with value zero, picked by a lookup."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bench.config import ModelConfig
from bench.model.parts import AttentionPrefix, Lookup, StepTable
from bench.schedule import Step

KEY_STD = 0.02


class ZeroTokenPool(AttentionPrefix):
    """Zero tokens for the given steps.

    lookup: which entry a step takes: its own (``step``), its cycle's, its block's, or the one entry shared by all;
    n_tokens: M zero tokens in an entry; learned_value: values trained from zero instead of fixed at zero;
    frozen_key: keys stay at their random start. Keys are [entries, H_kv, M, d]; no rotary embedding is applied to them.
    """

    label = "zero tokens"

    def __init__(
        self,
        model: ModelConfig,
        steps: Sequence[Step],
        lookup: Lookup = "step",
        n_tokens: int = 1,
        learned_value: bool = False,
        frozen_key: bool = False,
    ) -> None:
        super().__init__()
        self.n_tokens, self.trained_key = n_tokens, not frozen_key
        self.rows = StepTable(steps, lookup)
        shape = (len(self.rows), model.kv_heads, n_tokens, model.head_dim)
        if frozen_key:
            self.register_buffer("key", torch.empty(shape))
        else:
            self.key = nn.Parameter(torch.empty(shape))
        self.value = nn.Parameter(torch.empty(shape)) if learned_value else None

    def reset_parameters(self) -> None:
        nn.init.normal_(self.key, std=KEY_STD)
        if self.value is not None:
            nn.init.zeros_(self.value)

    def covers(self, step: Step) -> bool:
        return step in self.rows

    def forward(self, step: Step, hidden: Tensor) -> tuple[Tensor, Tensor | None] | None:
        if step not in self.rows:
            return None
        row = self.rows[step]
        return self.key[row], None if self.value is None else self.value[row]
