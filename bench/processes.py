"""Processes that work for another one: how they start, what they leave alone, and why they have ended.

Such a process ends when the one it works for is gone, and takes with it what it has started itself.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import context, forkserver, resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from bench.plugins import unpack

# The first sees to it that the others are ours, whatever lies in the current folder; the last is for a cell's record.
PRELOADED = ["cyclebench", "bench.forkserver", "bench.run.cells", "bench.run.going", "bench.study.plan", "scipy.stats"]
PULSE = 1.0  # seconds between signs of life, at least
FOLLOW = 0.5  # seconds between looks at whether the parent is still there
REAP = 5.0  # seconds that killed processes have to be gone
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of Linux

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
    os.environ["CYCLEBENCH_PARENT"] = str(os.getpid())  # for bench.forkserver
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
    adopt()
    follow_parent()
    quiet()
    unpack(packed)


def quiet() -> None:
    """Keep libraries from writing bars and remarks to a screen that is not a worker's."""
    from transformers.utils import logging  # start-up

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def follow_parent() -> None:
    """End this process, and what it has started, soon after the one that it works for has gone."""
    threading.Thread(target=_follow, args=(os.getppid(),), name="parent", daemon=True).start()


def _follow(above: int) -> None:
    """above: the process that this one is a child of: the one it works for, or the fork server of that."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    while os.getppid() == above and not wait([parent.sentinel], FOLLOW):
        pass
    end_children()
    os._exit(1)


def adopt() -> None:
    """Become the parent of whatever this process's children leave behind when they end. Nothing where that cannot be
    had: on Linux alone.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)


def end_children() -> bool:
    """End what this worker has started and left running, with all below; whether there was anything. The fork server
    and the tracker of multiprocessing stay.
    """
    found = _end(_below(os.getpid(), _helpers()))
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:  # the dead among them, which nobody else asks for
            pass
    return found


def end_worker(process: BaseProcess) -> None:
    """End a worker on the spot, with what it has started."""
    left = [] if process.pid is None else _below(process.pid, set())
    process.kill()
    process.join()
    _end(left)
    end_orphans()


def end_orphans() -> None:
    """End what workers that have died have left behind: the fork server has adopted it."""
    server = _fork_server()
    if server is not None:
        with _starting:
            workers = {process.pid for process in multiprocessing.active_children() if process.pid is not None}
            _end(_below(server, workers))


def _fork_server() -> int | None:
    """The process id of this process's own, None if it has none: a fork of a process knows that of the other."""
    found = getattr(forkserver._forkserver, "_forkserver_pid", None)
    with suppress(psutil.Error):
        return found if found is not None and psutil.Process(found).ppid() == os.getpid() else None
    return None


def _helpers() -> set[int]:
    found = {_fork_server(), getattr(resource_tracker._resource_tracker, "_pid", None)}
    return {pid for pid in found if pid is not None}


def _below(pid: int, but: set[int]) -> list[psutil.Process]:
    """The processes below one, without some of its children and what is below those."""
    found = list[psutil.Process]()
    with suppress(psutil.Error):
        for child in psutil.Process(pid).children():
            if child.pid not in but:
                found.append(child)
                with suppress(psutil.Error):
                    found += child.children(recursive=True)
    return found


def _end(processes: list[psutil.Process]) -> bool:
    """Kill processes and wait until they are gone; whether any was running."""
    running = [process for process in processes if _runs(process)]
    for process in running:
        with suppress(psutil.Error):
            process.kill()
    until = time.monotonic() + REAP
    while any(map(_runs, running)) and time.monotonic() < until:
        time.sleep(0.01)
    return bool(running)


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


_pulse: tuple[int, Callable[[], object]] | None = None
_pulsed = 0.0


def on_pulse(tell: Callable[[], object]) -> None:
    """Have something called at this process's signs of life, which is not often."""
    global _pulse
    _pulse = os.getpid(), tell


def pulse() -> None:
    """A sign of life, given wherever the work of a cell gets on. Where nobody waits for it, it is nothing.

    A copy of the process, which a variant may have forked, ends here: the cell is not its own.
    """
    global _pulsed
    if _pulse is None:
        return
    process, tell = _pulse
    if os.getpid() != process:
        os._exit(1)
    now = time.monotonic()
    if now - _pulsed >= PULSE:
        _pulsed = now
        tell()


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
