"""How many cycles a training step runs: those the model was built with, a curriculum, or numbers that are drawn."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bench.config import TrainConfig
from bench.model.costs import training_flops
from bench.model.losses import short_way
from bench.model.network import Network

CYCLES_SIGMA = 0.5  # of the log of the rate that random numbers of cycles are drawn with
DRAWS, MANY = 8, 500  # of how many seeds, and at most of how many steps, the cost of drawn numbers is the mean
STREAM, SEQUENCES, SHORTCUTS = 0xC7C1E, 0x5E95, 0x5407  # so that no other draw of a seed is the same


def scheduled_cycles(config: TrainConfig, n_cycles: int, step: int) -> int:
    """The number of cycles of optimizer step 0, 1, ..., or the mean of those drawn: from the curriculum's ``start`` to
    its ``end`` in equal stretches over its share of the steps, and ``end`` from there on.
    """
    curriculum = config.cycles_schedule
    if curriculum is None:
        return n_cycles
    end = n_cycles if curriculum.end is None else curriculum.end
    done = min(1.0, step / (curriculum.share * config.steps))
    rising = 1 if end >= curriculum.start else -1
    passed = min(abs(end - curriculum.start), math.floor(done * (abs(end - curriculum.start) + 1)))
    return curriculum.start + rising * passed


def draw_cycles(config: TrainConfig, n_cycles: int, seed: int) -> list[int | None]:
    """The number of cycles of every optimizer step; None: as many as the model was built with. Where sequences have
    numbers of their own, the largest of the batch.

    Drawn from the seed alone, so that every variant of as many cycles draws the same.
    """
    means = [scheduled_cycles(config, n_cycles, step) for step in range(config.steps)]
    if config.sequence_cycles:
        return [int(sequence_cycles(config, n_cycles, seed, step).max()) for step in range(config.steps)]
    if not config.random_cycles:
        return [None if config.cycles_schedule is None else mean for mean in means]
    rng = np.random.default_rng([seed, n_cycles, STREAM])
    at = np.log(means) if config.cycles_schedule is not None else math.log(n_cycles)
    rate = rng.lognormal(at - CYCLES_SIGMA**2 / 2, CYCLES_SIGMA, config.steps)
    return [int(count) + 1 for count in rng.poisson(rate)]


def sequence_cycles(config: TrainConfig, n_cycles: int, seed: int, step: int) -> NDArray[np.int64]:
    """The number of cycles of every sequence [batch_size] of a step: ``max(1, Poisson(r))``."""
    rng = np.random.default_rng([seed, n_cycles, SEQUENCES, step])
    return rng.poisson(scheduled_cycles(config, n_cycles, step), config.batch_size).clip(1)


def draw_shortcuts(
    config: TrainConfig, lm: Network, cycles: Sequence[int | None], seed: int
) -> list[tuple[int, ...] | None]:
    """The steps of the second pass of every optimizer step (``short_way``); None where there is none, as the training
    asks for none or the first pass is of one cycle.
    """
    found = list[tuple[int, ...] | None]()
    for step, number in enumerate(cycles):
        count = (number or lm.model_shape.n_cycles) if lm.variant.cycled and config.shortcut_loss else 1
        rng = np.random.default_rng([seed, count, SHORTCUTS, step])
        found.append(short_way(count, rng.integers) if count > 1 else None)
    return found


def mean_step_flops(lm: Network, config: TrainConfig, length: int) -> float:
    """Training FLOPs of a sequence in a step, the mean over a training: with the numbers of cycles that its curriculum
    gives it, and as expected of those that are drawn and of a second pass.
    """
    n_cycles = lm.model_shape.n_cycles

    def at(number: int | None) -> float:
        total = float(training_flops(lm, length, number, config.backward_cycles, config.trains_exits))
        shorter = range(1, number or n_cycles) if lm.variant.cycled and config.shortcut_loss else ()
        return total + (float(np.mean([training_flops(lm, length, n) for n in shorter])) if shorter else 0.0)

    numbers = Counter(_expected_cycles(config, n_cycles))
    return sum(times * at(number) for number, times in numbers.items()) / numbers.total()


def _expected_cycles(config: TrainConfig, n_cycles: int) -> list[int | None]:
    """Numbers of cycles with the frequencies that they have in a training: of drawn ones, those of some draws."""
    if not (config.random_cycles or config.sequence_cycles):
        return draw_cycles(config, n_cycles, 0) if config.cycles_schedule is not None else [None]
    few = config.model_copy(update={"steps": min(config.steps, MANY)})
    return [number for seed in range(DRAWS) for number in draw_cycles(few, n_cycles, seed)]


def flops_by_step(
    lm: Network,
    config: TrainConfig,
    length: int,
    cycles: Sequence[int | None],
    shortcuts: Sequence[tuple[int, ...] | None],
) -> NDArray[np.float64]:
    """Training FLOPs done after step 1, 2, ... with the numbers of cycles and the second passes drawn for them. A
    sequence that runs fewer cycles than the longest of its batch is computed like it, and masked.
    """
    of = {n: training_flops(lm, length, n, config.backward_cycles, config.trains_exits) for n in set(cycles)}
    again = {n: training_flops(lm, length, n) for n in {len(way) for way in shortcuts if way is not None}}
    both = zip(cycles, shortcuts, strict=True)
    return config.batch_size * np.cumsum([float(of[n]) + (again[len(way)] if way else 0.0) for n, way in both])
