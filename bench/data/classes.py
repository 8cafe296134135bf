"""What tasks have in common whose sequences are vectors of one class each: pictures, speech."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.config import Strict
from bench.data.task import SPLITS, Metric, Processor, Sample, TaskData, make_data
from bench.form import Form

FITTED = 5_000  # sequences that the linear model is fitted to at most
LINEAR = "logistic regression"


class ClassOptions(Strict):
    """What every such task lets choose.

    Attributes:
        attention: who sees whom.
        readout: what the class is read from: the ``mean`` of the final states, or the state of a ``class_token`` behind
            them (Devlin et al. 2019, arXiv 1810.04805; Dosovitskiy et al. 2021, arXiv 2010.11929).
    """

    attention: Literal["full", "causal"] = "full"
    readout: Literal["mean", "class_token"] = "mean"


class Labelled(NamedTuple):
    """Sequences of a split: vectors [N, T, F], not a number where a sequence has ended, and classes [N]."""

    vectors: NDArray[np.float32]
    classes: NDArray[np.int64]


def class_data(
    splits: Mapping[str, Labelled],
    names: Sequence[str],
    options: ClassOptions,
    patch: int | None = None,
    processor: Callable[[], Processor | None] | None = None,
    notes: Sequence[str] = (),
) -> TaskData:
    """Task data from sequences of one class each.

    Their levels are those of guessing the train split's most frequent class, and of scikit-learn's logistic regression
    on all numbers of a sequence, as test accuracies.

    Args:
        splits: train, valid and test.
        names: of the classes.
        options: what the task's users have chosen.
        patch: pixels on a side of the squares that the vectors are, if they are cut from square pictures.
        processor: makes what makes the vectors of pictures.
        notes: what there is to know of how the data were made.
    """
    train, test = splits["train"], splits["test"]
    padded = any(bool(np.isnan(split.vectors).any()) for split in splits.values())
    with_token = options.readout == "class_token"
    form = Form(
        features=train.vectors.shape[2] + with_token,
        patch=patch,
        attention=options.attention,
        judged="last" if with_token else "mean",
        padded=padded,
    )
    common = np.bincount(train.classes).argmax()
    metric = Metric(
        "accuracy", True, {"majority class": float((test.classes == common).mean())}, {LINEAR: linear(train, test)}
    )
    told = np.array(names)
    samples = {
        name: Sample(
            _with_token(splits[name].vectors) if with_token else splits[name].vectors,
            splits[name].classes[:, None],
            {"class": told[test.classes]} if name == "test" else {},
        )
        for name in SPLITS
    }
    if len(train.classes) > FITTED:
        notes = (*notes, f"{LINEAR} is fitted to the first {FITTED:,} sequences")
    return make_data(samples, len(names), metric, tokenizer=processor, notes=notes, form=form)


def _with_token(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """``bench.model.forms.with_class_token`` of an array."""
    import torch  # start-up

    from bench.model.forms import with_class_token  # start-up

    return with_class_token(torch.from_numpy(vectors)).numpy()


def linear(train: Labelled, test: Labelled) -> float:
    """Test accuracy of a logistic regression on all numbers of a sequence, 0 behind its end."""
    from sklearn.linear_model import LogisticRegression  # start-up

    def flat(vectors: NDArray[Any]) -> NDArray[Any]:
        return np.nan_to_num(vectors.reshape(len(vectors), -1))

    if len(np.unique(train.classes[:FITTED])) < 2:
        return float((test.classes == train.classes[0]).mean())
    model = LogisticRegression(max_iter=1000).fit(flat(train.vectors[:FITTED]), train.classes[:FITTED])
    return float(model.score(flat(test.vectors), test.classes))


def standardised(
    splits: Mapping[str, Labelled], axes: tuple[int, ...]
) -> tuple[dict[str, Labelled], NDArray[Any], NDArray[Any]]:
    """The splits with mean 0 and deviation 1 over the axes of the train split's vectors; its mean and deviation."""
    mean = np.nanmean(splits["train"].vectors, axes, keepdims=True, dtype=np.float64)
    spread = np.nanstd(splits["train"].vectors, axes, keepdims=True, dtype=np.float64)
    spread[spread == 0] = 1.0
    found = {
        name: split._replace(vectors=((split.vectors - mean) / spread).astype(np.float32))
        for name, split in splits.items()
    }
    return found, mean.ravel(), spread.ravel()


def stratified(classes: NDArray[np.int64], shares: Mapping[str, float], seed: int) -> dict[str, NDArray[np.int64]]:
    """Places of the sequences of every split, each class divided by the shares; the split ``train`` gets the rest."""
    found: dict[str, list[NDArray[np.int64]]] = {name: [] for name in (*shares, "train")}
    rng = np.random.default_rng(seed)
    for label in np.unique(classes):
        places, first = rng.permutation(np.flatnonzero(classes == label)), 0
        for name, share in shares.items():
            count = round(share * len(places))
            found[name].append(places[first : first + count])
            first += count
        found["train"].append(places[first:])
    return {name: np.sort(np.concatenate(parts)) for name, parts in found.items()}
