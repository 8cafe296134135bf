"""The cache of keys and values of sequences that leave early: every slot is filled as far as its sequence has come."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from bench.model.schedule import Schedule

Name = tuple[Hashable, ...]
Rows = Tensor | None  # indices [N] of sequences; None: all of the batch


class Buffers:
    """Named tensors over batch and tokens that grow by doubling. tokens: the dimension that counts the tokens."""

    def __init__(self, batch: int, tokens: int) -> None:
        self.batch, self.tokens = batch, tokens
        self._of: dict[Name, Tensor] = {}

    def write(self, name: Name, rows: Rows, start: int, value: Tensor) -> None:
        """Put value [N, ...] at the tokens from ``start`` on."""
        length = value.shape[self.tokens]
        if name not in self._of:
            shape = list(value.shape)
            shape[0], shape[self.tokens] = self.batch, start + length
            self._of[name] = value.new_zeros(shape)
        place = self._room(name, start + length).narrow(self.tokens, start, length)
        if rows is None:
            place.copy_(value)
        else:
            place.index_copy_(0, rows, value)

    def read(self, name: Name, rows: Rows, start: int, stop: int) -> Tensor:
        """The tokens from ``start`` to ``stop``, zero where nothing was written; a view where all rows are wanted."""
        found = self._room(name, stop).narrow(self.tokens, start, stop - start)
        return found if rows is None else found.index_select(0, rows)

    def _room(self, name: Name, stop: int) -> Tensor:
        """What is held under a name, grown to hold tokens up to ``stop``."""
        kept = self._of[name]
        length = kept.shape[self.tokens]
        if length < stop:
            shape = list(kept.shape)
            shape[self.tokens] = max(2 * length, stop)
            self._of[name] = kept.new_zeros(shape)
            self._of[name].narrow(self.tokens, 0, length).copy_(kept)
        return self._of[name]

    def names(self) -> list[Name]:
        """What is held."""
        return list(self._of)

    def take(self, rows: Tensor) -> None:
        """Make row i what row ``rows[i]`` was."""
        self.batch = len(rows)
        self._of = {name: kept.index_select(0, rows) for name, kept in self._of.items()}


class ExitCache(Cache):
    """Keys and values by slot, [B, 2, H_kv, T, d], and what is needed to fill the slots that sequences have skipped.

    A slot is (depth of the step, exit): the exit is 0 but where the coda is computed again for every exit. states: what
    the tokens are at the exit points, by (exit point, name), [B, T, ...]; done: how many tokens of each sequence
    have been through a stage; exit_depth: [B, passes], the steps each sequence ran in each pass; schedule: that has
    filled it; packed: whether its tokens are of several documents.
    """

    def __init__(self, batch: int) -> None:
        super().__init__(layers=[])
        self.length = 0
        self.slots, self.states = Buffers(batch, 3), Buffers(batch, 1)
        self.done: dict[Name, list[int]] = {}
        self.exit_depth: Tensor | None = None
        self.schedule: Schedule | None = None
        self.packed = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, the same for every step."""
        return self.length

    @property
    def is_croppable(self) -> bool:
        """Tokens cannot be taken back."""
        return False

    def record(self, depth: Tensor, length: int) -> None:
        """A pass is over: the steps [B] it ran, and the tokens seen by now."""
        past = [] if self.exit_depth is None else [self.exit_depth]
        self.exit_depth, self.length = torch.cat([*past, depth[:, None]], 1), length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make sequence i what sequence ``beam_idx[i]`` was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Make sequence i what sequence ``indices[i]`` was."""
        rows = indices.to(torch.long)
        self.slots.take(rows)
        self.states.take(rows)
        self.done = {stage: [done[row] for row in rows.tolist()] for stage, done in self.done.items()}
        self.exit_depth = None if self.exit_depth is None else self.exit_depth[rows]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times in a row."""
        self.reorder_cache(torch.arange(self.slots.batch).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything."""
        self.__init__(self.slots.batch)  # type: ignore[misc]


class Window(Cache):
    """What the steps of one walk see of the cache: some rows, writing from one token on."""

    def __init__(self, cache: ExitCache, rows: Rows, start: int, exit: int = 0) -> None:
        super().__init__(layers=[])
        self.cache, self.rows, self.start, self.exit = cache, rows, start, exit

    @property
    def packed(self) -> bool:
        """Of the whole cache."""
        return self.cache.packed

    @packed.setter
    def packed(self, value: bool) -> None:
        self.cache.packed = value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the walk's."""
        return self.start

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Store keys and values [N, H_kv, T, d] of a step; return all from the first token to the last of these."""
        new = torch.stack([key_states, value_states], 1)
        self.cache.slots.write((layer_idx, self.exit), self.rows, self.start, new)
        return self.stored(layer_idx, self.start + key_states.shape[2])

    def stored(self, layer_idx: int, total: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a step for the first ``total`` tokens."""
        key, value = self.cache.slots.read((layer_idx, self.exit), self.rows, 0, total).unbind(1)
        return key, value

    def copy(self, source: int, targets: Iterable[int], stop: int) -> None:
        """Give the steps at the depths ``targets`` the keys and values of that at ``source`` for the walk's tokens."""
        found = self.cache.slots.read((source, self.exit), self.rows, self.start, stop)
        for target in targets:
            self.cache.slots.write((target, self.exit), self.rows, self.start, found)


def groups(rows: list[int], key: Callable[[int], int]) -> Iterator[tuple[int, list[int]]]:
    """The rows of equal key together, by ascending key."""
    for value in sorted({key(row) for row in rows}):
        yield value, [row for row in rows if key(row) == value]
