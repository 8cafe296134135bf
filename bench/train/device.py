"""Where a cell is trained, and how: its device, its precision, and what makes its numbers repeatable."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch

from bench.config import Execution
from bench.errors import UserError
from bench.store.environment import environment
from bench.store.records import Environment

# What makes matrix products on a GPU the same every time. It is read when the first of them is computed, and without it
# torch warns at every product of a training.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def device_of(config: Execution) -> torch.device:
    """The device asked for, where it is there; ``auto`` takes CUDA where there is one."""
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def device_kind(config: Execution) -> Literal["cpu", "cuda"]:
    """The kind of ``pick_device``, which is what a cell's id holds: not which of several GPUs."""
    return "cuda" if pick_device(config).type == "cuda" else "cpu"


def pick_device(config: Execution) -> torch.device:
    """``device_of``. Raises UserError if it is not the one asked for or cannot do what is asked for."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device: 'cuda' is not available on this machine (allowed here: 'auto', 'cpu')")
    device = device_of(config)
    if config.cuda_graphs and device.type != "cuda":
        raise UserError("train.cuda_graphs: True needs a GPU (allowed here: False)")
    return device


@contextmanager
def repeatable(seed: int, threads: int) -> Iterator[None]:
    """Seed everything and fix the number of CPU threads, so that the same cell gives the same numbers."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory: Any = torch.utils.deterministic
    fill, memory.fill_uninitialized_memory = memory.fill_uninitialized_memory, False  # costs a pass over every tensor
    try:
        yield
    finally:
        memory.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(deterministic)
        torch.set_num_threads(before)


def autocast(config: Execution, device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 where it was asked for; ``auto`` means bfloat16 on CUDA and float32 on the CPU."""
    low = config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16) if low else nullcontext()


def environment_of(config: Execution) -> Environment:
    """The machine and the versions that a training of this configuration runs on (``bench.store.environment``)."""
    return environment(device_of(config), config.threads)
