"""Seed packing: training steps of 1, 2, 4, ... seeds in one stack against the same seeds one after another."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from rich.table import Table

from bench.config import Cell
from bench.costs import build_model
from bench.data import TaskData
from bench.perf.harness import quick_cell
from bench.plan import task_data
from bench.train import Training, gradients, repeatable
from bench.variant import get_variant

SEEDS = (1, 2, 4, 8, 16)
TINY = {"d_model": 16, "n_heads": 2}  # where the calls and not the arithmetic take the time


def rows(rounds: int, threads: tuple[int, ...] = (1, 2)) -> list[dict[str, Any]]:
    """Of the quick study's ZTT on its p-hop task, and of a tiny model on a batch of 4: ``seconds_alone`` and
    ``seconds_packed`` of one step of all seeds (medians), and quartiles of their paired ratio.
    """
    quick = quick_cell(2).cell
    small = {"model": quick.model.model_copy(update=TINY), "train": quick.train.model_copy(update={"batch_size": 4})}
    found = []
    for label, cell in (("quick study", quick), ("tiny", quick.model_copy(update=small))):
        data = task_data(cell.task, cell.task_options)
        for number in threads:
            for seeds in SEEDS:
                with repeatable(0, number):
                    seconds = _paired(cell, data, seeds, rounds)
                low, middle, high = np.quantile(seconds[:, 1] / seconds[:, 0], (0.25, 0.5, 0.75))
                alone, packed = np.median(seconds, 0)
                found.append(
                    {
                        "model": label,
                        "d_model": cell.model.d_model,
                        "batch": cell.train.batch_size,
                        "threads": number,
                        "seeds": seeds,
                        "seconds_alone": float(alone),
                        "seconds_packed": float(packed),
                        "ratio": float(middle),
                        "ratio_low": float(low),
                        "ratio_high": float(high),
                    }
                )
    return found


def _paired(cell: Cell, data: TaskData, seeds: int, rounds: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Seconds [rounds, 2] of a step of all seeds, one by one and at once; which goes first alternates."""
    sides = [[_training(cell, data, seed) for seed in range(seeds)] for _ in range(2)]
    found = np.zeros((rounds, 2))
    for turn in range(-1, rounds):
        for side in (0, 1) if turn % 2 else (1, 0):
            start = time.perf_counter()
            for group in [sides[1]] if side else [[run] for run in sides[0]]:
                for run, loss in zip(group, gradients(group), strict=True):
                    run.advance(loss)
            if sides[0][0].lm.device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 0:
                found[turn, side] = time.perf_counter() - start
    return found


def _training(cell: Cell, data: TaskData, seed: int) -> Training:
    lm = build_model(get_variant(cell.variant, cell.options), cell.model, data.vocab_size, data.max_length)
    lm.reset_parameters(seed)
    steps = cell.train.model_copy(update={"steps": 10_000})
    return Training(lm, data, steps, seed)


def table(rounds: int) -> Table:
    """The rows for the screen."""
    title = "seed packing: a step of all seeds in one stack / one after another (below 1: packing is faster)"
    found = Table("model", "threads", "seeds", "alone, ms", "packed, ms", "ratio", title=title)
    for row in rows(rounds):
        found.add_row(
            f"{row['model']}, d {row['d_model']}, batch {row['batch']}",
            str(row["threads"]),
            str(row["seeds"]),
            f"{1e3 * row['seconds_alone']:.1f}",
            f"{1e3 * row['seconds_packed']:.1f}",
            f"{row['ratio']:.3f} [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]",
        )
    return found
