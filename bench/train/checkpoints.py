"""Checkpoints of a cell's training: one safetensors file each, whole or not there, from which it goes on to the bit."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.errors import UserError, first_line
from bench.store.files import whole_file
from bench.store.versions import former_of_cell
from bench.train.distributed import ALONE, Team, laid_out, whole

TOLD = ("step", "seconds", "history", "losses", "stacked")  # of a position, beside tensors
KEPT = 2  # the newest, and the one before it in case the newest turns out to be damaged


def cell_logger(id: str) -> logging.Logger:
    """The log of one cell, also where several are trained together."""
    return logging.getLogger(f"cyclebench.cell.{id}")


@dataclass(frozen=True)
class Every:
    """How often a checkpoint is written. It says nothing about the numbers, so it is no part of a cell's identity."""

    seconds: float | None = 60.0
    steps: int | None = None

    @classmethod
    def parse(cls, text: str) -> Every:
        """``90s``, ``10m`` or a number of steps. Raises UserError for anything else."""
        found = re.fullmatch(r"([1-9][0-9]{0,8})(s|m|)", str(text).strip())
        if found is None:
            raise UserError(
                f"--checkpoint-every: {text!r} (allowed: seconds as 90s, minutes as 10m, optimizer steps as 500)"
            )
        number = int(found[1])
        return cls(None, number) if not found[2] else cls(number * {"s": 1.0, "m": 60.0}[found[2]])


@dataclass
class Position:
    """Where a training run stands after ``step`` optimizer steps.

    Attributes:
        seconds: of training so far.
        history: one entry a validation.
        losses: read since the last validation.
        pending: [P], step losses that are not yet read.
        stacked: whether its steps are computed in a stack, which decides last digits.
    """

    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    pending: list[Tensor] = field(default_factory=list)
    stacked: bool = False


class Checkpoints:
    """The checkpoints of one cell in a folder, named by their step."""

    def __init__(
        self, folder: Path, cell: str, every: Every, team: Team | None = None, room: Path | None = None
    ) -> None:
        """cell: its id, so that a file that strays here from another cell is not taken (its former ids are told by a
        file in the folder above); team: whose rank 0 writes,
        while all of its ranks must call ``save`` and ``load``; room: where files are filled (``bench.run.lease``), by
        default the folder.
        """
        self.folder, self.cell, self.every, self.log, self.team = folder, cell, every, cell_logger(cell), team
        self.room = room
        self._last = (time.monotonic(), 0)

    def due(self, step: int) -> bool:
        """Whether it is time for the next one."""
        began, saved = self._last
        return (self.every.steps is not None and step - saved >= self.every.steps) or (
            self.every.seconds is not None and time.monotonic() - began >= self.every.seconds
        )

    def save(self, position: Position, lm: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint and drop those before the last good one. A disk that refuses it is no reason to stop."""
        team = self.team or ALONE
        tensors = {**_weights(lm), **_moments(optimizer)}
        if position.pending:
            tensors["pending"] = torch.stack(position.pending)
        tensors = {name: whole(tensor.detach()).cpu().contiguous() for name, tensor in tensors.items()}
        for rank, states in enumerate(team.gather(_random(next(lm.parameters()).device))):
            tensors |= {f"{name}{_of(rank)}": state for name, state in states.items()}
        if team.rank:
            return
        told = {"cell": self.cell, **{key: getattr(position, key) for key in TOLD}}
        text = json.dumps(told)
        try:
            with whole_file(self.folder / f"{position.step:09d}.safetensors", self.room) as partial:
                save_file(tensors, partial, {"position": text, "digest": _digest(tensors, text)})
            for path in self._files()[KEPT:]:
                path.unlink()
        except Exception as error:  # safetensors tells of a full disk by an error of its own
            self.log.warning("no checkpoint at step %d: %s", position.step, error)
        self._last = (time.monotonic(), position.step)

    def load(self, lm: nn.Module, optimizer: torch.optim.Optimizer) -> Position:
        """Put the newest good checkpoint into the model, the optimizer and the random numbers, and return its position.

        A damaged one is set aside for the one before it; without any, nothing is touched and the position is the start.
        """
        for path in self._files():
            try:
                tensors, told = self._read(path)
                position = _restore(tensors, told, lm, optimizer, self.team.rank if self.team else 0)
            except Exception as error:  # whatever a damaged file makes safetensors, json or torch say
                self.log.warning("checkpoint %s is damaged, set aside: %s", path.name, first_line(error))
                os.replace(path, path.with_name(f"{path.name}.corrupt"))
                continue
            self.log.info("goes on from its checkpoint of step %d", position.step)
            self._last = (time.monotonic(), position.step)
            return position
        return Position()

    def _files(self) -> list[Path]:
        """Newest first."""
        return sorted(self.folder.glob("*.safetensors"), reverse=True)

    def _read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        text = metadata.get("position", "")
        if metadata.get("digest") != _digest(tensors, text):
            raise ValueError("its digest is not that of its contents")
        told = json.loads(text)
        if told["cell"] != self.cell and told["cell"] not in former_of_cell(self.folder.parent).ids:
            raise ValueError(f"it belongs to cell {told['cell'][:12]}")
        return tensors, told


def _weights(lm: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each once: tied weights are one tensor."""
    return {f"model.{name}": tensor for name, tensor in (*lm.named_parameters(), *lm.named_buffers())}


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{number}.{key}": value for number, values in state.items() for key, value in values.items()}


def _random(device: torch.device) -> dict[str, Tensor]:
    """The states of the generators that dropout draws from."""
    states = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["random.cuda"] = torch.cuda.get_rng_state(device)
    return states


def _of(rank: int) -> str:
    """What the names of a rank's random numbers end with."""
    return f".{rank}" if rank else ""


def _digest(tensors: dict[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _restore(
    tensors: dict[str, Tensor], told: dict[str, Any], lm: nn.Module, optimizer: torch.optim.Optimizer, rank: int
) -> Position:
    """Everything is checked before anything is changed, so that a checkpoint that does not fit leaves no trace."""
    weights = _weights(lm)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    fits = {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}
    if fits != {n: (t.shape, t.dtype) for n, t in tensors.items() if n.startswith("model.")}:
        raise ValueError("its weights are not those of this model")
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".", 2)
            state.setdefault(int(number), {})[key] = laid_out(tensor, trained[int(number)])
    device, random = next(lm.parameters()).device, tensors[f"random.cpu{_of(rank)}"]
    pending = list(tensors["pending"].to(device)) if "pending" in tensors else []
    position = Position(pending=pending, **{key: told[key] for key in TOLD})
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(laid_out(tensors[name], tensor))
    torch.set_rng_state(random)
    if "random.cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors[f"random.cuda{_of(rank)}"], device)
    return position
