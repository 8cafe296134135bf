"""Batches as a function of seed and step alone: any step can be resumed, and a seed gives every variant the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bench.data.task import Tokens

if TYPE_CHECKING:
    from datasets import Dataset


def arrays(split: Dataset) -> tuple[Tokens, Tokens]:
    """Inputs and targets of a split, each [N, T]."""

    def column(name: str) -> Tokens:
        values = split.data.column(name).combine_chunks()
        return np.array(values.flatten()).reshape(len(values), -1)  # a copy: Arrow's own memory is read-only

    return column("input_ids"), column("targets")


class Batches:
    """Shuffled batches without end: each epoch is a new permutation, drawn from the seed and the epoch's number."""

    def __init__(self, split: Dataset, batch_size: int, seed: int) -> None:
        """split: with columns ``input_ids`` and ``targets``; batch_size: sequences in a batch."""
        self.ids, self.targets = arrays(split)
        self.batch_size, self.seed = batch_size, seed
        self._epoch = (-1, np.empty(0, dtype=np.int64))

    def batch(self, step: int) -> tuple[Tokens, Tokens]:
        """Inputs and targets [B, T] of step 0, 1, ...; a batch at an epoch's end goes on into the next."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, offsets = np.divmod(positions, len(self.ids))
        chosen = np.concatenate([self._permutation(e)[offsets[epochs == e]] for e in np.unique(epochs)])
        return self.ids[chosen], self.targets[chosen]

    def _permutation(self, epoch: int) -> Tokens:
        if self._epoch[0] != epoch:
            self._epoch = (epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.ids)))
        return self._epoch[1]
