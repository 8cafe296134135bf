"""State tracking (Liu et al. 2023, arXiv 2210.10749; Merrill et al. 2024, arXiv 2404.08819): the word problem."""

from __future__ import annotations

from itertools import permutations
from typing import Literal, Self

import numpy as np
from pydantic import Field

from bench.data.generated import Generated, Sizes
from bench.data.task import Sample, Tokens, register


@register("state_tracking")
class StateTracking(Generated):
    """State tracking: the running product of group elements, at every position.

    A sequence is random elements g_1 .. g_T; the label at t is g_t ... g_2 g_1, the state after t moves. ``s5``: the
    120 permutations of five things in lexicographic order, not solvable: no constant-depth circuit (in TC0, unless
    TC0 = NC1) tracks them at every length. ``parity``: 0 and 1 under addition modulo 2, solvable but hard to learn.
    The first label is the first element: chance is above 1 / (number of elements) for that reason.
    Small: the defaults. Large: ``length: 64`` or more with ``test_lengths`` several times longer, 200,000 examples.
    """

    relief = "fewer or longer sequences"

    class Options(Generated.Options):
        """Axes of the task, besides those of every generated task.

        Attributes:
            group: whose elements are multiplied.
            length: elements in a sequence.
            test_lengths: further tests of these lengths, longer ones for length generalisation.
        """

        group: Literal["s5", "parity"] = "s5"
        length: int = Field(32, ge=1, le=65536)
        test_lengths: Sizes = (64,)

    @property
    def vocab_size(self) -> int:
        return len(multiplication_table(self.options.group))

    def further(self) -> dict[str, Self]:
        return {str(n): self.resized(length=n, test_lengths=()) for n in self.options.test_lengths}

    def sample(self, count: int, rng: np.random.Generator) -> Sample:
        table = multiplication_table(self.options.group)
        ids = rng.integers(len(table), size=(count, self.options.length))
        states = ids.copy()
        for position in range(1, self.options.length):
            states[:, position] = table[ids[:, position], states[:, position - 1]]
        return Sample(ids, states)


def multiplication_table(group: str) -> Tokens:
    """Element numbers [G, G]: entry (a, b) is the product a b, which is b first and then a."""
    if group == "parity":
        return np.array([[0, 1], [1, 0]])
    elements = np.array(list(permutations(range(5))))
    product = elements[:, elements]  # [a, b, i] = a(b(i))
    digits = 5 ** np.arange(5)
    numbers = elements @ digits
    order = numbers.argsort()
    return order[np.searchsorted(numbers[order], product @ digits)]
