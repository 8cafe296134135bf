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
        n_prefix: M tokens in front, which every token sees.
        rotation: cosines and sines [B or 1, 1, T, d] (llama).
        cache: one slot a step.
        with_mass: whether the caller wants the attention on zero tokens.
        like: a tensor of the attention's type and device.
        attend: how queries meet keys, in general by the function of that name; far: those of an earlier step.
        documents: [B, S], which document each key is of: a token sees its own alone. None: all are of one.
        pairs: additive [B or 1, H or 1, T, S], which query sees which key, in the place of causality; None: causal.
        causal: whether a query sees no key behind it; ``attend`` is told, too, as there may be no mask.
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
    far: Attend = attend
    documents: Tensor | None = None
    pairs: Tensor | None = None
    causal: bool = True
    mask: Tensor | None = field(init=False)
    prefix_mask: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        self.mask = self._mask(0)
        self.prefix_mask = self._mask(self.n_prefix) if self.n_prefix else None

    def _mask(self, n_prefix: int) -> Tensor | None:
        """Additive mask for ``attend``, None where the kernel's own causal form serves."""
        if self.pairs is not None:
            mask = pad(self.pairs, (n_prefix, 0))
        elif self.visible is None and self.documents is None and (self.length == 1 or self.length == self.total):
            return None
        elif not self.causal:
            mask = self.like.new_zeros(self.length, n_prefix + self.total)
        else:
            mask = causal_mask(self.length, self.total, n_prefix, self.like)
        if self.visible is not None:
            mask = self._without(mask, ~self.visible[:, None, None], n_prefix)
        if self.documents is not None:
            own = self.documents[:, None, -self.length :, None]
            mask = self._without(mask, own != self.documents[:, None, None], n_prefix)
        return mask

    def _without(self, mask: Tensor, hidden: Tensor, n_prefix: int) -> Tensor:
        """The mask [.., T, M + S] with the keys hidden too, [B, 1, T or 1, S]."""
        lowest = torch.finfo(mask.dtype).min
        barred = torch.zeros_like(hidden, dtype=mask.dtype).masked_fill(hidden, lowest)
        # The lowest finite number instead of -inf: a row that may see nothing (of padding) must not become NaN.
        return torch.minimum(mask.clamp_min(lowest), pad(barred, (n_prefix, 0)))

    def seeing(self, keys: Tensor) -> Context:
        """The same with only the keys [B, S] visible, of those that were."""
        return replace(self, visible=keys if self.visible is None else keys & self.visible)

    def of(self, rows: Tensor) -> Context:
        """The same for the sequences ``rows`` [N] alone. No cache."""
        turn = None if self.rotation is None else (rows_of(self.rotation[0], rows), rows_of(self.rotation[1], rows))
        visible, documents, pairs = (
            None if whole is None else rows_of(whole, rows) for whole in (self.visible, self.documents, self.pairs)
        )
        return replace(self, visible=visible, rotation=turn, cache=None, documents=documents, pairs=pairs)

    def at(self, index: Tensor) -> Context:
        """The same for the tokens index [B, k] of each sequence, in ascending order, as queries and keys. No cache."""
        k = index.shape[1]
        visible, documents = (
            None if whole is None else whole.expand(len(index), -1).gather(1, index)
            for whole in (self.visible, self.documents)
        )
        rotation = pairs = None
        if self.rotation is not None:
            at = index[:, None, :, None].expand(-1, -1, -1, self.rotation[0].shape[-1])
            cos, sin = (table.expand(len(index), -1, -1, -1).gather(2, at) for table in self.rotation)
            rotation = cos, sin
        if self.pairs is not None:
            _, heads, _, total = self.pairs.shape
            queries = index[:, None, :, None].expand(-1, heads, -1, total)
            pairs = self.pairs.expand(len(index), -1, -1, -1).gather(2, queries)
            pairs = pairs.gather(3, index[:, None, None].expand(-1, heads, k, -1))
        return replace(self, length=k, total=k, visible=visible, rotation=rotation, documents=documents, pairs=pairs)


def rows_of(tensor: Tensor, rows: Tensor) -> Tensor:
    """The rows of a tensor [B or 1, ...]: one that the batch shares as it is."""
    return tensor if len(tensor) == 1 else tensor[rows]
