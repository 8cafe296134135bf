"""Seed packing: training steps of 1, 2, 4, ... seeds in one stack against the same seeds one after another."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product

import numpy as np
import torch

from bench.config import Cell
from bench.data.task import TaskData, task_data
from bench.model.language_model import build_model
from bench.model.variant import get_variant
from bench.perf.harness import quick_cell
from bench.perf.timing import Row, in_turns, peak, quartiles, wait
from bench.train.device import repeatable
from bench.train.loop import Training, gradients

TITLE = "seed packing: a step of all seeds stacked / one after another (below 1: packing is faster)"
SEEDS = {"quick study": (1, 2, 4, 8), "tiny": (1, 2, 4, 8, 16)}
TINY = {"d_model": 16, "n_heads": 2}  # where the calls and not the arithmetic take the time
SHARE = 2  # of the rounds


def rows(device: torch.device, rounds: int, seeds: dict[str, Sequence[int]] | None = None) -> list[Row]:
    """A row for each number of threads (one, all) and of seeds, of the quick study's ZTT on p-hop and of a tiny model
    on a batch of 4.
    """
    cells, found = cells_of(device), []
    for threads, (label, numbers) in product(sorted({1, torch.get_num_threads()}), (seeds or SEEDS).items()):
        train = cells[label].train.model_copy(update={"threads": threads})
        cell = cells[label].model_copy(update={"train": train})
        name = f"{label}, {threads} thread{'s' * (threads > 1)}"
        found += [measured(name, cell, number, device, max(1, rounds // SHARE)) for number in numbers]
    return found


def cells_of(device: torch.device) -> dict[str, Cell]:
    """The quick study's ZTT on p-hop, and a tiny model on a batch of 4."""
    quick = quick_cell(2, device).cell
    small = {"model": quick.model.model_copy(update=TINY), "train": quick.train.model_copy(update={"batch_size": 4})}
    return {"quick study": quick, "tiny": quick.model_copy(update=small)}


def measured(name: str, cell: Cell, number: int, device: torch.device, rounds: int) -> Row:
    """The row of so many seeds of a cell; one of them is not stacked. On a GPU ``packed_bytes`` is the memory that a
    step of the stack takes (``bench.perf.timing.peak``).
    """
    data, threads = task_data(cell.task, cell.task_options), cell.train.threads
    sides = [
        [_training(cell, data, seed, device, stacked) for seed in range(number)] for stacked in (number > 1, False)
    ]
    steps = [partial(_step, [sides[0]]), partial(_step, [[run] for run in sides[1]])]
    with repeatable(0, threads):
        seconds = in_turns(steps, rounds, warmup=1)
        memory = peak(steps[0], device, "packed_bytes")
    packed, alone = np.median(seconds, 0)
    row: Row = {"model": name, "d_model": cell.model.d_model, "batch": cell.train.batch_size, "seeds": number}
    row |= {"threads": threads, "alone_seconds": float(alone), "packed_seconds": float(packed), "rounds": rounds}
    return row | quartiles(seconds[:, 0] / seconds[:, 1]) | memory


def _step(groups: Sequence[Sequence[Training]]) -> None:
    """A step of every run, group by group."""
    for group in groups:
        for run, loss in zip(group, gradients(group), strict=True):
            run.advance(loss)
    wait(groups[0][0].lm.device)


def _training(cell: Cell, data: TaskData, seed: int, device: torch.device, stacked: bool) -> Training:
    lm = build_model(get_variant(cell.variant, cell.options), cell.model, data.vocab_size, data.max_length)
    lm.reset_parameters(seed)
    steps = cell.train.model_copy(update={"steps": 10_000})
    return Training(lm.to(device), data, steps, seed, stacked=stacked)  # type: ignore[arg-type]
