"""Several models of one shape, trained as one stack.

Each model keeps its own parameters, optimizer, evaluation and checkpoints. For a training step the parameters of all
models are stacked, [S, ...], and their batches too, [S, B, T]. Forward and backward pass then run once for the whole
stack (``torch.func.functional_call`` under ``torch.vmap``). Each model gets the gradient that it would get alone,
except for rounding. S models need as many calls as one model. That saves time where the calls take the time, and not
the arithmetic (``bench.train.modes``).

A cell with several CPU threads computes one stack in each thread. Two stacks need not wait for each other. Threads that
share one operation must.

On a CPU a model's numbers do not depend on the other models of its stack, not even in the last bit. So a pack may be
taken apart and put together in another way at any step. This is true for stacks of two or more models. A model alone is
computed by other kernels. Therefore a model that is left over is stacked with a copy of itself.

A variant needs to know nothing of this. Two kinds of training are refused. In one, random numbers are drawn: a model in
a stack would get other draws than a model alone. In the other, the data decide which operations run.
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
    """How many stacks so many models make on a CPU: one a thread, and at most half as many as models (rounded up)."""
    return min(threads, -(-models // 2))


def side_by_side(jobs: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
    """What the jobs return. Each job runs in a thread of its own, and its operations use no further threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if len(jobs) == 1:
            return [jobs[0]()]
        futures = [_pool(len(jobs)).submit(job) for job in jobs]
        wait(futures)  # for all, even if one fails: nobody may use the models while a job still runs
        return [future.result() for future in futures]
    finally:
        torch.set_num_threads(before)


@lru_cache(maxsize=1)
def _pool(size: int) -> ThreadPoolExecutor:
    """Threads that are kept. A new thread would have to get the memory first that these have already."""
    return ThreadPoolExecutor(size, initializer=torch.set_num_threads, initargs=(1,))


def keep_freed_memory() -> None:
    """Let the process keep the memory that it frees.

    By default glibc gives the memory of large tensors back to the system at every step. To get it again takes up to a
    third of the step (page faults). With other C libraries nothing is changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    sizes = (2**30, 2**25)  # older versions of glibc refuse more than the second
    if mallopt is not None and any(mallopt(M_MMAP_THRESHOLD, size) for size in sizes):
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def run_stacked(lms: Sequence[Network], loss: Loss, *batches: Tensor) -> Any:
    """Call ``loss(model, *batch)`` for every model, all at once. Every result is stacked, [S, ...].

    Args:
        lms: the models, all of one shape.
        loss: its first argument is called as a model is. A gradient of its result reaches the models' parameters.
        batches: tensors [S, ...]; each model gets its own part.

    Raises:
        RuntimeError: if this cannot be done in a stack.
    """
    each = [tensors_of(lm) for lm in lms]
    stacks = {name: torch.stack([tensors[name] for tensors in each]) for name in each[0]}

    def one(tensors: dict[str, Tensor], *batch: Tensor) -> Any:
        return loss(lambda *args, **kwargs: functional_call(lms[0], tensors, args, kwargs), *batch)

    with _Linear():
        return torch.vmap(one, randomness="error")(stacks, *batches)
