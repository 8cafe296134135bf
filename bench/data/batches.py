"""Batches as a function of seed and step alone: any step can be resumed, and a seed gives every variant the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bench.data.task import Augment, Tokens

if TYPE_CHECKING:
    from datasets import Dataset


def views(split: Dataset) -> tuple[NDArray[Any], NDArray[Any]]:
    """Inputs (tokens [N, T] or vectors [N, T, F]) and targets of a split as they are held: what is in one piece is not
    copied.
    """

    def column(place: int) -> NDArray[Any]:
        column = split.data.column(place)
        values = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        shape = [len(values)]
        while hasattr(values.type, "list_size"):
            shape.append(values.type.list_size)
            values = values.flatten()
        return values.to_numpy(zero_copy_only=True).reshape(shape)

    return column(0), column(1)


def arrays(split: Dataset, first: int | None = None) -> tuple[NDArray[Any], Tokens]:
    """``views`` of a split, or of its first so many sequences, as arrays of their own that a model takes."""
    ids, targets = views(split)
    return own(ids[:first]), own(targets[:first])


def own(values: NDArray[Any]) -> NDArray[Any]:
    """A copy as a model takes it: whole numbers of 64 bits, others of 32."""
    return values.astype(np.float32 if values.dtype.kind == "f" else np.int64)


class Batches:
    """Shuffled batches without end: each epoch is a new permutation, drawn from the seed and the epoch's number."""

    def __init__(self, split: Dataset, batch_size: int, seed: int, augment: Augment | None = None) -> None:
        """split: with inputs and targets as its first columns; batch_size: sequences in a batch; augment: changes the
        inputs of a batch.
        """
        self.ids, self.targets = views(split)
        self.batch_size, self.seed, self.augment = batch_size, seed, augment
        self._epoch = (-1, np.empty(0, dtype=np.int64))

    def batch(self, step: int) -> tuple[NDArray[Any], Tokens]:
        """Inputs [B, T] or [B, T, F] and targets [B, T] or [B, 1] of step 0, 1, ...; a batch at an epoch's end goes on
        into the next.
        """
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, offsets = np.divmod(positions, len(self.ids))
        chosen = np.concatenate([self._permutation(e)[offsets[epochs == e]] for e in np.unique(epochs)])
        inputs, targets = own(self.ids[chosen]), own(self.targets[chosen])
        if self.augment is not None:
            inputs = self.augment(inputs, np.random.default_rng([self.seed, step, 0xA46]))
        return inputs, targets

    def _permutation(self, epoch: int) -> Tokens:
        if self._epoch[0] != epoch:
            self._epoch = (epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.ids)))
        return self._epoch[1]
