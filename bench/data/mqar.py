"""Multi-query associative recall (Arora et al. 2023, "Zoology", arXiv 2312.04927, section 4 and appendix)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from bench.config import IGNORED
from bench.data.generated import Generated, distinct
from bench.data.task import Sample, TaskSize, Tokens, register

Length = Annotated[int, Field(ge=4, le=65536)]
Pairs = Annotated[int, Field(ge=1, le=16384)]


@register("mqar")
class Mqar(Generated):
    """MQAR: K key-value pairs, then every key is queried once and its value is the label.

    Keys are 1..V/2-1 and values V/2..V-1, different ones within a sequence. After the pairs come (n - 2K) / 2 places of
    two tokens; K of them, drawn without replacement with weight a g^(a-1) for the g-th place, start with a query. All
    other tokens are fillers: random ones, which never repeat a key of the sequence, or 0. The test is sliced by K.
    Small: the defaults, V = 256, n = 64, K = 4. Paper: ``vocabulary: 8192`` with (length, pairs, n_train) = (64, 4,
    100000), (128, 8, 20000), (256, [16, 32, 64], 20000 each) and ``test_shapes`` up to [1024, 256].
    """

    relief = "fewer examples, a larger vocabulary"

    class Options(Generated.Options):
        """Axes of the task, besides those of every generated task.

        Attributes:
            vocabulary: V.
            length: n.
            pairs: K, or a list of them, of which each sequence draws one.
            power: a, near 0 for queries soon after the pairs, 1 for anywhere.
            filler: what stands where nothing else does.
            test_shapes: further tests, each a pair [n, K], named ``nxK``.
        """

        vocabulary: int = Field(256, ge=6, le=1 << 20)
        length: Length = 64
        pairs: Pairs | list[Pairs] = 4
        power: float = Field(0.01, gt=0.0, le=1.0)
        filler: Literal["random", "zero"] = "random"
        test_shapes: tuple[tuple[Length, Pairs], ...] = ()

        @field_validator("pairs")
        @classmethod
        def _pairs(cls, value: int | list[int]) -> int | list[int]:
            given = value if isinstance(value, list) else [value]
            if not given or len(set(given)) < len(given):
                raise ValueError("must be a number of at least 1, or a list of different ones")
            return value

        @model_validator(mode="after")
        def _consistent(self) -> Mqar.Options:
            most = max(self.pairs) if isinstance(self.pairs, list) else self.pairs
            for length, pairs in ((self.length, most), *self.test_shapes):
                if length % 2 or pairs < 1 or 4 * pairs > length or length >= self.vocabulary:
                    raise ValueError(
                        f"length = {length} and pairs = {pairs} must hold an even length of at least 4 pairs, below "
                        f"vocabulary = {self.vocabulary}"
                    )
                if pairs > self.vocabulary // 2 - 1:
                    raise ValueError(f"pairs = {pairs} must be fewer than half of vocabulary = {self.vocabulary}")
            if len(set(self.test_shapes)) < len(self.test_shapes):
                raise ValueError("test_shapes must be different")
            return self

    @property
    def vocab_size(self) -> int:
        return self.options.vocabulary

    def of_sequence(self) -> TaskSize:
        whole, pairs = super().of_sequence(), self.options.pairs
        most = max(pairs) if isinstance(pairs, list) else pairs
        return whole._replace(seconds=whole.seconds + 5e-8 * self.vocab_size + 2e-9 * most * self.length)

    def further(self) -> dict[str, Self]:
        return {f"{n}x{k}": self.resized(length=n, pairs=k) for n, k in self.options.test_shapes}

    def sample(self, count: int, rng: np.random.Generator) -> Sample:
        pairs = self.options.pairs if isinstance(self.options.pairs, list) else [self.options.pairs]
        k_of = rng.choice(pairs, size=count)
        ids = np.empty((count, self.options.length), dtype=np.int64)
        targets = np.empty_like(ids)
        for k in pairs:
            ids[k_of == k], targets[k_of == k] = self._with_pairs(k, int((k_of == k).sum()), rng)
        return Sample(ids, targets, {"pairs": k_of})

    def _with_pairs(self, k: int, count: int, rng: np.random.Generator) -> tuple[Tokens, Tokens]:
        """Sequences of k pairs and their targets, [count, n] each."""
        chosen = self.options
        half, length = chosen.vocabulary // 2, chosen.length
        keys = 1 + distinct(rng, count, half - 1, k)
        values = half + distinct(rng, count, chosen.vocabulary - half, k)
        ids, targets = np.zeros((count, length), dtype=np.int64), np.full((count, length), IGNORED)
        if chosen.filler == "random":
            ids = rng.integers(chosen.vocabulary - k, size=ids.shape)
            for key in np.sort(keys, 1).T:  # step over the keys, in ascending order: uniform over all other tokens
                ids += ids >= key[:, None]
        ids[:, 0 : 2 * k : 2], ids[:, 1 : 2 * k : 2] = keys, values
        # Weighted draws without replacement: the k smallest of exponential times with the weights as rates.
        weight = np.arange(1, (length - 2 * k) // 2 + 1) ** (chosen.power - 1)
        place = 2 * k + 2 * (rng.exponential(size=(count, len(weight))) / weight).argsort(1)[:, :k]
        np.put_along_axis(ids, place, keys, 1)
        np.put_along_axis(targets, place, values, 1)
        return ids, targets
