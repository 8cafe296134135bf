"""Text to tokens: bytes, a BPE trained on the task's own train split, or a pretrained tokeniser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from bench.data.task import Tokens
from bench.errors import UserError

Encoder = Callable[[Sequence[str]], list[Tokens]]
PRETRAINED = "pretrained:"


def make_encoder(tokenizer: str, bpe_vocab_size: int, train: Sequence[str]) -> tuple[Encoder, int]:
    """The function that encodes documents, and its vocabulary size.

    tokenizer: ``bytes``, ``bpe`` (byte-level, trained on the documents ``train``), or ``pretrained:NAME_OR_FOLDER``.
    Raises UserError if it is none of these or cannot be loaded.
    """
    if tokenizer == "bytes":
        return _bytes, 256
    if tokenizer == "bpe":
        return _bpe(bpe_vocab_size, train)
    if tokenizer.startswith(PRETRAINED):
        return _pretrained(tokenizer.removeprefix(PRETRAINED))
    raise UserError(f"tokenizer: {tokenizer!r} is not allowed (allowed: 'bytes', 'bpe', 'pretrained:NAME_OR_FOLDER')")


def _bytes(documents: Sequence[str]) -> list[Tokens]:
    return [np.frombuffer(document.encode(), dtype=np.uint8).astype(np.int64) for document in documents]


def _bpe(vocab_size: int, train: Sequence[str]) -> tuple[Encoder, int]:
    from tokenizers import ByteLevelBPETokenizer

    model = ByteLevelBPETokenizer()
    model.train_from_iterator(train, vocab_size=vocab_size, min_frequency=2, show_progress=False)

    def encode(documents: Sequence[str]) -> list[Tokens]:
        return [np.asarray(found.ids, dtype=np.int64) for found in model.encode_batch(list(documents))]

    return encode, model.get_vocab_size()


def _pretrained(name: str) -> tuple[Encoder, int]:
    from transformers import AutoTokenizer

    try:
        model = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        kind = "folder" if Path(name).exists() else "name or folder"
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"tokenizer: cannot load the pretrained {kind} {name!r}: {reason}") from None

    def encode(documents: Sequence[str]) -> list[Tokens]:
        found = model(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
        return [np.asarray(ids, dtype=np.int64) for ids in found]

    return encode, len(model)
