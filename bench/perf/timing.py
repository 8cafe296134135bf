"""Steps timed in turns, so that a machine whose speed drifts decides nothing; what is told of the times."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from bench.config import Execution, TrainConfig
from bench.train.device import autocast
from bench.train.graphs import Replayed, cuda_graph
from bench.train.optimizer import make_optimizer

Run = Callable[[], None]
Precision = Literal["float32", "bfloat16"]
Row = dict[str, Any]
"""Of a table, JSON-able. What has ``KEY_low`` and ``KEY_high`` beside ``KEY`` is a median with its quartiles."""
VOCAB = 256  # of the models on random tokens
WARMUP = 2


def wait(device: torch.device) -> None:
    """Return when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_tokens(batch: int, length: int, device: torch.device, vocab_size: int = VOCAB) -> torch.Tensor:
    """The same tokens [B, T] every time."""
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)


def training_step(
    model: Any,
    vocab_size: int,
    batch: int,
    length: int,
    run: Callable[..., Any] | None = None,
    graph: bool = False,
    precision: Precision = "float32",
) -> Run:
    """One training step (forward, loss, backward, AdamW) of a model on random tokens, done when it returns.

    Args:
        model: ours, or a rival's.
        vocab_size: of the tokens.
        batch: sequences.
        length: tokens of each.
        run: what is called instead of the model, such as the compiled model.
        graph: forward and backward as a CUDA graph.
        precision: of the forward pass; weights are float32.
    """
    ours = hasattr(model, "schedule")
    optimizer = (
        make_optimizer(model, TrainConfig()) if ours else torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    )
    tokens = random_tokens(batch, length, model.device, vocab_size)
    model.train()
    call, how = model if run is None else run, Execution(precision=precision)

    def passes(tokens: torch.Tensor) -> torch.Tensor:
        with autocast(how, model.device):
            loss: torch.Tensor = call(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        return loss.detach()

    replayed = Replayed(list(model.parameters()), model.device, cuda_graph) if graph else None

    def step() -> None:
        passes(tokens) if replayed is None else replayed(passes, tokens)
        optimizer.step()
        optimizer.zero_grad(set_to_none=not graph)
        wait(model.device)

    return step


def matmul(device: torch.device, precision: Precision = "float32") -> tuple[Run, int]:
    """A product of two large square matrices, and its FLOPs: what the device's arithmetic can do at best."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = torch.rand(2, size, size, device=device, dtype=getattr(torch, precision)).unbind()

    def step() -> None:
        torch.mm(left, right)
        wait(device)

    return step, 2 * size**3


def peak(step: Run, device: torch.device, name: str = "step_bytes") -> Row:
    """The most memory that a step takes at once on a GPU, beside what is held already before it (parameters, the
    optimizer's state), under the name; empty on a CPU, which does not tell.
    """
    if device.type != "cuda":
        return {}
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    step()
    return {name: torch.cuda.max_memory_allocated(device) - held}


def timed(step: Run) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def in_turns(steps: Sequence[Run], rounds: int, warmup: int = WARMUP) -> NDArray[np.float64]:
    """Seconds of every step [rounds, len(steps)], taken in turns; every other round in the opposite order."""
    found = np.zeros((rounds, len(steps)))
    for turn in range(-warmup, rounds):
        for side in range(len(steps))[:: 1 if turn % 2 else -1]:
            seconds = timed(steps[side])
            if turn >= 0:
                found[turn, side] = seconds
    return found


def quartiles(values: NDArray[np.float64], name: str = "ratio") -> Row:
    """The median under the name and the quartiles under ``NAME_low`` and ``NAME_high``."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return {name: float(middle), f"{name}_low": float(low), f"{name}_high": float(high)}
