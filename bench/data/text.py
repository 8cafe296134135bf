"""What all text tasks share: tokens cut into windows, bits per byte, and the unigram level."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from bench.config import IGNORED, LARGEST, Strict
from bench.data.columns import Column, batches, pieces, rows_of
from bench.data.overlap import in_others, shared_passages
from bench.data.task import Metric, Sample, TaskData, make_data, token_kind
from bench.data.tokenizers import PRETRAINED, TextTokenizer, text_tokenizer
from bench.errors import UserError


class TextOptions(Strict):
    """Options of every text task.

    Attributes:
        length: tokens in a window.
        tokenizer: ``bytes``, ``bpe`` (byte-level, trained on the train split) or ``pretrained:NAME_OR_FOLDER``.
        bpe_vocab_size: of the trained BPE.
        n_train, n_valid, n_test: windows to keep of a split, evenly spaced over it, all by default.
    """

    length: int = Field(128, ge=2, le=65536)
    tokenizer: str = "bytes"
    bpe_vocab_size: int = Field(1024, ge=257, le=262144)
    n_train: int | None = Field(None, ge=1, le=LARGEST)
    n_valid: int | None = Field(None, ge=1, le=LARGEST)
    n_test: int | None = Field(None, ge=1, le=LARGEST)

    @field_validator("tokenizer")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in ("bytes", "bpe") and not value.startswith(PRETRAINED):
            raise ValueError("must be 'bytes', 'bpe' or 'pretrained:NAME_OR_FOLDER'")
        return value


def looked_in(path: Path) -> str:
    """Where a path that a study gives is looked for, to be told where nothing is there."""
    return "" if path.is_absolute() else f" in {Path.cwd()}"


def text_data(
    documents: Mapping[str, Iterable[str]],
    options: TextOptions,
    notes: Sequence[str] = (),
    room: Path | None = None,
) -> TaskData:
    """Task data from the documents of the splits train, valid and test.

    The documents of a split are joined and cut into windows that do not overlap; every token but the first is scored
    once. A train window that occurs in another split is dropped, so that no test window has been seen; long passages
    that two splits have in common are counted.

    Args:
        documents: to be gone through several times.
        options: of the task.
        notes: what is to be told of the data besides.
        room: a folder for what does not fit into memory while the data are made; None: all of it fits.

    Raises:
        UserError: if a split is shorter than a window, or holds nothing of its own.
    """
    tokenizer = text_tokenizer(options.tokenizer, options.bpe_vocab_size, documents["train"])
    splits, n_bytes, per_token = dict[str, Sample](), dict[str, int](), dict[str, float]()
    for name, texts in documents.items():
        stream, n_bytes[name] = _tokens(texts, tokenizer, room)
        if len(stream) <= options.length:
            short = "; ".join([f"{len(stream)} tokens of split {name!r}", *notes])  # as that all rows were left out
            raise UserError(f"options.length: {options.length} needs more text than the {short}")
        splits[name] = _windows(stream, options.length)
        per_token[name] = n_bytes[name] / len(stream)
    splits, dropped = distinct_splits(splits, options, room)
    told = [*notes, *dropped, *shared_passages(documents, n_bytes)]
    metric = bits_per_byte(splits, tokenizer.vocab_size, per_token, room)
    return make_data(splits, tokenizer.vocab_size, metric, per_token, tokenizer.made, told)


def distinct_splits(
    splits: Mapping[str, Sample], options: TextOptions, room: Path | None
) -> tuple[dict[str, Sample], list[str]]:
    """The splits without the sequences of train that stand in another one and those of valid that stand in test, each
    cut down to as many as the options want; and how many were left out, in words. Raises UserError if none is left.
    """
    found, notes = {}, []
    for name, others in (("train", ("valid", "test")), ("valid", ("test",)), ("test", ())):
        ids, targets = splits[name][:2]
        fresh = np.ones(len(ids), bool)
        if others:
            fresh = ~in_others(ids, [splits[other].ids for other in others])
        if gone := int((~fresh).sum()):
            notes.append(f"{gone:,} of {len(ids):,} sequences of {name} left out: {' or '.join(others)} has them too")
        if not fresh.any():
            raise UserError(f"split {name!r} holds nothing that the other splits do not hold as well")
        keep = getattr(options, f"n_{name}")
        found[name] = Sample(rows_of(ids, fresh, keep, room), rows_of(targets, fresh, keep, room))
    return {name: found[name] for name in splits}, notes  # in the order that the fingerprint is made of


def bits_per_byte(
    splits: Mapping[str, Sample], vocab_size: int, per_token: Mapping[str, float], room: Path | None
) -> Metric:
    """The metric of text, with the level of a model that knows nothing but how frequent each token is in train: one
    more count for every token. per_token: bytes of a scored token by split.
    """
    counts = np.ones(vocab_size, np.int64)
    for part in _scored(splits["train"].targets):
        counts += np.bincount(part, minlength=vocab_size)
    logs, of_test = np.log2(counts / counts.sum()), Column(np.float64, room)
    for part in _scored(splits["test"].targets):
        of_test.add(logs[part])
    return Metric("bits_per_byte", False, {"unigram": float(-of_test.whole().mean()) / per_token["test"]})


def _scored(targets: NDArray[Any]) -> Iterable[NDArray[Any]]:
    for part in pieces(*targets.shape):
        flat = targets[part].ravel()
        yield flat[flat != IGNORED]


def _tokens(documents: Iterable[str], tokenizer: TextTokenizer, room: Path | None) -> tuple[NDArray[Any], int]:
    """The tokens of the documents in a row, and their bytes."""
    found, n_bytes = Column(token_kind(tokenizer.vocab_size), room), 0
    for batch in batches(documents):
        for tokens in tokenizer.encode(batch):
            found.add(tokens)
        n_bytes += sum(len(text.encode()) for text in batch)
    return found.whole(), n_bytes


def _windows(stream: NDArray[Any], length: int) -> Sample:
    count = (len(stream) - 1) // length
    ids = stream[: count * length].reshape(count, length)
    return Sample(ids, stream[1 : count * length + 1].reshape(count, length))
