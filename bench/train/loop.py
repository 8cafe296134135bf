"""The one training loop."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bench.config import IGNORED, TrainConfig
from bench.data.batches import Batches, arrays
from bench.data.task import TaskData
from bench.errors import CellError, UserError
from bench.evaluate.evaluation import evaluate
from bench.evaluate.trace import with_bits
from bench.model.blocks import Block
from bench.model.inputs import check_own_cycles
from bench.model.losses import added_loss, exit_losses
from bench.processes import pulse
from bench.train.checkpoints import Checkpoints, Position
from bench.train.depths import draw_cycles, draw_shortcuts, flops_by_step, sequence_cycles
from bench.train.device import autocast
from bench.train.distributed import ALONE, Team
from bench.train.graphs import Replayed, cuda_graph
from bench.train.optimizer import make_optimizer
from bench.train.packing import keep_freed_memory, run_stacked, side_by_side, stacks

if TYPE_CHECKING:
    from bench.model.language_model import CycleModel

DIVERGED = 20  # a mean loss above so many times that of a blind guess, ln V, is that of a run that has blown up
LOG_EVERY = 10  # steps between readings of the loss: reading it every step would stall a GPU

SIGN = 2.0  # seconds of training after which the step is told, be the loss read or not

Report = Callable[[int, float | None, float], None]
"""Called with the step, the mean loss since it was read last (None: it is not read) and tokens per second."""
WatchHistory = Callable[[dict[str, float]], None]
"""Called with every entry of the history as it is made; whatever it raises ends the training."""


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


def compile_blocks(lm: CycleModel, on: bool = True) -> None:
    """``torch.compile`` the blocks, or take it back: whole, or their attention and their MLP where a variant's parts
    stand between.

    All blocks and all cycles share what is compiled, whatever their number (but for what looks up a row of its own at
    every step: a gate by head, an adapter), while the whole model would be compiled with every cycle written out: two
    to three times as long to compile, for a step that takes 4 to 7 % less time. What was compiled before, of another
    cell, is forgotten: torch keeps but so many versions of a function, and which would depend on the cells before.
    """
    torch.compiler.reset()
    bare = lm.prefix is None and lm.adapter is None and lm.gate is None
    for block in cast(list[Block], lm.blocks):
        for part in (block,) if bare else (block.attention, block.mlp):
            if on:
                vars(part)["forward"] = torch.compile(part.forward)
            else:
                del part.forward


class Training:
    """One model on its way through training: what is its own even where its steps are computed with those of others."""

    def __init__(
        self,
        lm: CycleModel,
        data: TaskData,
        config: TrainConfig,
        seed: int,
        report: Report | None = None,
        checkpoints: Checkpoints | None = None,
        watch: WatchHistory | None = None,
        team: Team = ALONE,
        stacked: bool | None = None,
    ) -> None:
        """The arguments of ``train``, which says what is raised here, too; team: started, if it is of several; stacked:
        whether its steps are computed in a stack (``bench.train.packing``), None as the configuration says; a
        checkpoint goes on as it began.
        """
        if config.processes != team.size:
            raise UserError(f"train.processes: {config.processes} are started for a cell only (allowed here: 1)")
        config.check(lm.model_shape)
        reinjects = lm.recurrence is not None and lm.recurrence.reinjects
        first = "prelude" if lm.schedule.n_prelude else None if lm.adapter is not None else "embeddings"
        if config.backward_cycles is not None and not reinjects and first is not None:
            raise UserError(
                f"train.backward_cycles: {config.backward_cycles} leaves the {first} of {lm.variant.name!r} without a "
                "gradient (allowed: none, or a variant that re-injects what its cycles begin with)"
            )
        if config.sequence_cycles:
            check_own_cycles("train.sequence_cycles: True", lm.variant, lm.model_shape, lm.schedule, lm.routes)
        self.lm, self.data, self.config, self.seed = lm, data, config, seed
        self.report, self.checkpoints, self.watch, self.team = report, checkpoints, watch, team
        self.cycles = draw_cycles(config, lm.model_shape.n_cycles, seed)
        self.shortcuts = draw_shortcuts(config, lm, self.cycles, seed)
        self.flops = flops_by_step(lm, config, data.length, self.cycles, self.shortcuts)
        self.due = _evaluations(config, self.flops)
        self.batches = Batches(data.train, config.batch_size, seed, data.augment)
        lm.gradient_checkpointing = config.activation_checkpointing
        lm.train_for(config)
        self.run = team.step(lm)
        if config.compile:
            compile_blocks(lm)
        self.replayed = Replayed(list(lm.parameters()), lm.device, cuda_graph) if config.cuda_graphs else None
        self.optimizer = make_optimizer(lm, config)
        self.tokens_per_step = config.batch_size * data.length
        with team.rank_0_first():  # it sets damaged checkpoints aside
            self.at = checkpoints.load(lm, self.optimizer) if checkpoints is not None else Position()
        if not self.at.step:
            self.at.stacked = config.stacked is True if stacked is None else stacked
        if lm.device.type == "cpu":
            keep_freed_memory()
        self.last = self.told = self.at.seconds  # when the loss was read last, and when anything was told
        if watch is not None:
            for entry in self.at.history:
                watch(entry)
        lm.train()

    def passes(self, *batch: torch.Tensor) -> torch.Tensor:
        """Add the gradients of a micro-batch (``loss_of``) to those there are; its share of the batch's loss at full
        depth.
        """
        losses = loss_of(self.config, self.cycles[self.at.step], self.shortcuts[self.at.step])
        with autocast(self.config, self.lm.device):
            loss, last = self.run(losses, *batch)
        loss.backward()
        return cast(torch.Tensor, last)

    def advance(self, loss: torch.Tensor) -> None:
        """Take the step whose gradients are there; loss: scalar, at full depth, not yet read."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.at.step, self.config)
        if self.config.grad_clip is not None:
            nn.utils.clip_grad_norm_(self.lm.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.config.cuda_graphs)
        self.at.pending.append(loss)
        self.at.step += 1

    def read(self) -> float | None:
        """The mean of the losses that are not read yet, if it is time to read them (which waits for the device)."""
        step = self.at.step
        if step % LOG_EVERY and step not in self.due and step != self.config.steps:
            return None
        return float(torch.stack(self.at.pending).mean())

    def look(self, loss: float | None) -> None:
        """Judge the loss that was read, report it, validate if it is time to. Raises what ``train`` does."""
        at, step = self.at, self.at.step
        speed = len(at.pending) * self.tokens_per_step / max(at.seconds - self.last, 1e-9)
        if loss is not None:
            first = step - len(at.pending) + 1
            if not math.isfinite(loss):
                raise CellError(f"loss is {loss} within steps {first}-{step}")
            if loss > DIVERGED * math.log(self.lm.vocab_size):
                raise CellError(f"loss diverged to {loss:.3g} within steps {first}-{step}")
            at.losses.append(loss)
            self.last, at.pending = at.seconds, []
        if self.report is not None and (loss is not None or at.seconds - self.told > SIGN):
            self.report(step, loss, speed)
            self.told = at.seconds
        if step in self.due:
            with self.team.unsharded(self.lm):
                if self.team.rank == 0:
                    self._validate()
            at.losses = []

    def end(self) -> None:
        """After the last step: from here on the model is its own again."""
        self.replayed = None
        self.optimizer.zero_grad(set_to_none=True)
        if self.config.compile:
            compile_blocks(self.lm, False)
        self.lm = self.team.plain(self.lm)

    def _validate(self) -> None:
        at, step, config = self.at, self.at.step, self.config
        ids, targets = arrays(self.data.valid, config.eval_sequences)
        with autocast(config, self.lm.device):
            scores = evaluate(self.lm, ids, targets).leaving(1)
        scores = with_bits(scores, self.data.bytes_of("valid"))
        entry = {"step": step, "tokens": step * self.tokens_per_step, "flops": float(self.flops[step - 1])}
        entry |= {"seconds": at.seconds, "lr": learning_rate(step - 1, config)}
        entry |= {"train_loss": float(np.mean(at.losses)), **{f"valid_{name}": value for name, value in scores.items()}}
        at.history.append(entry)
        if not math.isfinite(scores["loss"]):
            raise CellError(f"validation loss is {scores['loss']} at step {step}")
        if self.watch is not None:
            self.watch(entry)


def train(
    lm: CycleModel,
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
    run = Training(lm, data, config, seed, report, checkpoints, watch)
    ((_, error),) = train_together([run])
    if error is not None:
        raise error
    return run.at.history


def train_together(runs: Sequence[Training]) -> Iterator[tuple[Training, Exception | None]]:
    """Train models of one shape on one device to their ends; yields each as it ends, with what ended it too early.

    Stacked models at the same step take it together (``bench.train.packing``); those behind, after a checkpoint of
    their own or a stack that was too large, catch up first. One that fails leaves the others as they are.
    """
    left, most = list(runs), len(runs)
    while left:
        first = min(left, key=lambda run: run.at.step)
        if first.at.step >= first.config.steps:
            left.remove(first)
            first.end()
            yield first, None
            continue
        with_first = [run for run in left if run.at.step == first.at.step and run.at.stacked]
        group = with_first[:most] if first.at.stacked else [first]
        try:
            errors = _step(group)
        except Exception as error:
            if len(group) > 1:  # no memory for all of them, most likely: a few at a time
                most = len(group) // 2
                warnings.warn(f"no step of {len(group)} models at once, going on with {most}: {error}", stacklevel=2)
                for run in group:
                    run.optimizer.zero_grad(set_to_none=True)
                continue
            errors = {first: error}
        for run, ending in errors.items():
            left.remove(run)
            yield run, ending


def _step(group: Sequence[Training]) -> dict[Training, Exception]:
    """The next step of all; what ends any of them. Raises what goes wrong before any has taken it."""
    pulse()
    since = time.perf_counter()
    losses = gradients(group)
    for run, loss in zip(group, losses, strict=True):
        run.advance(loss)
    read = [run.read() for run in group]
    took = (time.perf_counter() - since) / len(group)
    errors: dict[Training, Exception] = {}
    for run, value in zip(group, read, strict=True):
        run.at.seconds += took
        try:
            run.look(value)
        except Exception as error:
            errors[run] = error
    going = [run for run in group if run not in errors]
    if going and going[0].team.agree(
        any(run.checkpoints is not None and run.checkpoints.due(run.at.step) for run in going)
    ):
        for run in going:  # all at the same step, so that they go on together
            try:
                if run.checkpoints is not None:
                    run.checkpoints.save(run.at, run.lm, run.optimizer)
            except Exception as error:
                errors[run] = error
    return errors


def gradients(runs: Sequence[Training]) -> torch.Tensor:
    """The gradients of the next step of all models; returns the losses [S] at full depth, not yet read. Stacked models
    (any number; others one by one) make a stack for each of a cell's CPU threads.
    """
    if not runs[0].at.stacked:
        return _gradients_alone(runs[0])
    number = stacks(len(runs), runs[0].config.threads) if runs[0].lm.device.type == "cpu" else 1
    parts = [[runs[at] for at in part] for part in np.array_split(range(len(runs)), number)]
    return torch.cat(side_by_side([partial(_gradients_of_stack, part) for part in parts]))


def _gradients_alone(run: Training) -> torch.Tensor:
    team, total = run.team, torch.zeros(1, device=run.lm.device)
    for inputs, targets, scored, *counts in _micro_batches([run]):
        # The mean over a team's ranks is that of the whole micro-batch.
        batch = inputs[0], targets[0], scored[0] / team.size, *(count[0] for count in counts)
        total += run.passes(*batch) if run.replayed is None else run.replayed(run.passes, *batch)
    return team.mean(total)


def _gradients_of_stack(runs: Sequence[Training]) -> torch.Tensor:
    wanted, first = len(runs), runs[0]
    if wanted == 1:
        runs = [first, first]  # other kernels compute a single model, to other last digits
    losses, total = loss_of(first.config, first.cycles[first.at.step]), torch.zeros(wanted, device=first.lm.device)
    for batch in _micro_batches(runs):
        with autocast(first.config, first.lm.device):
            loss, last = run_stacked([run.lm for run in runs], losses, *batch)
        loss[:wanted].sum().backward()
        total += last[:wanted]
    return total


def _micro_batches(runs: Sequence[Training]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Inputs and targets [S, b, T] of the next step, how many targets each whole batch scores [S] and, where sequences
    have numbers of cycles of their own, these [S, b]; on the device.
    """
    config, device, team, step = runs[0].config, runs[0].lm.device, runs[0].team, runs[0].at.step
    wholes = [np.stack(part) for part in zip(*(run.batches.batch(step) for run in runs), strict=True)]
    scored = torch.from_numpy((wholes[1] != IGNORED).sum((1, 2))).to(device, non_blocking=True)
    if config.sequence_cycles:
        n_cycles = runs[0].lm.model_shape.n_cycles
        wholes.append(np.stack([sequence_cycles(config, n_cycles, run.seed, step) for run in runs]))
    for parts in zip(*(np.split(whole, config.accumulation, 1) for whole in wholes), strict=True):
        inputs, goal, *counts = (torch.from_numpy(team.rows(part)).to(device, non_blocking=True) for part in parts)
        yield inputs, goal, scored, *counts


def loss_of(
    config: TrainConfig, n_cycles: int | None, shortcut: tuple[int, ...] | None = None
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The loss to be trained and that at full depth, scalars, as a function of a model and a micro-batch: inputs and
    targets [b, T], how many targets of the whole batch are scored, and the cycles of each sequence [b] if they have
    numbers of their own. shortcut: the steps of a second pass, None without one.
    """

    def losses(
        model: Callable[..., Any],
        inputs: torch.Tensor,
        targets: torch.Tensor,
        scored: torch.Tensor | float,
        counts: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        asked: dict[str, Any] = {"n_cycles": n_cycles, "backward_cycles": config.backward_cycles}
        if counts is not None:
            asked["sequence_cycles"] = counts
        if shortcut is not None:
            asked["shortcut"] = shortcut
        out = model(inputs, output_exits=config.trains_exits, **asked)
        # Divided by the whole batch's targets: the split into micro-batches must not change the gradient.
        last, loss = (part / scored for part in exit_losses(out, targets, config))
        if (added := added_loss(out, config)) is not None:
            loss = loss + added / config.accumulation
        return loss, last.detach()

    return losses


def _evaluations(config: TrainConfig, flops: NDArray[np.float64]) -> set[int]:
    """Steps after which to validate: every so many steps, every so many FLOPs, and at the end."""
    every = config.steps_between
    due = {*range(every, config.steps + 1, every), config.steps}
    if config.eval_every_flops is not None and config.eval_every_flops <= np.diff(flops, prepend=0.0).min():
        return {*range(1, config.steps + 1)}  # at every step: the marks would be more than those
    if config.eval_every_flops is not None:
        marks = np.arange(1, int(flops[-1] // config.eval_every_flops) + 1) * config.eval_every_flops
        due |= {int(step) + 1 for step in np.searchsorted(flops, marks)}
    return due
