"""What all generated tasks share: splits that do not overlap, longer tests, and the level of chance."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

import numpy as np
from pydantic import AfterValidator, Field

from bench.config import IGNORED, LARGEST, Strict
from bench.data.task import (
    Metric,
    Sample,
    Task,
    TaskData,
    TaskSize,
    Tokens,
    check_sample,
    get_task,
    make_data,
    sequences_as_values,
)
from bench.errors import UserError, shown

KEPT = 3 * 8  # bytes of a token of a split: of inputs, targets and what was seen
DRAWN = 6 * 8  # the same while the split is drawn, with those that were drawn and parts to be put together
TOOK = 2e-7  # seconds of a token: drawn, compared, counted for the level of chance
LEAST = 1024  # sequences drawn at a time
MIN_ACCEPTED = 0.01  # share of drawn sequences that must be usable and new


def _different(values: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(values)) < len(values):
        raise ValueError("must be different numbers")
    return values


Sizes = Annotated[tuple[Annotated[int, Field(ge=1, le=65536)], ...], AfterValidator(_different)]


class Generated(Task):
    """A task whose sequences are drawn at random: no sequence repeats, within a split or between splits.

    The level ``chance`` is the test accuracy of the best predictor without context: the train split's most frequent
    label for what ``without_context`` tells, by default the position and the current token. What ``solvers`` gives are
    levels of predictors that do a part of the task.
    """

    relief: ClassVar[str] = "fewer or longer sequences"  # what helps when there are too few different ones

    class Options(Strict):
        """Of every generated task.

        Attributes:
            n_train, n_valid, n_test: sequences.
            seed: of the data, not of the training.
        """

        n_train: int = Field(20000, ge=1, le=LARGEST)
        n_valid: int = Field(1000, ge=1, le=LARGEST)
        n_test: int = Field(2000, ge=1, le=LARGEST)
        seed: int = Field(0, ge=0, le=LARGEST)

    @property
    def vocab_size(self) -> int:
        """Number of different tokens, labels included."""
        raise NotImplementedError

    def sample(self, count: int, rng: np.random.Generator) -> Sample:
        """``count`` labelled sequences, fewer where those without a label are left out. They may repeat."""
        raise NotImplementedError(f"{type(self).__name__} has no sample()")

    def further(self) -> dict[str, Self]:
        """Further test splits by name: the same task at other sizes, with the same tokens."""
        return {}

    def without_context(self, ids: Tokens) -> Tokens:
        """What a predictor without context sees at every position of ids [N, T], as one number each [N, T]."""
        return np.arange(ids.shape[1]) * self.vocab_size + ids

    def solvers(self, train: Sample, test: Sample) -> dict[str, float]:
        """Test accuracy of solvers that do a part of the task, by name, from the least to the most."""
        return {}

    @property
    def length(self) -> int:
        """Tokens in a sequence: what its options call so, else one is drawn to see."""
        told = getattr(self.options, "length", None)
        return told if isinstance(told, int) else self._sampled(1, np.random.default_rng(0)).ids.shape[1]

    def of_sequence(self) -> TaskSize:
        """What one sequence of many takes while they are drawn."""
        return TaskSize(DRAWN * self.length, TOOK * self.length)

    def solving(self) -> float:
        """Seconds that ``solvers`` take."""
        return 0.0

    def size(self) -> TaskSize:
        chosen = self.options
        splits = [(self, n) for n in (chosen.n_test, chosen.n_valid, chosen.n_train)]
        splits += [(task, chosen.n_test) for task in self.further().values()]
        kept, most, seconds = 0.0, 0.0, self.solving()
        for task, count in splits:
            one = task.of_sequence()
            most = max(most, kept + one.bytes * max(LEAST, count))
            kept += KEPT * task.length * count
            seconds += one.seconds * max(LEAST, count)
        return TaskSize(most, seconds)

    def resized(self, **changes: Any) -> Self:
        """The same task with some options changed. Raises UserError if they do not fit."""
        task = get_task(self.name, {**self.options.model_dump(), **changes})
        assert isinstance(task, type(self))
        return task

    def compared(self, ids: Tokens) -> Tokens:
        """Sequences [N, T] as they are held against those of other splits: padding must not tell two of them apart."""
        return ids

    def build(self) -> TaskData:
        chosen, further = self.options, self.further()
        # Tests first, so that they stay the same whatever the size of the other splits.
        wanted = {
            "test": (self, chosen.n_test),
            "valid": (self, chosen.n_valid),
            "train": (self, chosen.n_train),
            **{name: (task, chosen.n_test) for name, task in further.items()},
        }
        sequences = np.random.SeedSequence(chosen.seed).spawn(len(wanted))
        splits: dict[str, Sample] = {}
        seen: dict[int, np.ndarray] = {}  # by length
        for (name, (task, count)), sequence in zip(wanted.items(), sequences, strict=True):
            splits[name] = task._draw(count, np.random.default_rng(sequence), seen)
        for name in ("valid", "train"):
            splits[name] = splits[name]._replace(slices={})
        train, test = splits["train"], splits["test"]
        for name in ("train", "test"):  # before they are counted
            check_sample(name, splits[name], self.vocab_size)
        chance = best_accuracy(
            (self.without_context(train.ids), train.targets), (self.without_context(test.ids), test.targets)
        )
        metric = Metric("accuracy", True, {"chance": chance}, self.solvers(train, test))
        return make_data(splits, self.vocab_size, metric)

    def _sampled(self, count: int, rng: np.random.Generator) -> Sample:
        """What ``sample`` gives. Raises TypeError where that is no sample."""
        found: object = self.sample(count, rng)
        if not isinstance(found, Sample):
            raise TypeError(f"sample() returns {shown(found)}, which is no Sample")
        return found

    def _draw(self, count: int, rng: np.random.Generator, seen: dict[int, np.ndarray]) -> Sample:
        """``count`` sequences that do not repeat and are not in ``seen``, to which they are added."""
        found: list[Sample] = []
        got = 0
        while got < count:
            size = max(LEAST, count - got)
            drawn = self._sampled(size, rng)
            compared = self.compared(drawn.ids)
            whole, length = sequences_as_values(compared), compared.shape[1]
            fresh = np.zeros(len(whole), dtype=bool)
            fresh[np.unique(whole, return_index=True)[1]] = True
            if length in seen:
                fresh &= ~np.isin(whole, seen[length])
            chosen = np.flatnonzero(fresh)[: count - got]
            seen[length] = np.concatenate([seen[length], whole[chosen]]) if length in seen else whole[chosen]
            found.append(
                Sample(drawn.ids[chosen], drawn.targets[chosen], {k: v[chosen] for k, v in drawn.slices.items()})
            )
            got += len(chosen)
            if got < count and len(chosen) < MIN_ACCEPTED * size:
                raise UserError(
                    f"{self.told} leave too few different sequences ({len(chosen)} new ones in "
                    f"{size} drawn; allowed: {self.relief})"
                )
        return Sample(
            np.concatenate([part.ids for part in found]),
            np.concatenate([part.targets for part in found]),
            {axis: np.concatenate([part.slices[axis] for part in found]) for axis in found[0].slices},
        )


def best_accuracy(train: tuple[Tokens, Tokens], test: tuple[Tokens, Tokens]) -> float:
    """Test accuracy of the best predictor that knows one thing: the train split's most frequent label for it, the
    smallest of a tie, and for what the train split does not have its most frequent label of all.

    train, test: what is known at every position, as numbers of at least 0 [N, T], and the targets [N, T].
    """
    (known, targets), (asked, wanted) = train, test
    n_labels = 1 + int(targets.max())
    scored = targets != IGNORED
    labels = targets[scored]
    pairs, counts = np.unique(known[scored] * n_labels + labels, return_counts=True)
    keys, label = np.divmod(pairs, n_labels)
    order = np.lexsort((-label, counts, keys))  # last of each key: its most frequent label, the first one of a tie
    last = order[np.append(np.diff(keys[order]) > 0, True)]
    keys, label = keys[last], label[last]
    scored = wanted != IGNORED
    asked = asked[scored]
    place = np.searchsorted(keys, asked).clip(max=len(keys) - 1)
    guess = np.where(keys[place] == asked, label[place], np.bincount(labels).argmax())
    return float((guess == wanted[scored]).mean())


def distinct(rng: np.random.Generator, count: int, below: int, k: int) -> Tokens:
    """``count`` rows of ``k`` different numbers below ``below``, in random order: [count, k]."""
    block = max(1, (1 << 22) // below)  # rows at a time, to bound the memory
    parts = [rng.random((min(block, count - at), below)).argsort(1)[:, :k] for at in range(0, count, block)]
    return np.concatenate(parts)
