"""Several models of one shape trained as one: a step's forward and backward passes of all of them in one stack.

The models stay what they are, each with its own parameters, optimizer, evaluation and checkpoints. A step stacks their
parameters [S, ...] and batches [S, B, T] and runs ``torch.func.functional_call`` under ``torch.vmap``. Every model gets
its own gradient: the one it would have got alone, but for rounding. S models then cost the calls of one, which pays
where the calls take the time and not the arithmetic (``bench.run.packs``).

A cell with several CPU threads computes a stack in each: the models of two stacks need not wait for one another, while
the threads of one operation do. On a CPU the numbers of a model in a stack do not depend on the others, to the last
bit, so that a pack may be broken up and regrouped at any step. This holds for stacks of two or more. A single model
is computed by other kernels, so one that is left over is stacked with a copy of itself.

A variant needs to know nothing of it. Refused is what draws at random in training, since the draws would not be those
of the model alone, and what decides by its data which operations to run.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from bench.model.network import Network
from bench.model.stacks import linear

Loss = Callable[..., Any]
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


class _Linear(TorchFunctionMode):
    """Sends linear layers to their stacked form."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (linear if func is functional.linear else func)(*args, **(kwargs or {}))


def tensors_of(lm: Network) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return dict([*lm.named_parameters(), *lm.named_buffers()])


def stacks(models: int, threads: int) -> int:
    """How many stacks so many models make on a CPU: one a thread, none of a single model beside others."""
    return min(threads, -(-models // 2))


def side_by_side(jobs: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
    """What the jobs return, each computed in a thread of its own whose operations have no further threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if len(jobs) == 1:
            return [jobs[0]()]
        futures = [_pool(len(jobs)).submit(job) for job in jobs]
        wait(futures)  # all of them, also where one fails: the models must be left alone before anybody goes on
        return [future.result() for future in futures]
    finally:
        torch.set_num_threads(before)


@lru_cache(maxsize=1)
def _pool(size: int) -> ThreadPoolExecutor:
    """Threads that stay: new ones would begin without the memory that the old ones have at hand."""
    return ThreadPoolExecutor(size, initializer=torch.set_num_threads, initargs=(1,))


def keep_freed_memory() -> None:
    """Have the process keep what it frees: by default glibc gives the room of a stack's large tensors back at every
    step, and to get it again takes up to a third of the step (page faults). Nothing happens with other C libraries.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    sizes = (2**30, 2**25)  # older ones take no more than the second
    if mallopt is not None and any(mallopt(M_MMAP_THRESHOLD, size) for size in sizes):
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def run_stacked(lms: Sequence[Network], loss: Loss, *batches: Tensor) -> Any:
    """``loss(model, *batch)`` of every model on its part of the batches [S, ...], every result stacked [S, ...].

    loss: is given something to be called as the models are; a gradient of its result goes to the models' parameters.
    Raises RuntimeError for what cannot be done in a stack.
    """
    each = [tensors_of(lm) for lm in lms]
    stacks = {name: torch.stack([tensors[name] for tensors in each]) for name in each[0]}

    def one(tensors: dict[str, Tensor], *batch: Tensor) -> Any:
        return loss(lambda *args, **kwargs: functional_call(lms[0], tensors, args, kwargs), *batch)

    with _Linear():
        return torch.vmap(one, randomness="error")(stacks, *batches)
