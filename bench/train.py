"""The one training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bench.checkpoint import Checkpoints, Position
from bench.config import TrainConfig
from bench.costs import training_flops
from bench.data import TaskData
from bench.data.batches import Batches, arrays
from bench.errors import CellError, UserError
from bench.evaluate import evaluate
from bench.exits.losses import exit_losses
from bench.exits.trace import with_bits
from bench.model.language_model import IGNORED, CycleForCausalLM

CYCLES_SIGMA = 0.5  # of the log of the rate that random numbers of cycles are drawn with
DIVERGED = 20  # a mean loss above so many times that of a blind guess, ln V, is that of a run that has blown up
LOG_EVERY = 10  # steps between readings of the loss: reading it every step would stall a GPU

Report = Callable[[int, float, float], None]
"""Called with the step, the mean loss since the last call and tokens per second."""
WatchHistory = Callable[[dict[str, float]], None]
"""Called with every entry of the history as it is made; whatever it raises ends the training."""


def pick_device(config: TrainConfig) -> torch.device:
    """The device asked for; ``auto`` takes CUDA where there is one. Raises UserError if it is not there."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device: 'cuda' is not available on this machine (allowed here: 'auto', 'cpu')")
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


@contextmanager
def repeatable(seed: int, threads: int) -> Iterator[None]:
    """Seed everything and fix the number of CPU threads, so that the same cell gives the same numbers."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.set_num_threads(before)


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 where it was asked for; ``auto`` means bfloat16 on CUDA and float32 on the CPU."""
    low = config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16) if low else nullcontext()


def learning_rate(step: int, config: TrainConfig) -> float:
    """Of optimizer step 0, 1, ...: linear warm-up, then a cosine down to ``min_lr``, or flat and a linear cool-down
    (trapezoid, arXiv 2405.18392).
    """
    warmup = config.warmup * config.steps
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    if config.lr_schedule == "cosine":
        done = (step - warmup) / max(1.0, config.steps - warmup)
        return config.lr * (config.min_lr + (1 - config.min_lr) * (1 + math.cos(math.pi * done)) / 2)
    cooldown = config.cooldown * config.steps
    left = min(1.0, (config.steps - step) / cooldown) if cooldown else 1.0
    return config.lr * (config.min_lr + (1 - config.min_lr) * left)


def make_optimizer(lm: CycleForCausalLM, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW that decays the weights of linear layers only: norms, biases, embeddings (hence a tied head), zero tokens
    and gates have a meaning at zero that decay would pull them to.
    """
    embeddings = {id(lm.tokens.weight), id(lm.lm_head.weight)}
    matrices = {id(module.weight) for module in lm.modules() if isinstance(module, nn.Linear)} - embeddings
    trained = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) in matrices], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if id(p) not in matrices], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def train(
    lm: CycleForCausalLM,
    data: TaskData,
    config: TrainConfig,
    seed: int,
    report: Report | None = None,
    checkpoints: Checkpoints | None = None,
    watch: WatchHistory | None = None,
) -> list[dict[str, float]]:
    """Train in place on the model's device and return the history, one entry for each validation.

    checkpoints: where to go on from and what to leave behind; watch: called for the entries made before a checkpoint
    too. Raises CellError if the loss stops being finite or diverges, UserError if gradients are cut where the prelude
    needs them or if halting and its loss do not go together.
    """
    device = lm.device
    config.check_halting(lm.model_shape)
    reinjects = lm.recurrence is not None and lm.recurrence.reinjects
    if config.backward_cycles is not None and not reinjects and lm.schedule.n_prelude:
        raise UserError(
            f"train.backward_cycles: {config.backward_cycles} leaves the prelude of {lm.variant.name!r} without a "
            "gradient (allowed: none, or a variant that re-injects the prelude's output)"
        )
    cycles = draw_cycles(config, lm.model_shape.n_cycles, seed)
    flops = executed_flops(lm, config, data.length, cycles)
    batches = Batches(data.train, config.batch_size, seed)
    valid_ids, valid_targets = (column[: config.eval_sequences] for column in arrays(data.valid))
    optimizer = make_optimizer(lm, config)
    run = torch.compile(lm) if config.compile else lm
    tokens_per_step = config.batch_size * data.length
    due = _evaluations(config, flops)
    at = checkpoints.load(lm, optimizer) if checkpoints is not None else Position()
    if watch is not None:
        for entry in at.history:
            watch(entry)
    lm.train()
    since, last = time.perf_counter(), at.seconds
    for step in range(at.step + 1, config.steps + 1):
        rate = learning_rate(step - 1, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, targets = batches.batch(step - 1)
        at.pending.append(_step(run, lm, optimizer, ids, targets, config, cycles[step - 1]))
        if step % LOG_EVERY == 0 or step in due or step == config.steps:
            loss, first = float(torch.stack(at.pending).mean()), step - len(at.pending) + 1
            if not math.isfinite(loss):
                raise CellError(f"loss is {loss} within steps {first}-{step}")
            if loss > DIVERGED * math.log(lm.config.vocab_size):
                raise CellError(f"loss diverged to {loss:.3g} within steps {first}-{step}")
            at.losses.append(loss)
            now = at.seconds + time.perf_counter() - since
            if report is not None:
                report(step, loss, len(at.pending) * tokens_per_step / max(now - last, 1e-9))
            last, at.pending = now, []
        if step in due:
            at.seconds += time.perf_counter() - since
            with autocast(config, device):
                scores = evaluate(lm, valid_ids, valid_targets).leaving(1)
            scores = with_bits(scores, data.bytes_of("valid"))
            entry = {"step": step, "tokens": step * tokens_per_step, "flops": float(flops[step - 1])}
            entry |= {"seconds": at.seconds, "lr": rate, "train_loss": float(np.mean(at.losses))}
            at.history.append({**entry, **{f"valid_{name}": value for name, value in scores.items()}})
            if not math.isfinite(scores["loss"]):
                raise CellError(f"validation loss is {scores['loss']} at step {step}")
            if watch is not None:
                watch(at.history[-1])
            at.losses, since, last = [], time.perf_counter(), at.seconds
        if checkpoints is not None and checkpoints.due(step):
            at.step, at.seconds = step, at.seconds + time.perf_counter() - since
            checkpoints.save(at, lm, optimizer)
            since = time.perf_counter()
    return at.history


def _step(
    run: Callable[..., Any],
    lm: CycleForCausalLM,
    optimizer: torch.optim.Optimizer,
    ids: NDArray[np.int64],
    targets: NDArray[np.int64],
    config: TrainConfig,
    n_cycles: int | None,
) -> torch.Tensor:
    """One optimizer step over the micro-batches of a batch [B, T]; returns the loss at full depth, not yet read."""
    device = lm.device
    total = torch.zeros((), device=device)
    scored = int((targets != IGNORED).sum())
    for tokens, goal in zip(np.split(ids, config.accumulation), np.split(targets, config.accumulation), strict=True):
        with autocast(config, device):
            inputs = torch.from_numpy(tokens).to(device, non_blocking=True)
            out = run(
                inputs,
                n_cycles=n_cycles,
                backward_cycles=config.backward_cycles,
                output_exits=config.trains_exits,
            )
        # Divided by the whole batch's targets: the split into micro-batches must not change the gradient.
        last, loss = exit_losses(out, torch.from_numpy(goal).to(device, non_blocking=True), config)
        total += last.detach() / scored
        loss = loss / scored
        if out.auxiliary_loss is not None:
            loss = loss + out.auxiliary_loss * (len(tokens) / len(ids))
        loss.backward()
    nn.utils.clip_grad_norm_(lm.parameters(), config.grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def draw_cycles(config: TrainConfig, n_cycles: int, seed: int) -> list[int | None]:
    """The number of cycles of every optimizer step; None: as many as the model was built with.

    Drawn from the seed alone, so that every variant of as many cycles draws the same.
    """
    if not config.random_cycles:
        return [None] * config.steps
    rng = np.random.default_rng([seed, n_cycles, 0xC7C1E])
    rate = rng.lognormal(math.log(n_cycles) - CYCLES_SIGMA**2 / 2, CYCLES_SIGMA, config.steps)
    return [int(count) + 1 for count in rng.poisson(rate)]


def executed_flops(
    lm: CycleForCausalLM, config: TrainConfig, length: int, cycles: list[int | None]
) -> NDArray[np.float64]:
    """Training FLOPs done after step 1, 2, ... with the numbers of cycles drawn for them."""
    device = lm.device.type
    of = {n: training_flops(lm, length, device, n, config.backward_cycles, config.trains_exits) for n in set(cycles)}
    return config.batch_size * np.cumsum([float(of[n]) for n in cycles])


def _evaluations(config: TrainConfig, flops: NDArray[np.float64]) -> set[int]:
    """Steps after which to validate: every so many steps, every so many FLOPs, and at the end."""
    every = config.eval_every or max(1, config.steps // 10)
    due = {*range(every, config.steps + 1, every), config.steps}
    if config.eval_every_flops is not None:
        marks = np.arange(1, int(flops[-1] // config.eval_every_flops) + 1) * config.eval_every_flops
        due |= {int(step) + 1 for step in np.searchsorted(flops, marks)}
    return due
