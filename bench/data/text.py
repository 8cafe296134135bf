"""What all text tasks share: tokens cut into windows, bits per byte, and the unigram level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from pydantic import Field, field_validator

from bench.config import LARGEST, Strict
from bench.data.task import Metric, TaskData, Tokens, make_data, sequences_as_values
from bench.data.tokenizers import PRETRAINED, make_encoder, make_tokenizer
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


def text_data(documents: Mapping[str, Sequence[str]], options: TextOptions) -> TaskData:
    """Task data from the documents of the splits train, valid and test.

    The documents of a split are joined and cut into windows that do not overlap; every token but the first is scored
    once. A train window that occurs in another split is dropped, so that no test window has been seen. Raises
    UserError if a split is shorter than a window.
    """
    encode, vocab_size = make_encoder(options.tokenizer, options.bpe_vocab_size, documents["train"])
    tokens = {name: np.concatenate([np.empty(0, np.int64), *encode(texts)]) for name, texts in documents.items()}
    n_bytes = {name: sum(len(text.encode()) for text in texts) for name, texts in documents.items()}
    splits = {}
    for name, stream in tokens.items():
        if len(stream) <= options.length:
            raise UserError(
                f"options.length: {options.length} needs more text than the {len(stream)} tokens of split {name!r}"
            )
        splits[name] = _windows(stream, options.length)
    held_out = np.concatenate([sequences_as_values(splits[name][0]) for name in ("valid", "test")])
    fresh = ~np.isin(sequences_as_values(splits["train"][0]), held_out)
    splits["train"] = (splits["train"][0][fresh], splits["train"][1][fresh])
    fresh = ~np.isin(sequences_as_values(splits["valid"][0]), sequences_as_values(splits["test"][0]))
    splits["valid"] = (splits["valid"][0][fresh], splits["valid"][1][fresh])
    for name, (ids, targets) in splits.items():
        keep = getattr(options, f"n_{name}")
        if keep is not None and keep < len(ids):
            chosen = np.arange(keep) * len(ids) // keep
            splits[name] = (ids[chosen], targets[chosen])
        if not len(ids):
            raise UserError(f"split {name!r} holds nothing that the other splits do not hold as well")
    per_token = {name: n_bytes[name] / len(stream) for name, stream in tokens.items()}
    unigram = _unigram_bits(splits["train"][1], splits["test"][1], vocab_size) / per_token["test"]
    tokenizer = partial(make_tokenizer, options.tokenizer, options.bpe_vocab_size, documents["train"])
    return make_data(splits, vocab_size, Metric("bits_per_byte", False, {"unigram": unigram}), per_token, tokenizer)


def _windows(stream: Tokens, length: int) -> tuple[Tokens, Tokens]:
    count = (len(stream) - 1) // length
    ids = stream[: count * length].reshape(count, length)
    return ids, stream[1 : count * length + 1].reshape(count, length)


def _unigram_bits(train: Tokens, test: Tokens, vocab_size: int) -> float:
    """Bits per test token of the train split's token frequencies, with one more count for every token."""
    counts = np.bincount(train.ravel(), minlength=vocab_size) + 1
    return float(-np.log2(counts / counts.sum())[test.ravel()].mean())
