"""Training steps, timed in pairs: the two sides take turns, so that a machine whose speed drifts decides nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bench.config import TrainConfig
from bench.train import make_optimizer

Step = Callable[[], None]


def training_step(model: Any, vocab_size: int, batch: int, length: int) -> Step:
    """One eager training step (forward, loss, backward, AdamW) of a model on random tokens, done when it returns."""
    optimizer = make_optimizer(model, TrainConfig()) if hasattr(model, "schedule") else _stock_optimizer(model)
    tokens = torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    model.train()

    def step() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    return step


def _stock_optimizer(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def paired(first: Step, second: Step, rounds: int, warmup: int = 3) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Seconds of both steps [rounds, 2], taken in turns; which one goes first alternates."""
    found = np.zeros((rounds, 2))
    for turn in range(-warmup, rounds):
        order = ((0, first), (1, second)) if turn % 2 else ((1, second), (0, first))
        for side, step in order:
            start = time.perf_counter()
            step()
            if turn >= 0:
                found[turn, side] = time.perf_counter() - start
    return found
