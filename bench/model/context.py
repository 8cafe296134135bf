"""What the steps of one forward pass share."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from bench.model.attention import Attend, attend, causal_mask

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

Rotation = tuple[Tensor, Tensor]


@dataclass
class Context:
    """What the steps of one forward pass share.

    Attributes:
        length, total: T queries, the last of S keys.
        visible: [B, S], the keys that may be seen, None for all.
        n_prefix: M tokens in front.
        rotation: cosines and sines [B or 1, 1, T, d] (llama).
        cache: one slot a step.
        with_mass: whether the caller wants the attention on zero tokens.
        like: a tensor of the attention's type and device.
        attend: how queries meet keys, in general by the function of that name.
        mask: made from these: additive, [.., T, S], None for plain causal.
        prefix_mask: the same with the prefix's columns in front.
    """

    length: int
    total: int
    visible: Tensor | None
    n_prefix: int
    rotation: Rotation | None
    cache: Cache | None
    with_mass: bool
    like: Tensor
    attend: Attend = attend
    mask: Tensor | None = field(init=False)
    prefix_mask: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        self.mask = self._mask(0)
        self.prefix_mask = self._mask(self.n_prefix) if self.n_prefix else None

    def _mask(self, n_prefix: int) -> Tensor | None:
        """Additive mask for ``attend``, None where the kernel's own causal form serves."""
        if self.visible is None and (self.length == 1 or self.length == self.total):
            return None
        mask = causal_mask(self.length, self.total, n_prefix, self.like)
        if self.visible is None:
            return mask
        # The lowest finite number instead of -inf: a row that may see nothing (of padding) must not become NaN.
        lowest = torch.finfo(mask.dtype).min
        hidden = torch.zeros_like(self.visible, dtype=mask.dtype).masked_fill(~self.visible, lowest)
        return torch.minimum(mask.clamp_min(lowest), pad(hidden, (n_prefix, 0))[:, None, None])

    def seeing(self, keys: Tensor) -> Context:
        """The same with only the keys [B, S] visible, of those that were."""
        return replace(self, visible=keys if self.visible is None else keys & self.visible)

    def at(self, index: Tensor) -> Context:
        """The same for the tokens index [B, k] of each sequence, in ascending order, as queries and keys. No cache."""
        k = index.shape[1]
        visible = None if self.visible is None else self.visible.gather(1, index)
        rotation = None
        if self.rotation is not None:
            at = index[:, None, :, None].expand(-1, -1, -1, self.rotation[0].shape[-1])
            cos, sin = (table.expand(len(index), -1, -1, -1).gather(2, at) for table in self.rotation)
            rotation = cos, sin
        return replace(self, length=k, total=k, visible=visible, rotation=rotation)
