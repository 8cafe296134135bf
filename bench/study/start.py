"""What a cell's model starts from: planning its shape, and making it when the cell runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from bench.config import CELL_SOURCE, Cell, Init, ModelConfig, parse
from bench.data.task import TaskData
from bench.data.tokenizers import PRETRAINED
from bench.errors import CellError, UserError
from bench.model.language_model import CycleModel, build_model
from bench.model.variant import Variant, get_variant
from bench.pretrained.convert import convert
from bench.pretrained.recover import recovers
from bench.pretrained.sharing import sources_of
from bench.pretrained.sources import digest, load, load_tokenizer, outline
from bench.store.store import Store
from bench.store.versions import MODEL
from bench.study.entries import TaskEntry

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


def sizes_of(source: str | None, data: TaskData) -> tuple[int, int]:
    """Vocabulary and longest sequence, in tokens, of models that start from a source outside the study; None: of those
    that are made for the data.
    """
    if source is None:
        return data.vocab_size, data.max_length
    found = outline(source)
    return found.vocab_size, found.positions


def check_start(source: str, sharing: Any, variant: Variant, model: ModelConfig, data: TaskData) -> None:
    """Raise UserError, before anything runs, if the source fits neither the variant nor the task's data."""
    found = outline(source)
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
    return Init(source=source, sharing=sharing, digest=digest(source))


def initial_model(cell: Cell, data: TaskData, store: Store) -> CycleModel:
    """The model a cell's training starts with, in float32: fresh from the seed, or converted.

    Raises CellError if the source has changed since the cell was planned, or is a cell that has no result.
    """
    variant = get_variant(cell.variant, cell.options)
    if cell.init is None:
        lm = build_model(variant, cell.model, data.vocab_size, data.max_length)
        lm.reset_parameters(cell.seed)
        return lm
    if cell.init.source.startswith(CELL_SOURCE):
        id = cell.init.source.removeprefix(CELL_SOURCE)
        if not store.done(id):
            raise CellError(f"the cell it starts from, {id[:12]}, has no result")
        try:
            pretrained = load(str(store.folder(id) / MODEL))
        except UserError as error:
            store.sound(id, weights=True)  # sets aside what is damaged, so that it is made again
            raise CellError(f"the cell it starts from, {id[:12]}, cannot be used: {error}") from None
    else:
        if digest(cell.init.source) != cell.init.digest:
            raise CellError(f"the source {cell.init.source!r} has changed since the cell was planned")
        pretrained = load(cell.init.source)
    weights = {name: tensor.float() for name, tensor in pretrained.weights.items()}
    return convert(replace(pretrained, weights=weights), variant, cell.model, cell.init.sharing, cell.seed).train()
