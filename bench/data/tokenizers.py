"""Text to tokens: bytes, a BPE trained on the task's own train split, or a pretrained tokeniser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from bench.data.task import Tokens
from bench.errors import UserError

Encoder = Callable[[Sequence[str]], list[Tokens]]
Save = Callable[[Path], object]
PRETRAINED = "pretrained:"


def make_encoder(tokenizer: str, bpe_vocab_size: int, train: Sequence[str]) -> tuple[Encoder, int, Save]:
    """The function that encodes documents, its vocabulary size, and what saves the tokeniser into a folder, from where
    ``transformers.AutoTokenizer`` loads it.

    tokenizer: ``bytes``, ``bpe`` (byte-level, trained on the documents ``train``), or ``pretrained:NAME_OR_FOLDER``.
    Raises UserError if it is none of these or cannot be loaded.
    """
    if tokenizer == "bytes":
        return _bytes, 256, _save_bytes
    if tokenizer == "bpe":
        return _bpe(bpe_vocab_size, train)
    if tokenizer.startswith(PRETRAINED):
        return _pretrained(tokenizer.removeprefix(PRETRAINED))
    raise UserError(f"tokenizer: {tokenizer!r} is not allowed (allowed: 'bytes', 'bpe', 'pretrained:NAME_OR_FOLDER')")


def _bytes(documents: Sequence[str]) -> list[Tokens]:
    return [np.frombuffer(document.encode(), dtype=np.uint8).astype(np.int64) for document in documents]


def _save_bytes(folder: Path) -> None:
    """Bytes as a byte-level BPE that merges nothing, a token's number being its byte."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as Decoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    model = Tokenizer(BPE(vocab={letter: byte for byte, letter in bytes_to_unicode().items()}, merges=[]))
    model.pre_tokenizer, model.decoder = ByteLevel(add_prefix_space=False, use_regex=False), Decoder()
    _save_fast(model.to_str(), folder)


def _save_fast(tokenizer: str, folder: Path) -> None:
    """Save the tokeniser of a ``tokenizers`` JSON text."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer), clean_up_tokenization_spaces=False)
    fast.save_pretrained(folder)


def _bpe(vocab_size: int, train: Sequence[str]) -> tuple[Encoder, int, Save]:
    from tokenizers import ByteLevelBPETokenizer

    model = ByteLevelBPETokenizer()
    model.train_from_iterator(train, vocab_size=vocab_size, min_frequency=2, show_progress=False)

    def encode(documents: Sequence[str]) -> list[Tokens]:
        return [np.asarray(found.ids, dtype=np.int64) for found in model.encode_batch(list(documents))]

    return encode, model.get_vocab_size(), lambda folder: _save_fast(model.to_str(), folder)


def _pretrained(name: str) -> tuple[Encoder, int, Save]:
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

    return encode, len(model), model.save_pretrained
