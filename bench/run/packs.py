"""Which cells are trained together.

Such a group is called a pack. Its cells have the same shape and the same training; only their seeds and learning rates
may differ. A pack is made where its cells can be computed as one stack (``bench.train.packing``), and where that saves
time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.config import CELL_SOURCE, Cell, ModelConfig, TrainConfig
from bench.data.task import task_data
from bench.model.costs import activation_bytes, meta_model, training_flops
from bench.model.freezing import freeze
from bench.model.language_model import build_model
from bench.model.variant import Variant, get_variant
from bench.study.plan import Planned
from bench.train.device import pick_device
from bench.train.loop import loss_of
from bench.train.packing import run_stacked, stacks

LEAST = 4  # cells in a pack that nobody asked for: with fewer, stacking costs more time than it saves
MOST = 16  # cells in a pack: more save nothing
CPU_FLOPS = 6e8  # of a step, on one CPU thread: above it the arithmetic takes the time, not the calls
CUDA_FLOPS = 1e12  # of a step of all cells of a pack: that much keeps a GPU busy
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
        most = min(share, len(group), MOST if pack is None else pack)
        if most >= (2 if pack is not None else LEAST):
            most = min(most, _most(_kind(group[0].cell), pack is not None))
        else:
            most = 1
        number = -(-len(group) // most)
        found += [group[at::number] for at in range(number)]
    return found


def _kind(cell: Cell) -> str:
    """What the cells of a pack must have in common, as text."""
    told = cell.model_dump(mode="json", exclude={"seed": True, "train": {"lr"}})
    if cell.init is not None and cell.init.source.startswith(CELL_SOURCE):
        told["init"]["source"] = CELL_SOURCE  # its shape is this cell's
    return json.dumps({**told, "seed": 0}, sort_keys=True)


@lru_cache(maxsize=1024)
def _most(kind: str, asked: bool) -> int:
    """The most cells that a pack of this kind may have; 1: such cells are trained alone.

    Args:
        kind: what the cells have in common.
        asked: whether the user has asked for packs. Then it is not considered whether they save time.
    """
    told = json.loads(kind)
    told["train"]["lr"] = 1e-3  # any will do
    cell = Cell.model_validate(told)
    data, device = task_data(cell.task, cell.task_options), pick_device(cell.train)
    variant, config = get_variant(cell.variant, cell.options), cell.train
    apart = config.compile, config.cuda_graphs, config.activation_checkpointing, config.random_cycles
    if any(apart) or config.processes > 1:
        # The first two run programs of their own, the third computes parts again outside the stack, the fourth gives
        # every seed a depth of its own. With several processes each has only a part of a cell's batch.
        return 1
    if cell.init is not None and not cell.init.source.startswith(CELL_SOURCE):
        return 1  # a pretrained model is large enough
    lm = meta_model(variant, cell.model, data.vocab_size, data.max_length)
    freeze(lm, config.trained)
    flops = config.batch_size * training_flops(lm, data.length, device.type, None, config.backward_cycles)
    most = MOST
    if device.type == "cuda":
        kept = activation_bytes(variant, cell.model, data.vocab_size, data.length)
        kept *= config.batch_size // config.accumulation
        most = min(most, int(CUDA_SHARE * torch.cuda.mem_get_info()[0] / kept))
    if not asked:
        cpu_flops = CPU_FLOPS * stacks(LEAST, config.threads)  # of the smallest pack's threads
        most = min(most, int(CUDA_FLOPS / flops) if device.type == "cuda" else MOST * (flops < cpu_flops))
    return most if most > 1 and stackable(variant, cell.model, data.vocab_size, data.length, config) else 1


def stackable(variant: Variant, model: ModelConfig, vocab_size: int, length: int, config: TrainConfig) -> bool:
    """Whether several such models can do a training step as one. This is tried, on tensors without numbers.

    It is not possible if training draws random numbers (dropout, noise): a model in a stack would get other draws than
    a model alone. It is not possible either if the data decide which operations run.
    """
    with FakeTensorMode():
        lm = build_model(variant, model, vocab_size, length).train()
        tokens, scored = torch.zeros(2, 1, length, dtype=torch.long), torch.ones(2)
        try:
            run_stacked([lm, lm], loss_of(config, None), tokens, tokens, scored)
        except RuntimeError:
            return False
    return True
