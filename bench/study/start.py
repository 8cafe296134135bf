"""What a cell's model starts from, and its shape, as they are planned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from bench.config import Init, ModelConfig, parse
from bench.data.task import TaskData
from bench.data.tokenizers import PRETRAINED
from bench.errors import UserError
from bench.model.variant import Variant
from bench.pretrained.recover import recovers
from bench.pretrained.sharing import sources_of
from bench.study.entries import TaskEntry

if TYPE_CHECKING:
    from bench.pretrained.sources import Outline

FREE = ("n_cycles", "n_blocks", "dropout", "kv")  # of a shape whose other fields the source decides


def target_shape(source: ModelConfig, n_cycles: int, changes: Mapping[str, Any], where: str) -> ModelConfig:
    """The shape of a variant made from a source of another shape.

    n_cycles: of the variant; changes: fields it is given besides, of which only n_blocks and dropout may differ from
    the source's. Raises UserError for any other.
    """
    for field, value in changes.items():
        if field not in FREE and value != getattr(source, field, value):
            raise UserError(
                f"{where}.model.{field}: {value!r} is not the pretrained model's {getattr(source, field)!r} "
                f"(allowed to differ: {', '.join(FREE)})"
            )
    fields = {**source.model_dump(), "dropout": 0.0, **changes, "n_cycles": n_cycles}
    return parse(ModelConfig, fields, f"{where}.model")


def outline_of(source: str) -> Outline:
    """``bench.pretrained.sources.outline``, which is needed by few studies."""
    from bench.pretrained.sources import outline  # start-up: transformers

    return outline(source)


def sizes_of(source: str | None, data: TaskData) -> tuple[int, int]:
    """Vocabulary and longest sequence, in tokens, of models that start from a source outside the study; None: of those
    that are made for the data.
    """
    if source is None:
        return data.vocab_size, data.max_length
    found = outline_of(source)
    return found.vocab_size, found.positions


def check_start(source: str, sharing: Any, variant: Variant, model: ModelConfig, data: TaskData) -> None:
    """Raise UserError, before anything runs, if the source fits neither the variant nor the task's data."""
    found = outline_of(source)
    schedule = variant.schedule(model)
    sources_of(sharing, found.shape.n_blocks, schedule)
    with torch.device("meta"):
        recovers(variant.adapter(model, schedule), model, sharing, found.shape.n_blocks, schedule)
    if data.form != found.shape.form:
        raise UserError(f"init: {source!r} reads {found.shape.form!r}, the task has {data.form!r} (allowed: the same)")
    if data.vocab_size > found.vocab_size:
        raise UserError(
            f"init: {source!r} knows {found.vocab_size} tokens, the task has {data.vocab_size} "
            f"(for text set the task's options.tokenizer to 'pretrained:{source}')"
        )
    if model.family == "gpt2" and data.length > found.positions:
        raise UserError(
            f"init: {source!r} has {found.positions} positions, the task's sequences are {data.length} long"
        )


def check_tokens(source: str, task: TaskEntry, data: TaskData) -> None:
    """Raise UserError if the source's tokens are not those that a task of text writes; to load its tokeniser may take
    seconds, so that it is not asked where the task says that it takes that one.
    """
    right = f"{PRETRAINED}{source}"
    if data.bytes_per_token is None or task.options.get("tokenizer") == right:
        return
    from bench.pretrained.sources import load_tokenizer  # start-up: transformers

    if (theirs := load_tokenizer(source)) is None:
        return
    ours = data.tokenizer()
    if ours is None or ours.get_vocab() != theirs.get_vocab():
        raise UserError(
            f"init: {source!r} reads other tokens than the task writes (allowed: the task's options.tokenizer = "
            f"{right!r})"
        )


def external(source: str, sharing: Any) -> Init:
    """The identity of a start from a source outside the study."""
    from bench.pretrained.sources import digest  # start-up: transformers

    return Init(source=source, sharing=sharing, digest=digest(source))
