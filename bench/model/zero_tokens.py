"""The Zero-Token Pool (arXiv 2502.12214): trainable keys with value zero, picked by a lookup."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from bench.config import ModelConfig
from bench.model.parts import AttentionPrefix, Lookup, StepTable
from bench.model.schedule import Step

PoolLookup = Literal[Lookup, "routed"]
KEY_STD = 0.02


class ZeroTokenPool(AttentionPrefix):
    """Zero tokens for the given steps. Keys are [entries, H_kv, M, d]; no rotary embedding is applied to them.

    A step may pick from the pool's entries by a trained query (``routed``): it takes the entries weighted by the
    softmax of ``query.address / sqrt(d)``. Choice: the query belongs to the step and not to the token. Attention to all
    entries (``n_tokens = pool_size``) is already a pick by each token; this one learns which steps share an entry.

    Attributes:
        lookup: which entry a step takes: its own (``step``), its cycle's, its block's, the one entry shared by all, or
            what it picks (``routed``).
        n_tokens: M zero tokens in an entry.
        pool_size: entries to pick from.
        learned_value: values are trained from zero instead of fixed at zero.
        frozen_key: keys stay at their random start.
    """

    label = "zero tokens"

    def __init__(
        self,
        model: ModelConfig,
        steps: Sequence[Step],
        lookup: PoolLookup = "step",
        n_tokens: int = 1,
        pool_size: int = 1,
        learned_value: bool = False,
        frozen_key: bool = False,
    ) -> None:
        super().__init__()
        self.n_tokens, self.trained_key = n_tokens, lookup == "routed" or not frozen_key
        self.rows = StepTable(steps, "step" if lookup == "routed" else lookup)
        routed, size = (True, pool_size) if lookup == "routed" else (False, len(self.rows))
        self.query = nn.Parameter(torch.empty(len(self.rows), model.head_dim)) if routed else None
        self.address = nn.Parameter(torch.empty(size, model.head_dim)) if routed else None
        shape = (size, model.kv_heads, n_tokens, model.head_dim)
        if frozen_key:
            self.register_buffer("key", torch.empty(shape))
        else:
            self.key = nn.Parameter(torch.empty(shape))
        self.value = nn.Parameter(torch.empty(shape)) if learned_value else None

    def reset_parameters(self) -> None:
        nn.init.normal_(self.key, std=KEY_STD)
        if self.value is not None:
            nn.init.zeros_(self.value)
        if self.query is not None and self.address is not None:
            nn.init.normal_(self.query)
            nn.init.normal_(self.address)

    def covers(self, step: Step) -> bool:
        return step in self.rows

    def forward(self, step: Step, hidden: Tensor) -> tuple[Tensor, Tensor | None] | None:
        if step not in self.rows:
            return None
        row = self.rows[step]
        if self.query is None or self.address is None:
            return self.key[row], None if self.value is None else self.value[row]
        # Element-wise sums: this is once a step and not for every token.
        scores = (self.query[row] * self.address).sum(-1) * self.address.shape[-1] ** -0.5
        share = scores.softmax(0).view(-1, 1, 1, 1)
        return (share * self.key).sum(0), None if self.value is None else (share * self.value).sum(0)
