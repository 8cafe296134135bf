"""n-ary addition (Saunshi et al. 2025, arXiv 2502.17416, section 2): depth matters more than parameters."""

from __future__ import annotations

from typing import Self

import numpy as np
from pydantic import Field, model_validator

from bench.config import IGNORED
from bench.data.generated import Generated, Sizes
from bench.data.task import Sample, Tokens, register

PLUS, EQUALS, PAD = 10, 11, 12  # after the ten digits


@register("addition")
class Addition(Generated):
    """n-ary addition: the sum of n numbers, n mixed, answered digit by digit.

    ``315+120+045=0480``: every number has ``digits`` digits, uniformly random; the sum has as many digits as the
    largest sum there is, the most significant first, so that the answer's length tells nothing. Every digit of the
    answer is scored, given those before it. What follows a short sum is padding, not scored. The test is sliced by n.
    Small: the defaults. Paper: ``min_numbers: 2, max_numbers: 32`` with three digits, and tests by n.
    """

    relief = "fewer examples, more digits or numbers"

    class Options(Generated.Options):
        """Axes of the task, besides those of every generated task.

        Attributes:
            min_numbers, max_numbers: each sequence draws its n from this range.
            digits: of a number.
            test_numbers: further tests of exactly so many numbers each, more than trained on for length generalisation.
        """

        min_numbers: int = Field(2, ge=2, le=1024)
        max_numbers: int = Field(4, ge=2, le=1024)
        digits: int = Field(3, ge=1, le=12)
        test_numbers: Sizes = ()

        @model_validator(mode="after")
        def _consistent(self) -> Addition.Options:
            if self.min_numbers > self.max_numbers:
                raise ValueError(f"min_numbers = {self.min_numbers} must not exceed max_numbers = {self.max_numbers}")
            return self

    @property
    def vocab_size(self) -> int:
        return PAD + 1

    @property
    def most(self) -> int:
        """The most numbers in any split, which decide the width of the answer."""
        return max(self.options.max_numbers, *self.options.test_numbers, 0)

    @property
    def width(self) -> int:
        """Digits of the largest sum of any split."""
        return len(str(self.most * (10**self.options.digits - 1)))

    @property
    def length(self) -> int:
        return self._tokens(self.options.max_numbers)

    def _tokens(self, numbers: int) -> int:
        return int(numbers * (self.options.digits + 1) + self.width - 1)

    def further(self) -> dict[str, Self]:
        sizes = self.options.test_numbers
        return {str(n): self.resized(min_numbers=n, max_numbers=n, test_numbers=(self.most,)) for n in sizes}

    def compared(self, ids: Tokens) -> Tokens:
        return np.pad(ids, ((0, 0), (0, self._tokens(self.most) - ids.shape[1])), constant_values=PAD)

    def sample(self, count: int, rng: np.random.Generator) -> Sample:
        chosen = self.options
        width = self.width
        group = chosen.digits + 1  # a number and the sign behind it
        text = np.full((count, chosen.max_numbers * group + width), PAD)
        scored = np.zeros(text.shape, dtype=bool)
        n_of = rng.integers(chosen.min_numbers, chosen.max_numbers + 1, size=count)
        for n in range(chosen.min_numbers, chosen.max_numbers + 1):
            row = np.flatnonzero(n_of == n)
            numbers = rng.integers(10**chosen.digits, size=(len(row), n))
            signs = np.where(np.arange(n) == n - 1, EQUALS, PLUS)
            terms = np.concatenate([_digits(numbers, chosen.digits), np.tile(signs, (len(row), 1))[..., None]], 2)
            text[row, : n * group] = terms.reshape(len(row), n * group)
            text[row, n * group : n * group + width] = _digits(numbers.sum(1), width)
            scored[row, n * group : n * group + width] = True
        targets = np.where(scored, text, IGNORED)[:, 1:]
        return Sample(text[:, :-1], targets, {"numbers": n_of})


def _digits(numbers: Tokens, width: int) -> Tokens:
    """The decimal digits [..., width] of numbers [...], the most significant first."""
    return numbers[..., None] // 10 ** np.arange(width - 1, -1, -1) % 10
