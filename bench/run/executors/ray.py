"""Cells as Ray tasks, on this machine or on a cluster whose nodes share the folder of the results."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.errors import UserError, first_line
from bench.plugins import pack as packed_plugins
from bench.plugins import unpack
from bench.processes import on_pulse, quiet
from bench.run.cells import Job, run_jobs
from bench.run.executors import HANG, POLL, Event, silence
from bench.store.records import Outcome

KNOCK = 10.0  # seconds a cluster has to answer


class RayExecutor:
    """Every pack of jobs is a task that asks for its cells' threads as CPUs, and for a GPU for each of its processes
    where the cell may use one.

    Ray does not try a lost task again by itself: the study does, under the next lease, so that a node that only seems
    lost does not run a cell twice.
    """

    def __init__(self, slots: int, address: str | None, hang: float = HANG) -> None:
        """slots: tasks handed to Ray at a time; address: of a cluster, None for one that is started on this machine;
        hang: seconds without a sign of life after which a task that has begun is ended.

        Raises UserError if Ray is not installed or the cluster does not answer.
        """
        try:
            import ray  # optional
            from ray.util.queue import Queue  # optional
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # optional
        except ImportError:
            raise UserError("--executor: 'ray' needs Ray (pip install 'cyclebench[ray]')") from None
        self.slots, self.hang, self._ray = slots, hang, ray
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        self._ours = not ray.is_initialized()
        if self._ours:
            local: dict[str, Any] = {"include_dashboard": False} if address is None else {}
            try:
                _knock(address)
                ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **local)
            except (OSError, RuntimeError, ValueError) as error:
                raise UserError(f"--address: {address!r} does not answer: {first_line(error)}") from None
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._events = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
        self._gpus = bool(ray.cluster_resources().get("GPU"))
        self._task = ray.remote(max_retries=0, max_calls=0)(_task)
        self._packed = packed_plugins()
        self._out: dict[Any, list[str]] = {}  # the ids of a task's cells
        self._heard: dict[str, float] = {}  # by id: of cells whose tasks have begun
        self._hung: set[Any] = set()

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        for reference in self._out:
            self._ray.cancel(reference, force=True)
        self._events.shutdown()
        if self._ours:
            self._ray.shutdown()

    def submit(self, pack: Sequence[Job]) -> None:
        first = pack[0]
        train = first.cell.train
        gpus = train.processes if self._gpus and train.device != "cpu" else 0
        label = f"cell {first.cell.id[:12]}" + (f" and {len(pack) - 1} more" if len(pack) > 1 else "")
        task = self._task.options(num_cpus=train.threads * train.processes, num_gpus=gpus, name=label)
        absolute = Path(first.root).absolute()
        self._out[task.remote(tuple(pack), str(absolute), self._events, self._packed)] = [job.cell.id for job in pack]

    def poll(self) -> list[Event]:
        events = self._told()
        done, _ = self._ray.wait(list(self._out), num_returns=1, timeout=POLL) if self._out else ([], [])
        for reference in done:
            events += self._told()  # what it said before it ended
            ids = self._out.pop(reference)
            for id in ids:
                self._heard.pop(id, None)
            try:
                events += [Event(id, "end", (record,)) for id, record in self._ray.get(reference).items()]
            except self._ray.exceptions.RayTaskError as error:  # an error of ours, or of what is installed there
                raise error.as_instanceof_cause() from None
            except self._ray.exceptions.RayError as error:
                lost = silence(self.hang) if reference in self._hung else f"its task was lost: {type(error).__name__}"
                events += [Event(id, "died", (lost, None)) for id in ids]
        for reference, ids in self._out.items():
            heard = max((self._heard[id] for id in ids if id in self._heard), default=math.inf)
            if time.monotonic() - heard > self.hang and reference not in self._hung:
                self._hung.add(reference)
                self._ray.cancel(reference, force=True)
        return events

    def _told(self) -> list[Event]:
        events = [Event(*event) for event in self._events.get_nowait_batch(self._events.qsize())]
        out = {id for ids in self._out.values() for id in ids}
        self._heard |= {event.id: time.monotonic() for event in events if event.id in out}
        return [event for event in events if event.kind != "alive"]


def _knock(address: str | None) -> None:
    """Raises OSError if nobody listens at a HOST:PORT: Ray itself would try for minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), KNOCK).close()


def _task(pack: Sequence[Job], root: str, events: Any, packed: bytes) -> dict[str, Outcome | None]:
    quiet()
    unpack(packed)
    on_pulse(partial(_tell, events, pack[0].cell.id, "alive", ()))
    return dict(run_jobs([replace(job, root=Path(root)) for job in pack], partial(_tell, events)))


def _tell(events: Any, id: str, kind: str, arguments: tuple[Any, ...]) -> None:
    events.actor.put_nowait.remote((id, kind, arguments))  # not waited for: progress must not hold up training
