"""Text to tokens: bytes, a BPE trained on the task's own train split, or a pretrained tokeniser."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

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


class TextTokenizer(NamedTuple):
    """A tokeniser of text.

    Attributes:
        encode: documents to tokens, without special ones.
        vocab_size: ids are below it.
        made: makes it in the form that is saved beside a model, with the same ids.
    """

    encode: Encoder
    vocab_size: int
    made: Callable[[], PreTrainedTokenizerBase]


def text_tokenizer(name: str, bpe_vocab_size: int, train: Iterable[str]) -> TextTokenizer:
    """The tokeniser of that name.

    name: ``bytes``, ``bpe`` (byte-level, trained on the documents ``train``), or ``pretrained:NAME_OR_FOLDER``. For
    ``bytes`` the id of a byte is the byte. NUL, which no text holds, lends its id to the end of the text. Raises
    UserError if it is none of these or cannot be loaded.
    """
    if name == "bytes":
        return TextTokenizer(_bytes, 256, _byte_tokenizer)
    if name == "bpe":
        return _bpe(bpe_vocab_size, train)
    if name.startswith(PRETRAINED):
        return _pretrained(name.removeprefix(PRETRAINED))
    raise UserError(f"tokenizer: {name!r} is not allowed (allowed: 'bytes', 'bpe', 'pretrained:NAME_OR_FOLDER')")


def identity(name: str) -> str:
    """What tells a tokeniser from every other of the same name. Raises UserError if it cannot be loaded."""
    if not name.startswith(PRETRAINED):
        return f"tokenizers {version('tokenizers')}"  # which trains a BPE
    model = load_pretrained(name.removeprefix(PRETRAINED))
    told = model.backend_tokenizer.to_str() if model.is_fast else json.dumps(model.get_vocab(), sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def number_tokenizer(vocab_size: int) -> PreTrainedTokenizerBase:
    """For tasks whose data are token ids: the text of a sequence is its ids, written out with spaces between.

    The end of the text, which the data do not have, is beyond the model's vocabulary.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers  # start-up
    from transformers import PreTrainedTokenizerFast  # start-up

    model = Tokenizer(models.WordLevel({str(token): token for token in range(vocab_size)}))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token=END)


def load_pretrained(name: str) -> PreTrainedTokenizerBase:
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


def _byte_tokenizer() -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # start-up
    from transformers import PreTrainedTokenizerFast  # start-up
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # start-up

    vocab = {letter: byte for byte, letter in bytes_to_unicode().items() if byte} | {END: 0}
    model = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token=END, clean_up_tokenization_spaces=False)


def _bpe(vocab_size: int, train: Iterable[str]) -> TextTokenizer:
    from tokenizers import ByteLevelBPETokenizer  # start-up

    model = ByteLevelBPETokenizer()
    model.train_from_iterator(train, vocab_size=vocab_size, min_frequency=2, show_progress=False)

    def encode(documents: Sequence[str]) -> list[Tokens]:
        return [np.asarray(found.ids, dtype=np.int64) for found in model.encode_batch(list(documents))]

    return TextTokenizer(encode, model.get_vocab_size(), partial(_bpe_tokenizer, model))


def _bpe_tokenizer(model: ByteLevelBPETokenizer) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer  # start-up
    from transformers import PreTrainedTokenizerFast  # start-up
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # start-up

    state = json.loads(model.to_str())
    state["model"]["vocab"][END] = state["model"]["vocab"].pop(bytes_to_unicode()[0])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token=END)


def _pretrained(name: str) -> TextTokenizer:
    model = load_pretrained(name)

    def encode(documents: Sequence[str]) -> list[Tokens]:
        found = model(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
        return [np.asarray(ids, dtype=np.int64) for ids in found]

    return TextTokenizer(encode, len(model), lambda: model)
