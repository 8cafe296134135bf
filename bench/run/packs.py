"""Which cells are trained together.

Such a group is called a pack. Its cells have the same shape and the same training; only their seeds and learning rates
may differ. Whether a cell is computed in a stack, its configuration says (``bench.train.modes``); what is decided here
is with how many others. On a CPU that changes no bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import torch

from bench.config import CELL_SOURCE, Cell
from bench.data.task import task_data
from bench.model.costs import activation_bytes
from bench.model.variant import get_variant
from bench.study.plan import Planned

MOST = 16  # cells in a pack: more save nothing
CUDA_SHARE = 0.5  # of the free memory that a pack's activations may take


def packs(todo: Iterable[Planned], slots: int, pack: int | None) -> list[list[Planned]]:
    """Divide cells into groups that are trained together.

    Groups of the same kind of cell are as equal in size as possible. The cells keep their order.

    Args:
        todo: the cells.
        slots: worker processes. There are enough groups for each of them, if there are enough cells.
        pack: the most cells in a group; None: as many as save time.
    """
    alike: dict[str, list[Planned]] = {}
    cells = list(todo)
    for planned in cells:
        alike.setdefault(_kind(planned.cell), []).append(planned)
    share = -(-len(cells) // slots)
    found = []
    for group in alike.values():
        most = min(share, len(group), MOST if pack is None else pack) if group[0].cell.train.stacked is True else 1
        if most > 1:
            most = min(most, _room(group[0].cell))
        number = -(-len(group) // most)
        found += [group[at::number] for at in range(number)]
    return found


def _kind(cell: Cell) -> str:
    """What the cells of a pack must have in common, as text."""
    told = cell.model_dump(mode="json", exclude={"seed": True, "train": {"lr"}})
    if cell.init is not None and cell.init.source.startswith(CELL_SOURCE):
        told["init"]["source"] = CELL_SOURCE  # its shape is this cell's
    return json.dumps(told, sort_keys=True)


def _room(cell: Cell) -> int:
    """How many such cells the device has room for, at least one."""
    if cell.train.device != "cuda" or not torch.cuda.is_available():
        return MOST
    data, variant = task_data(cell.task, cell.task_options), get_variant(cell.variant, cell.options)
    kept = activation_bytes(variant, cell.model, data.vocab_size, data.length)
    kept *= cell.train.batch_size // cell.train.accumulation
    return max(1, int(CUDA_SHARE * torch.cuda.mem_get_info()[0] / kept))
