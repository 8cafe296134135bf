"""Selective copying (Gu & Dao 2023, arXiv 2312.00752; as defined by Poli et al. 2024, arXiv 2403.17844, section 3)."""

from __future__ import annotations

from typing import Self

import numpy as np
from pydantic import Field, model_validator

from bench.config import IGNORED, LARGEST
from bench.data.generated import Generated, Sizes
from bench.data.task import Sample, register


@register("selective_copy")
class SelectiveCopy(Generated):
    """Selective copying: random symbols scattered among blanks, to be told again in order.

    The symbols stand at places drawn evenly from all before the copy token (in the reference the last one always stands
    right before it). The copy token is followed by a blank for each symbol, and these are scored: the answer is never
    an input. Of the V tokens the last two are the blank and the copy token.
    Small: the defaults. Paper: ``alphabet: 14`` (its V 16), ``length: 256, symbols: 16`` (32 to 96), 12,800 examples
    (down to 800), V to 128, n to 1024.
    """

    relief = "fewer examples, more symbols, a larger alphabet"

    class Options(Generated.Options):
        """Axes of the task, besides those of every generated task.

        Attributes:
            alphabet: symbols to choose from, without the two special tokens.
            length: tokens in a sequence.
            symbols: how many are to be copied.
            test_lengths: further tests of these lengths, with as many symbols among more blanks.
        """

        alphabet: int = Field(14, ge=2, le=65536)
        length: int = Field(64, ge=3, le=65536)
        symbols: int = Field(8, ge=1, le=16384)
        test_lengths: Sizes = ()
        n_train: int = Field(12800, ge=1, le=LARGEST)

        @model_validator(mode="after")
        def _consistent(self) -> SelectiveCopy.Options:
            for length in (self.length, *self.test_lengths):
                if 2 * self.symbols + 1 > length:
                    raise ValueError(f"length = {length} must be at least 2 symbols + 1 = {2 * self.symbols + 1}")
            return self

    @property
    def vocab_size(self) -> int:
        return self.options.alphabet + 2

    def further(self) -> dict[str, Self]:
        return {str(n): self.resized(length=n, test_lengths=()) for n in self.options.test_lengths}

    def sample(self, count: int, rng: np.random.Generator) -> Sample:
        chosen = self.options
        blank, copy = chosen.alphabet, chosen.alphabet + 1
        symbols = rng.integers(chosen.alphabet, size=(count, chosen.symbols))
        before = chosen.length - chosen.symbols - 1
        ids, targets = np.full((count, chosen.length), blank), np.full((count, chosen.length), IGNORED)
        places = np.sort(rng.random((count, before)).argsort(1)[:, : chosen.symbols], 1)
        np.put_along_axis(ids, places, symbols, 1)
        ids[:, before] = copy
        targets[:, before + 1 :] = symbols
        return Sample(ids, targets)
