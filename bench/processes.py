"""Processes that work for another one: how they start, what they leave alone, and why they have ended."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from typing import Any


def worker_context() -> Any:
    """Processes that start from a clean one which has imported torch once; never a fork of this one, as torch's threads
    do not survive a fork.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported: remarks would break the bars
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.cells", "bench.costs", "bench.train", "bench.plan"])
    return context


def cause_of_death(status: int) -> str:
    """What a process's exit status says."""
    if status >= 0:
        return f"its process ended with status {status}"
    name = signal.Signals(-status).name
    return f"its process was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def become_worker() -> None:
    """Leave Ctrl-C to the parent and the terminal to the progress bars, and do not outlive the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    quiet()


def quiet() -> None:
    """Keep libraries from writing bars and remarks to a screen that is not a worker's."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
