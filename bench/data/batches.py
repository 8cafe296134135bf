"""Batches as a function of seed and step alone: any step can be resumed, and a seed gives every variant the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bench.data.task import Tokens

if TYPE_CHECKING:
    from datasets import Dataset


def views(split: Dataset) -> tuple[NDArray[Any], NDArray[Any]]:
    """Inputs and targets of a split as they are held, each [N, T]: what is in one piece is not copied."""

    def column(name: str) -> NDArray[Any]:
        column = split.data.column(name)
        values = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        return values.flatten().to_numpy(zero_copy_only=True).reshape(len(values), -1)

    return column("input_ids"), column("targets")


def arrays(split: Dataset, first: int | None = None) -> tuple[Tokens, Tokens]:
    """Inputs and targets of a split, or of its first so many sequences, as arrays of their own, each [N, T]."""
    ids, targets = (column[:first].astype(np.int64) for column in views(split))
    return ids, targets


class Batches:
    """Shuffled batches without end: each epoch is a new permutation, drawn from the seed and the epoch's number."""

    def __init__(self, split: Dataset, batch_size: int, seed: int) -> None:
        """split: with columns ``input_ids`` and ``targets``; batch_size: sequences in a batch."""
        self.ids, self.targets = views(split)
        self.batch_size, self.seed = batch_size, seed
        self._epoch = (-1, np.empty(0, dtype=np.int64))

    def batch(self, step: int) -> tuple[Tokens, Tokens]:
        """Inputs and targets [B, T] of step 0, 1, ...; a batch at an epoch's end goes on into the next."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, offsets = np.divmod(positions, len(self.ids))
        chosen = np.concatenate([self._permutation(e)[offsets[epochs == e]] for e in np.unique(epochs)])
        return self.ids[chosen].astype(np.int64), self.targets[chosen].astype(np.int64)

    def _permutation(self, epoch: int) -> Tokens:
        if self._epoch[0] != epoch:
            self._epoch = (epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.ids)))
        return self._epoch[1]
