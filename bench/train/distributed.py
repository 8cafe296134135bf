"""One cell over several processes of one machine, each with a GPU or CPU threads of its own: DDP or FSDP.

The process that has the cell is rank 0 and starts the others. All of them build the same model and go through the same
training loop on the same batches, each on its rows of every micro-batch; gradients are averaged, so that a step is that
of one process but for the order of its float sums. Rank 0 alone reports, validates and writes. A rank that fails ends
the cell with its reason.

torch's ``DistributedDataParallel`` and ``fully_shard`` are used as they are, on gloo or NCCL. accelerate (1.15) wraps
the same two, but on CPUs it falls back from FSDP to DDP without a word: what is tested would not be what runs.
FSDP shards the model as one unit (weights, gradients and moments): the blocks are called several times in a pass, and a
unit for each would gather its weights as often.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.config import Cell
from bench.errors import RankError, UserError, reason_of
from bench.plugins import pack
from bench.processes import become_worker, cause_of_death, worker_context
from bench.train.device import pick_device

if TYPE_CHECKING:
    from bench.model.configuration import CycleConfig
    from bench.model.language_model import CycleModel

HERE = "127.0.0.1"  # where the processes of a cell find one another
PATIENCE = timedelta(
    minutes=30
)  # of a rank for the others, who wait while rank 0 validates; a dead one is seen at once
GRACE = 5.0  # seconds for another rank's reason to arrive, and for the others to end


RankWork = Callable[[Cell, Path, "Team"], Exception | None]
"""What one of the other processes does with a cell, the store's folder and its team; what ended it too early, if
anything has."""


class _Step(nn.Module):
    """A model with its loss: what DDP waits for is found behind what it returns, which must all have a gradient."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, losses: Callable[..., Any], *batch: Any) -> Any:
        return losses(self.run, *batch)


class Team:
    """The processes of one cell, seen by one of them; alone it does nothing. A context manager: rank 0 ends the others
    when it leaves.
    """

    def __init__(
        self,
        cell: Cell | None = None,
        root: Path | None = None,
        work: RankWork | None = None,
        rank: int = 0,
        port: int = 0,
    ) -> None:
        """A team that is not started yet.

        Args:
            cell: None for one process.
            root: of the store.
            work: what the other processes do.
            rank: of this process.
            port: of rank 0, for the others.
        """
        self.cell, self.root, self.work, self.rank, self.port = cell, root, work, rank, port
        self.size = 1 if cell is None else cell.train.processes
        self.full = cell is not None and cell.train.sharding == "full"
        self._others: list[tuple[BaseProcess, Connection]] = []
        self._failed = False

    def __enter__(self) -> Team:
        return self

    def start(self) -> None:
        """Bring all ranks together. Raises UserError if there are not as many devices, RankError if one does not come.

        On CUDA each rank's current device becomes its own.
        """
        if self.size == 1:
            return
        assert self.cell is not None
        cuda = pick_device(self.cell.train).type == "cuda"
        if cuda and torch.cuda.device_count() < self.size:
            raise UserError(
                f"train.processes: {self.size} needs as many GPUs, {torch.cuda.device_count()} are visible "
                "(allowed: at most as many, or train.device = 'cpu')"
            )
        store = dist.TCPStore(
            HERE, self.port, self.size, is_master=self.rank == 0, timeout=PATIENCE, wait_for_workers=False
        )
        if self.rank == 0:
            self._launch(store.port)
        if cuda:
            torch.cuda.set_device(self.rank)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=PATIENCE)

    def _launch(self, port: int) -> None:
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
        context, packed = worker_context(), pack()
        for rank in range(1, self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(self.cell, self.root, self.work, rank, port, gpus, theirs, packed)
            )
            process.start()
            theirs.close()  # so that its death is the end of the connection
            self._others.append((process, ours))
        for rank, (process, connection) in enumerate(self._others, 1):
            try:
                connection.recv()  # it is there; before that nobody would notice its death
            except (EOFError, OSError):
                raise _lost(rank, process) from None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        for process, connection in self._others:
            process.join(0.0 if error is not None or self._failed else GRACE)
            if process.is_alive():
                process.kill()
                process.join()
            connection.close()
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def cause(self, error: Exception) -> Exception:
        """What has ended the cell: the first failure among the other ranks, if ``error`` tells only that one is gone.
        A RankError tells of it.
        """
        self._failed = True
        if not self._others or not isinstance(error, RuntimeError):  # which torch raises when another rank has gone
            return error
        ranks = {connection: (rank, process) for rank, (process, connection) in enumerate(self._others, 1)}
        found: list[tuple[float, RankError]] = []
        for connection in wait(list(ranks), GRACE):
            rank, process = ranks[cast(Connection, connection)]
            try:
                at, told = cast(Connection, connection).recv()
                found.append((at, RankError(f"rank {rank}: {told[0]}", *told[1:])))
            except (EOFError, OSError):
                found.append((0.0, _lost(rank, process)))
        return min(found, key=lambda failure: failure[0])[1] if found else error

    def step(self, lm: CycleModel) -> nn.Module:
        """What trains a model: to be called with a loss (``bench.train.loop.loss_of``) and a micro-batch. With FSDP the
        model's parameters are sharded from here on.
        """
        if self.size > 1 and self.full:
            from torch.distributed.device_mesh import init_device_mesh  # start-up
            from torch.distributed.fsdp import fully_shard  # start-up

            fully_shard(lm, mesh=init_device_mesh(lm.device.type, (self.size,)))
        elif self.size > 1:
            return nn.parallel.DistributedDataParallel(_Step(lm), find_unused_parameters=True)
        return _Step(lm)

    def seed(self, seed: int) -> int:
        """Of this rank's random numbers; 32 bits of their own, as the CPU's generator looks at no more."""
        return seed if self.rank == 0 else int(np.random.SeedSequence([seed, self.rank]).generate_state(1)[0])

    def rows(self, part: NDArray[Any]) -> NDArray[Any]:
        """This rank's rows of the micro-batches [S, b, T]."""
        share = part.shape[1] // self.size
        return part[:, self.rank * share : (self.rank + 1) * share]

    def mean(self, value: Tensor) -> Tensor:
        """Over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
            value /= self.size
        return value

    def agree(self, flag: bool) -> bool:
        """Rank 0's flag."""
        if self.size == 1:
            return flag
        told = torch.tensor(int(flag))
        dist.broadcast(told, 0)
        return bool(told)

    @contextmanager
    def rank_0_first(self) -> Iterator[None]:
        """The others wait until rank 0 has done it."""
        if self.rank:
            self.agree(True)
        yield
        if not self.rank:
            self.agree(True)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on rank 0; nothing on the others."""
        if self.size == 1:
            return [value]
        found: list[Any] | None = None if self.rank else [None] * self.size
        dist.gather_object(value, found)
        return found or []

    @contextmanager
    def unsharded(self, lm: CycleModel) -> Iterator[None]:
        """The model with whole parameters on every rank meanwhile."""
        if self.full:
            lm.unshard()  # type: ignore[operator]
        yield
        if self.full:
            lm.reshard()  # type: ignore[operator]

    def plain(self, lm: CycleModel) -> CycleModel:
        """The model as it would be without the team, on rank 0; the others keep their shards."""
        if not self.full:
            return lm
        state = {name: whole(tensor) for name, tensor in lm.state_dict().items()}
        if self.rank:
            return lm
        from bench.model.language_model import model_of  # start-up: transformers

        with torch.random.fork_rng(devices=[]):
            found = model_of(cast("CycleConfig", lm.config))
        found.to(lm.device)  # type: ignore[arg-type]
        found.load_state_dict(state)
        return found


ALONE = Team()


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor in one piece on every rank; all must ask for it. Others are returned as they are."""
    from torch.distributed.tensor import DTensor  # start-up

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has whole, sharded as another of its shape is, if it is."""
    from torch.distributed.tensor import DTensor, distribute_tensor  # start-up

    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _lost(rank: int, process: BaseProcess) -> RankError:
    process.join(GRACE)
    return RankError(f"rank {rank}: {cause_of_death(process.exitcode or 0)}", "environment")


def _serve(
    cell: Cell,
    root: Path,
    work: RankWork,
    rank: int,
    port: int,
    gpus: str | None,
    connection: Connection,
    packed: bytes,
) -> None:
    """Another rank: does its work and tells what has gone wrong, if anything has."""
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    become_worker(packed)
    connection.send(None)
    try:
        error = work(cell, root, Team(cell, root, work, rank, port))
    except Exception as found:
        error = found
    if error is not None:
        connection.send((time.monotonic(), reason_of(error)))
