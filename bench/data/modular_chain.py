"""Modular chains, as i-GSM's reasoning without its words (Ye et al. 2024, arXiv 2407.20311; Saunshi et al. 2025)."""

from __future__ import annotations

import math
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from bench.config import IGNORED
from bench.data.generated import Generated, Sizes, best_accuracy, distinct
from bench.data.task import Sample, TaskSize, Tokens, register

COUNTED = 20_000  # sequences of the train split that the levels of solvers are counted on
BLOCK = 1 << 22  # numbers held at a time


@register("modular_chain")
class ModularChain(Generated):
    """Modular chains: a graph of assignments over the integers modulo 7; the values of queried variables.

    An assignment is three tokens ``x a b`` and says x := a + b; a and b are variables or constants. The first variable
    is made of two constants; every later one of an earlier variable and, evenly, another such draw or a constant.
    Names are random, so that they tell no order. After the assignments stands ``?``, then one queried name after the
    other, with its value as label; values are never printed. The test is sliced by depth: the longest chain of
    assignments behind any query of the sequence. The level ``depth k`` is the test accuracy of a solver that reads the
    queried line, the lines of the variables in it, and so on k lines deep. To it the value is a known number plus
    multiples of values it has not read; it guesses what is likeliest, on the train split, given that number and the
    greatest divisor that the multiples and the modulus have in common (with all values read it is the modulus).
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

    @property
    def length(self) -> int:
        return int(3 * self.options.variables + 1 + self.options.queries)

    def of_sequence(self) -> TaskSize:
        whole = super().of_sequence()
        return whole._replace(seconds=whole.seconds + 6e-8 * self.n_names)

    def solving(self) -> float:
        chosen, n = self.options, self.options.variables
        levels = min(n, 3 * math.log(n) + 3)  # that deep are random graphs of so many lines
        rows = min(chosen.n_train, COUNTED) + min(chosen.n_test, COUNTED)
        return float(2.5e-8 * rows * chosen.queries * self.vocab_size * levels)

    def further(self) -> dict[str, Self]:
        sizes = self.options.test_variables
        return {str(n): self.resized(variables=n, test_variables=(self.n_names,)) for n in sizes}

    def solvers(self, train: Sample, test: Sample) -> dict[str, float]:
        most, queries = int(test.slices["depth"].max()), self.options.queries
        told = (self._told(split.ids[:COUNTED], most - 1) for split in (train, test))
        targets = (split.targets[:COUNTED, -queries:] for split in (train, test))
        (seen, labels), (asked, wanted) = zip(told, targets, strict=True)
        pairs = enumerate(zip(seen, asked, strict=True), 1)
        return {f"depth {depth}": best_accuracy((one, labels), (other, wanted)) for depth, (one, other) in pairs}

    def _told(self, ids: Tokens, most: int) -> Tokens:
        """What lines up to 1, 2, ... ``most`` deep tell of the queried values, as a number each: [most, N, queries]."""
        rows = max(1, BLOCK // (self.options.queries * self.vocab_size))
        parts = [self._read(ids[at : at + rows], most) for at in range(0, len(ids), rows)]
        return np.concatenate(parts, 1)

    def _read(self, ids: Tokens, most: int) -> Tokens:
        modulus, queries = self.options.modulus, self.options.queries
        lines = ids[:, : -queries - 1].reshape(len(ids), 1, -1, 3)
        row, query = np.arange(len(ids))[:, None, None], np.arange(queries)[:, None]
        form = np.zeros((len(ids), queries, self.vocab_size - 1), dtype=np.int64)  # how often each token is in the sum
        np.put_along_axis(form, ids[:, -queries:, None], 1, 2)
        told = np.empty((most, len(ids), queries), dtype=np.int64)
        for depth in range(most):
            times = np.take_along_axis(form, lines[..., 0], 2)
            form[..., modulus:] = 0
            for term in (1, 2):
                np.add.at(form, (row, query, lines[..., term]), times)
            form %= modulus
            known = form[..., :modulus] @ np.arange(modulus) % modulus
            told[depth] = known * (modulus + 1) + np.gcd(np.gcd.reduce(form[..., modulus:], 2), modulus)
        return told

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
