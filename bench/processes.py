"""Processes that work for another one: how they start, what they leave alone, and why they have ended."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import context
from pathlib import Path
from typing import Any

import psutil

from bench.plugins import unpack

PRELOADED = ["cyclebench", "bench.run.cells", "bench.run.going", "bench.study.plan"]
_starting = threading.RLock()


@contextmanager
def _without_main() -> Iterator[None]:
    """Meanwhile no new process is told which script this one runs.

    multiprocessing runs the script again in every process it starts. A script without ``if __name__ == "__main__":``
    would then start itself without end. Our workers need nothing of it: what it has registered is sent to them
    (``bench.plugins``).
    """
    main = sys.modules["__main__"]
    hidden: dict[str, Any] = {name: vars(main).pop(name) for name in ("__spec__", "__file__") if name in vars(main)}
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update({"__spec__": None, **hidden})


class _Starter:
    """Mixed into a kind of process: it starts without the caller's script."""

    def start(self) -> None:
        with _starting, _without_main():
            super().start()  # type: ignore[misc]


class _SpawnProcess(_Starter, context.SpawnProcess):
    pass


class _SpawnContext(context.SpawnContext):
    Process = _SpawnProcess


class _ForkServerProcess(_Starter, context.ForkServerProcess):
    pass


class _ForkServerContext(context.ForkServerContext):
    Process = _ForkServerProcess


def worker_context() -> Any:
    """Processes that start from a clean one which has imported torch once; never a fork of this one, as torch's threads
    do not survive a fork.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported: remarks would break the bars
    # A library that looks for a GPU while it is imported must not ask CUDA itself: no fork could use the GPU then.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return light_context()
    found = _ForkServerContext()
    found.set_forkserver_preload(PRELOADED)
    return found


def light_context() -> Any:
    """Processes that start from nothing, for what needs little of what this one has imported."""
    return _SpawnContext()


def cause_of_death(status: int) -> str:
    """What a process's exit status says."""
    if status >= 0:
        return f"its process ended with status {status}"
    name = signal.Signals(-status).name
    return f"its process was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def become_worker(packed: bytes = b"") -> None:
    """Leave Ctrl-C to the parent and the terminal to the progress bars, and do not outlive the parent.

    packed: what the parent's user has registered by hand (``bench.plugins.pack``).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    quiet()
    unpack(packed)


def quiet() -> None:
    """Keep libraries from writing bars and remarks to a screen that is not a worker's."""
    from transformers.utils import logging  # start-up

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def me() -> dict[str, Any]:
    """This process, so that others on this machine can tell whether it is still there."""
    return {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(), "born": _born(os.getpid())}


def _machine() -> str:
    """Same for two processes only if they see each other's process ids: one boot of one kernel, one id space."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def _born(pid: int) -> float | None:
    """When a process started, None if there is none, or only one that has ended and is not collected yet."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def gone(owner: dict[str, Any]) -> bool:
    """Whether a process (as ``me`` told of it) is known to be dead."""
    if owner["machine"] != _machine():
        return False
    born, then = _born(owner["pid"]), owner["born"]
    return born is None or (isinstance(then, float) and abs(born - then) > 1.0)
