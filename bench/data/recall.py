"""In-context and noisy recall (Poli et al. 2024, "Mechanistic design and scaling", arXiv 2403.17844, section 3)."""

from __future__ import annotations

from typing import Self

import numpy as np
from pydantic import Field

from bench.config import IGNORED, LARGEST
from bench.data.generated import Generated, Sizes
from bench.data.task import Sample, TaskSize, register


@register("recall")
class Recall(Generated):
    """In-context recall: key-value pairs; wherever a key comes again, its value in this sequence is the label.

    Keys are the first half of the alphabet, values the second; a sequence gives each key a random value and keeps it.
    The label stands at the key, and is scored if the key has been there before. The last pair always repeats a key.
    Noisy recall: each pair is, with probability ``noise``, two random noise symbols instead; one pair before the last
    never is. Only such labels are trained on, not the rest of the sequence.
    Small and paper's baseline: the defaults (V 16, n 128; the paper has 12,800 examples), noisy with ``noise: 0.2``
    (noise 0.2 to 0.8; the paper's V counts the 16 noise symbols too). Large: ``alphabet`` to 128, ``length`` to 1024,
    ``n_train`` down to 800.
    """

    relief = "fewer or longer sequences, a larger alphabet"

    class Options(Generated.Options):
        """Axes of the task, besides those of every generated task.

        Attributes:
            alphabet: keys and values together.
            length: tokens in a sequence, two to a pair.
            noise: share of pairs that are noise.
            noise_symbols: there are, if any noise.
            test_lengths: further tests of these lengths.
        """

        alphabet: int = Field(16, ge=4, le=65536, multiple_of=2)
        length: int = Field(128, ge=4, le=65536, multiple_of=2)
        noise: float = Field(0.0, ge=0.0, lt=1.0)
        noise_symbols: int = Field(16, ge=1, le=65536)
        test_lengths: Sizes = ()
        n_train: int = Field(12800, ge=1, le=LARGEST)

    @property
    def vocab_size(self) -> int:
        return self.options.alphabet + (self.options.noise_symbols if self.options.noise else 0)

    def of_sequence(self) -> TaskSize:
        half = self.options.alphabet // 2  # values of its own for all keys, and one of them drawn among those shown
        whole = super().of_sequence()
        return TaskSize(max(whole.bytes, 17 * half), whole.seconds + 3.5e-8 * half)

    def further(self) -> dict[str, Self]:
        return {str(n): self.resized(length=n, test_lengths=()) for n in self.options.test_lengths}

    def sample(self, count: int, rng: np.random.Generator) -> Sample:
        chosen = self.options
        half, pairs, row = chosen.alphabet // 2, chosen.length // 2, np.arange(count)
        keys = rng.integers(half, size=(count, pairs))
        values = rng.integers(half, chosen.alphabet, size=(count, half))
        noisy = rng.random((count, pairs)) < chosen.noise
        noisy[row, rng.integers(pairs - 1, size=count)] = noisy[:, -1] = False
        shown, again = np.zeros((count, half), dtype=bool), np.zeros((count, pairs), dtype=bool)
        for pair in range(pairs):
            if pair == pairs - 1:  # one of the keys shown, each as likely
                keys[:, pair] = (shown * rng.random(shown.shape)).argmax(1)
            key = keys[:, pair]
            again[:, pair] = shown[row, key] & ~noisy[:, pair]
            shown[row, key] |= ~noisy[:, pair]
        value = np.take_along_axis(values, keys, 1)
        ids = np.stack([keys, value], 2)
        if chosen.noise:
            ids = np.where(noisy[..., None], rng.integers(chosen.alphabet, self.vocab_size, size=ids.shape), ids)
        targets = np.stack([np.where(again, value, IGNORED), np.full_like(value, IGNORED)], 2)
        return Sample(ids.reshape(count, -1), targets.reshape(count, -1))
