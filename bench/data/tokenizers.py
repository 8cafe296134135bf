"""Text to tokens: bytes, a BPE trained on the task's own train split, or a pretrained tokeniser."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bench.errors import UserError, first_line

if TYPE_CHECKING:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerBase

Tokens = NDArray[np.int64]
Encoder = Callable[[Sequence[str]], list[Tokens]]
PRETRAINED = "pretrained:"
END = "<|endoftext|>"


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


def make_tokenizer(tokenizer: str, bpe_vocab_size: int, train: Sequence[str]) -> PreTrainedTokenizerBase:
    """The tokeniser in the form that is saved beside a model; its ids are those of ``make_encoder``.

    For ``bytes`` the id of a byte is the byte. NUL, which no text holds, lends its id to the end of the text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # start-up
    from transformers import PreTrainedTokenizerFast  # start-up
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # start-up

    if tokenizer.startswith(PRETRAINED):
        return _load(tokenizer.removeprefix(PRETRAINED))
    if tokenizer == "bpe":
        state = json.loads(_train_bpe(bpe_vocab_size, train).to_str())
        state["model"]["vocab"][END] = state["model"]["vocab"].pop(bytes_to_unicode()[0])
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token=END)
    vocab = {letter: byte for byte, letter in bytes_to_unicode().items() if byte} | {END: 0}
    model = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token=END, clean_up_tokenization_spaces=False)


def number_tokenizer(vocab_size: int) -> PreTrainedTokenizerBase:
    """For tasks whose data are token ids: the text of a sequence is its ids, written out with spaces between.

    The end of the text, which the data do not have, is beyond the model's vocabulary.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers  # start-up
    from transformers import PreTrainedTokenizerFast  # start-up

    model = Tokenizer(models.WordLevel({str(token): token for token in range(vocab_size)}))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token=END)


def _load(name: str) -> PreTrainedTokenizerBase:
    """A pretrained tokeniser: of a source of ``cyclebench convert``, or any that transformers loads by name."""
    from transformers import AutoTokenizer  # start-up

    from bench.pretrained.sources import PACKAGED, load_tokenizer  # start-up: transformers

    if name in PACKAGED or name.endswith(".gguf"):
        found = load_tokenizer(name)
        assert found is not None  # a GGUF file holds its tokeniser
        return found
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        kind = "folder" if Path(name).exists() else "name or folder"
        raise UserError(f"tokenizer: cannot load the pretrained {kind} {name!r}: {first_line(error)}") from None


def _bytes(documents: Sequence[str]) -> list[Tokens]:
    return [np.frombuffer(document.encode(), dtype=np.uint8).astype(np.int64) for document in documents]


def _train_bpe(vocab_size: int, train: Sequence[str]) -> ByteLevelBPETokenizer:
    from tokenizers import ByteLevelBPETokenizer  # start-up

    model = ByteLevelBPETokenizer()
    model.train_from_iterator(train, vocab_size=vocab_size, min_frequency=2, show_progress=False)
    return model


def _bpe(vocab_size: int, train: Sequence[str]) -> tuple[Encoder, int]:
    model = _train_bpe(vocab_size, train)

    def encode(documents: Sequence[str]) -> list[Tokens]:
        return [np.asarray(found.ids, dtype=np.int64) for found in model.encode_batch(list(documents))]

    return encode, model.get_vocab_size()


def _pretrained(name: str) -> tuple[Encoder, int]:
    model = _load(name)

    def encode(documents: Sequence[str]) -> list[Tokens]:
        found = model(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
        return [np.asarray(ids, dtype=np.int64) for ids in found]

    return encode, len(model)
