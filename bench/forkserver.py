"""Imported early by the fork server of multiprocessing: what workers come from does not outlive its parent.

By itself it would end when the last of its workers has ended, and not before it has imported torch.
"""

from __future__ import annotations

import os
import threading
import time
import warnings

PARENT = "CYCLEBENCH_PARENT"  # the environment's name for the process that a fork server is for


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if PARENT in os.environ:
    threading.Thread(target=_follow, args=(int(os.environ[PARENT]),), name="parent", daemon=True).start()

    from bench.processes import adopt  # behind the thread, as it takes a while

    adopt()  # what dead workers leave behind, so that it can be found
    warnings.filterwarnings("ignore", "forkserver: waitpid returned unexpected pid")  # that of something adopted
