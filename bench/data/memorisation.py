"""Memorisation (Poli et al. 2024, arXiv 2403.17844, section 3): parameters matter, depth hardly does."""

from __future__ import annotations

import numpy as np
from pydantic import Field, model_validator

from bench.config import IGNORED, LARGEST
from bench.data.generated import Generated
from bench.data.task import Sample, register


@register("memorisation")
class Memorisation(Generated):
    """Memorisation: one fixed map from keys to values, the same in every sequence and in every split.

    Unlike in the other tasks the test asks for nothing new: what is asked for is the map, and a sequence holds no hint
    of it. A sequence lists keys, each followed by a query token, where the value is the label; values are never inputs.
    The sequences of the splits differ, their keys do not: keys are dealt from shuffled decks, so that the train split
    holds every one of them, as evenly as can be. The map is one to one.
    Small and paper's baseline: the defaults (V 256, n 32, 256 examples). Large: ``vocabulary`` 512 to 8192.
    """

    relief = "fewer or longer sequences, a larger vocabulary"

    class Options(Generated.Options):
        """Axes of the task, besides those of every generated task.

        vocabulary: V; the last token is the query, and of the others one half are keys and one half values; length:
        tokens in a sequence, two to a key.
        """

        vocabulary: int = Field(256, ge=5, le=1 << 20)
        length: int = Field(32, ge=2, le=65536, multiple_of=2)
        n_train: int = Field(256, ge=1, le=LARGEST)
        n_valid: int = Field(256, ge=1, le=LARGEST)
        n_test: int = Field(256, ge=1, le=LARGEST)

        @model_validator(mode="after")
        def _consistent(self) -> Memorisation.Options:
            keys, shown = (self.vocabulary - 1) // 2, self.n_train * self.length // 2
            if shown < keys:
                raise ValueError(
                    f"n_train = {self.n_train} sequences of length = {self.length} show {shown} keys, fewer than the "
                    f"{keys} of vocabulary = {self.vocabulary}"
                )
            return self

    @property
    def vocab_size(self) -> int:
        return self.options.vocabulary

    def sample(self, count: int, rng: np.random.Generator) -> Sample:
        chosen = self.options
        n_keys, pairs = (chosen.vocabulary - 1) // 2, chosen.length // 2
        # From the options alone: every split, each with its own generator, must have the same map.
        value_of = n_keys + np.random.default_rng([chosen.seed, n_keys]).permutation(n_keys)
        decks = np.tile(np.arange(n_keys), (-(-count * pairs // n_keys), 1))
        keys = rng.permuted(decks, axis=1).ravel()[: count * pairs].reshape(count, pairs)
        ids = np.stack([keys, np.full_like(keys, chosen.vocabulary - 1)], 2).reshape(count, -1)
        targets = np.stack([np.full_like(keys, IGNORED), value_of[keys]], 2).reshape(count, -1)
        return Sample(ids, targets)
