"""p-hop induction (Sanford et al. 2024; Saunshi et al. 2025, arXiv 2502.17416): depth matters, parameters hardly do."""

from __future__ import annotations

import numpy as np
from pydantic import Field, field_validator

from bench.config import Strict
from bench.data.task import IGNORED, Metric, Task, TaskData, Tokens, make_data, register_task, rows
from bench.errors import UserError

MIN_ACCEPTED = 0.01  # share of random sequences that must hold a whole chain


@register_task("p_hop")
class PHop(Task):
    """p-hop induction: follow p times "the latest earlier occurrence of this symbol, one to its right".

    From position t with symbol x[t], a hop finds the latest earlier position holding that symbol and moves one to the
    right of it; the label is the symbol reached after p hops. No symbol stands twice in a row (a hop would stay where
    it is), else sequences are uniformly random among those that hold a chain, by rejection: unlike a planted chain
    this cannot leak the answer by position, and the alphabet's symmetry makes every answer equally likely. The level
    ``chance`` is the test accuracy of the best predictor that sees only the position, the current symbol and the
    number of hops, fitted on the train split.
    """

    class Options(Strict):
        """Axes of the task.

        hops: p, or a list of them, of which each sequence draws one and tells it in its first token (Sanford's k-hop);
        length: symbols in a sequence; alphabet: symbols to choose from; dense: a label at every position whose chain
        exists (the others are not scored), else one label, at the last position; n_train, n_valid, n_test: sequences;
        seed: of the data, not of the training.
        """

        hops: int | list[int] = 2
        length: int = Field(64, ge=3, le=65536)
        alphabet: int = Field(4, ge=3, le=4096)
        dense: bool = True
        n_train: int = Field(20000, ge=1)
        n_valid: int = Field(1000, ge=1)
        n_test: int = Field(2000, ge=1)
        seed: int = Field(0, ge=0)

        @field_validator("hops")
        @classmethod
        def _hops(cls, value: int | list[int]) -> int | list[int]:
            given = value if isinstance(value, list) else [value]
            if not given or min(given) < 0 or len(set(given)) < len(given):
                raise ValueError("must be a number of at least 0, or a list of different ones")
            return value

    def build(self) -> TaskData:
        chosen = self.options
        many = isinstance(chosen.hops, list)
        generators = [np.random.default_rng(seq) for seq in np.random.SeedSequence(chosen.seed).spawn(3)]
        splits: dict[str, tuple[Tokens, Tokens]] = {}
        seen = np.empty(0, dtype=np.void)
        # The test split is drawn first, so that it stays the same whatever the size of the others.
        for name, count, rng in zip(
            ("test", "valid", "train"), (chosen.n_test, chosen.n_valid, chosen.n_train), generators, strict=True
        ):
            splits[name], seen = self._draw(count, rng, seen)
        vocab_size = chosen.alphabet + (len(chosen.hops) if many else 0)
        levels = {"chance": _best_without_context(splits["train"], splits["test"], vocab_size, many)}
        return make_data(splits, vocab_size, Metric("accuracy", True, levels))

    def _draw(self, count: int, rng: np.random.Generator, seen: np.ndarray) -> tuple[tuple[Tokens, Tokens], np.ndarray]:
        """``count`` labelled sequences [N, T] that are in no earlier split and do not repeat, and all seen so far."""
        found: list[tuple[Tokens, Tokens]] = []
        got = 0
        while got < count:
            size = max(1024, count - got)
            ids, targets = self._sample(size, rng)
            fresh = np.zeros(len(ids), dtype=bool)
            fresh[np.unique(rows(ids), return_index=True)[1]] = True
            if seen.size:
                fresh &= ~np.isin(rows(ids), seen)
            accepted = int(fresh.sum())
            ids, targets = ids[fresh][: count - got], targets[fresh][: count - got]
            seen = np.concatenate([seen, rows(ids)]) if seen.size else rows(ids)
            found.append((ids, targets))
            got += len(ids)
            if accepted < MIN_ACCEPTED * size:
                raise UserError(
                    f"p_hop.options: hops = {self.options.hops}, length = {self.options.length}, alphabet = "
                    f"{self.options.alphabet} leave too few different sequences that hold a chain ({accepted} of "
                    f"{size} drawn; allowed: fewer hops or examples, a longer sequence, another alphabet)"
                )
        return (np.concatenate([f[0] for f in found]), np.concatenate([f[1] for f in found])), seen

    def _sample(self, count: int, rng: np.random.Generator) -> tuple[Tokens, Tokens]:
        """Random sequences and their targets, those without a label left out."""
        chosen = self.options
        steps = rng.integers(1, chosen.alphabet, (count, chosen.length))  # 1..A-1 around the alphabet: never a repeat
        steps[:, 0] = rng.integers(chosen.alphabet, size=count)
        symbols = steps.cumsum(1) % chosen.alphabet
        options = np.asarray(chosen.hops if isinstance(chosen.hops, list) else [chosen.hops])
        pick = rng.integers(len(options), size=count)
        targets = hop_targets(symbols, options[pick], chosen.alphabet)
        if not chosen.dense:
            targets[:, :-1] = IGNORED
        if isinstance(chosen.hops, list):
            symbols = np.concatenate([chosen.alphabet + pick[:, None], symbols], 1)
            targets = np.concatenate([np.full((count, 1), IGNORED), targets], 1)
        keep = (targets != IGNORED).any(1)
        return symbols[keep], targets[keep]


def hop_targets(symbols: Tokens, hops: Tokens, alphabet: int) -> Tokens:
    """The symbol reached from every position after ``hops`` [N] hops, -100 where the chain ends early; [N, T] both."""
    count, length = symbols.shape
    row = np.arange(count)
    last = np.full((count, alphabet), -1)  # latest position of each symbol so far
    landing = np.empty((count, length), dtype=np.int64)
    for position in range(length):
        symbol = symbols[:, position]
        earlier = last[row, symbol]
        landing[:, position] = np.where(earlier >= 0, earlier + 1, -1)
        last[row, symbol] = position
    at = np.tile(np.arange(length), (count, 1))
    for done in range(int(hops.max(initial=0))):
        moved = np.where(at >= 0, np.take_along_axis(landing, at.clip(0), 1), -1)
        at = np.where((done < hops)[:, None], moved, at)
    return np.where(at >= 0, np.take_along_axis(symbols, at.clip(0), 1), IGNORED)


def _best_without_context(
    train: tuple[Tokens, Tokens], test: tuple[Tokens, Tokens], vocab_size: int, many: bool
) -> float:
    """Test accuracy of the most frequent train label given position and current token (and the first token's hops)."""
    length = train[0].shape[1]

    def features(ids: Tokens) -> Tokens:
        key = np.arange(length) * vocab_size + ids
        return key * vocab_size + ids[:, :1] if many else key

    keys, labels = features(train[0]), train[1]
    scored = labels != IGNORED
    table = np.zeros((length * vocab_size * (vocab_size if many else 1), vocab_size), dtype=np.int64)
    np.add.at(table, (keys[scored], labels[scored]), 1)
    scored = test[1] != IGNORED
    return float((table.argmax(1)[features(test[0])[scored]] == test[1][scored]).mean())
