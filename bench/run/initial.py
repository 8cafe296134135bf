"""The model that a cell's training starts with."""

from __future__ import annotations

from dataclasses import replace

from bench.config import CELL_SOURCE, Cell
from bench.data.task import TaskData
from bench.errors import CellError, UserError
from bench.model.language_model import CycleModel, build_model
from bench.model.variant import get_variant
from bench.pretrained.convert import convert
from bench.pretrained.sources import digest, load
from bench.store.store import Store
from bench.store.versions import MODEL


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
