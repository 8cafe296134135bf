"""Modular chains, as i-GSM's reasoning without its words (Ye et al. 2024, arXiv 2407.20311; Saunshi et al. 2025)."""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from bench.config import IGNORED
from bench.data.generated import Generated, Sizes, distinct
from bench.data.task import Sample, register


@register("modular_chain")
class ModularChain(Generated):
    """Modular chains: a graph of assignments over the integers modulo 7; the values of queried variables.

    An assignment is three tokens ``x a b`` and says x := a + b; a and b are variables or constants. The first variable
    is made of two constants; every later one of an earlier variable and, evenly, another such draw or a constant.
    Names are random, so that they tell no order. After the assignments stands ``?``, then one queried name after the
    other, with its value as label; values are never printed. The test is sliced by depth: the longest chain of
    assignments behind any query of the sequence.
    Small: the defaults. Large (i-GSM's spirit): ``variables: 16 to 32, queries: 1, order: shuffled``, 200,000 examples.
    """

    relief = "fewer examples, more variables"

    class Options(Generated.Options):
        """Axes of the task, besides those of every generated task.

        Attributes:
            variables: assignments in a sequence.
            queries: how many of them are asked for.
            order: the assignments stand in ``topological`` order (nothing is used before it is assigned) or
                ``shuffled``.
            modulus: 7 unless said.
            test_variables: further tests with exactly so many variables each.
        """

        variables: int = Field(6, ge=1, le=1024)
        queries: int = Field(4, ge=1, le=1024)
        order: Literal["topological", "shuffled"] = "topological"
        modulus: int = Field(7, ge=2, le=4096)
        test_variables: Sizes = ()

        @model_validator(mode="after")
        def _consistent(self) -> ModularChain.Options:
            if self.queries > min((self.variables, *self.test_variables)):
                raise ValueError(f"queries = {self.queries} must not exceed variables or test_variables")
            return self

    @property
    def n_names(self) -> int:
        """Names there are, enough for the split with the most variables."""
        return max(self.options.variables, *self.options.test_variables, 0)

    @property
    def vocab_size(self) -> int:
        return self.options.modulus + self.n_names + 1

    def further(self) -> dict[str, Self]:
        sizes = self.options.test_variables
        return {str(n): self.resized(variables=n, test_variables=(self.n_names,)) for n in sizes}

    def sample(self, count: int, rng: np.random.Generator) -> Sample:
        chosen = self.options
        n, modulus, row = chosen.variables, chosen.modulus, np.arange(count)
        names = modulus + distinct(rng, count, self.n_names, n)
        value, depth = np.zeros((count, n), dtype=np.int64), np.zeros((count, n), dtype=np.int64)
        lines = np.empty((count, n, 3), dtype=np.int64)
        lines[..., 0] = names
        for i in range(n):
            for term, share in ((1, 1.0), (2, 0.5)):
                constant = rng.integers(modulus, size=count)
                earlier = rng.integers(max(i, 1), size=count)
                uses = (rng.random(count) < share) & (i > 0)
                lines[:, i, term] = np.where(uses, names[row, earlier], constant)
                value[:, i] += np.where(uses, value[row, earlier], constant)
                depth[:, i] = np.maximum(depth[:, i], np.where(uses, depth[row, earlier], 0))
            value[:, i] %= modulus
            depth[:, i] += 1
        if chosen.order == "shuffled":
            lines = rng.permuted(lines.view([("line", "i8", 3)])[..., 0], axis=1).view(np.int64)
        asked = distinct(rng, count, n, chosen.queries)
        mark = np.full((count, 1), self.vocab_size - 1)
        ids = np.concatenate([lines.reshape(count, -1), mark, np.take_along_axis(names, asked, 1)], 1)
        targets = np.full(ids.shape, IGNORED)
        targets[:, -chosen.queries :] = np.take_along_axis(value, asked, 1)
        return Sample(ids, targets, {"depth": np.take_along_axis(depth, asked, 1).max(1)})
