"""p-hop induction (Sanford et al. 2024; Saunshi et al. 2025, arXiv 2502.17416): depth matters, parameters hardly do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import numpy as np
from pydantic import Field, field_validator, model_validator

from bench.config import IGNORED
from bench.data.generated import Generated, best_accuracy
from bench.data.task import Sample, TaskSize, Tokens, register
from bench.tables import counted

Hops = Annotated[int, Field(ge=0, le=65535)]
COUNTED = 20_000  # sequences of the train split that the levels of solvers are counted on


@register("p_hop")
class PHop(Generated):
    """p-hop induction: follow p times "the latest earlier occurrence of this symbol, one to its right".

    From position t with symbol x[t], a hop finds the latest earlier position holding that symbol and moves one to the
    right of it; the label is the symbol reached after p hops. No symbol stands twice in a row (a hop would stay where
    it is), else sequences are uniformly random among those that hold a chain, by rejection: unlike a planted chain
    this cannot leak the answer by position, and the alphabet's symmetry makes every answer equally likely. The level
    ``chance`` is the test accuracy of the best predictor that sees only the position, the current symbol and the
    number of hops, fitted on the train split. The level ``k hops`` is that of a solver that follows k hops, or all
    where there are fewer, and then guesses. With several numbers of hops the test is sliced by them.

    The guess after k hops is the likeliest answer, counted on the train split, given where the solver is, the symbol
    there and the one to its left (after a hop, the symbol that it started from), and how many hops are left. Its path
    has told it nothing else of the answer: the sequence is a Markov chain, so that what stands to the right of these
    two symbols does not matter to what stands to the left of them, where the hops that are left lead.
    """

    relief = "fewer hops or examples, a longer sequence, another alphabet"

    class Options(Generated.Options):
        """Axes of the task.

        Attributes:
            hops: p, or a list of them, of which each sequence draws one and tells it in its first token (Sanford's
                k-hop).
            length: symbols in a sequence.
            alphabet: symbols to choose from.
            dense: a label at every position whose chain exists (the others are not scored), else one label, at the last
                position.
        """

        hops: Hops | list[Hops] = 2
        length: int = Field(64, ge=3, le=65536)
        alphabet: int = Field(4, ge=3, le=4096)
        dense: bool = True

        @field_validator("hops")
        @classmethod
        def _hops(cls, value: int | list[int]) -> int | list[int]:
            given = value if isinstance(value, list) else [value]
            if not given or len(set(given)) < len(given):
                raise ValueError("must be a number of at least 0, or a list of different ones")
            return value

        @model_validator(mode="after")
        def _consistent(self) -> PHop.Options:
            most = max(self.hops) if isinstance(self.hops, list) else self.hops
            if most >= self.length:
                raise ValueError(
                    f"hops = {most} must be below length = {self.length}, since every hop leads to an earlier symbol "
                    "(allowed: fewer hops, a longer sequence)"
                )
            return self

    @property
    def most(self) -> int:
        """The largest number of hops."""
        hops = self.options.hops
        return max(hops) if isinstance(hops, list) else int(hops)

    @property
    def length(self) -> int:
        return self.options.length + isinstance(self.options.hops, list)

    def of_sequence(self) -> TaskSize:
        whole, length = super().of_sequence(), self.length
        table = 8 * (self.options.alphabet + 3 * length)  # of where a hop leads, while it is made
        return TaskSize(max(whole.bytes, table), whole.seconds + 1e-8 * length * self.most)

    def solving(self) -> float:
        rows = min(self.options.n_train, COUNTED) + self.options.n_test
        return 8e-8 * rows * self.length * self.most

    @property
    def vocab_size(self) -> int:
        hops = self.options.hops
        return self.options.alphabet + (len(hops) if isinstance(hops, list) else 0)

    def without_context(self, ids: Tokens) -> Tokens:
        known = super().without_context(ids)
        return known * self.vocab_size + ids[:, :1] if isinstance(self.options.hops, list) else known

    def solvers(self, train: Sample, test: Sample) -> dict[str, float]:
        most = self.most
        train = Sample(train.ids[:COUNTED], train.targets[:COUNTED])
        found = {}
        for done, walked in enumerate(zip(self._walk(train.ids, most), self._walk(test.ids, most), strict=True)):
            seen, asked = walked
            name = counted(done, "hop")
            found[name] = best_accuracy((seen, train.targets), (asked, test.targets))
        return found

    def _walk(self, ids: Tokens, most: int) -> Iterator[Tokens]:
        """What a solver of 0, 1, ... ``most`` - 1 hops knows at every position of ids [N, T], as one number each: where
        it is, the symbol there and the one to its left, and the hops that are left.
        """
        hops, size = self.options.hops, self.options.alphabet
        mixed = isinstance(hops, list)
        symbols = ids[:, 1:] if mixed else ids
        left = np.asarray(hops)[ids[:, 0] - size] if mixed else np.full(len(ids), hops)
        landing = landings(symbols, size)
        at = np.tile(np.arange(symbols.shape[1]), (len(ids), 1))
        for _ in range(most):
            here, before = (np.take_along_axis(symbols, places, 1) for places in (at, (at - 1).clip(0)))
            under_way = ((at * size + here) * size + before) * most + left[:, None] + size
            known = np.where(left[:, None] > 0, under_way, here)  # who has arrived needs no more than the symbol
            yield np.pad(known, ((0, 0), (1, 0))) if mixed else known
            at = np.where((left > 0)[:, None], np.take_along_axis(landing, at, 1).clip(0), at)
            left = (left - 1).clip(0)

    def sample(self, count: int, rng: np.random.Generator) -> Sample:
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
        slices = {"hops": options[pick][keep]} if isinstance(chosen.hops, list) else {}
        return Sample(symbols[keep], targets[keep], slices)


def hop_targets(symbols: Tokens, hops: Tokens, alphabet: int) -> Tokens:
    """The symbol reached from every position after ``hops`` [N] hops, -100 where the chain ends early; [N, T] both."""
    count, length = symbols.shape
    landing = landings(symbols, alphabet)
    at = np.tile(np.arange(length), (count, 1))
    for done in range(int(hops.max(initial=0))):
        moved = np.where(at >= 0, np.take_along_axis(landing, at.clip(0), 1), -1)
        at = np.where((done < hops)[:, None], moved, at)
    return np.where(at >= 0, np.take_along_axis(symbols, at.clip(0), 1), IGNORED)


def landings(symbols: Tokens, alphabet: int) -> Tokens:
    """The position that one hop from every position leads to, -1 where there is none; [N, T] both."""
    count, length = symbols.shape
    row = np.arange(count)
    last = np.full((count, alphabet), -1)  # latest position of each symbol so far
    landing = np.empty((count, length), dtype=np.int64)
    for position in range(length):
        symbol = symbols[:, position]
        earlier = last[row, symbol]
        landing[:, position] = np.where(earlier >= 0, earlier + 1, -1)
        last[row, symbol] = position
    return landing
