"""The command line in a process that has imported everything already: for tests of what a command does. How it starts
is tested by those that run ``python -m cyclebench``.

The process is a fork of the clean one that workers come from, and its own workers are forks of it: none of them has
used torch before.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from bench.cli import main
from bench.processes import worker_context
from bench.run.executors import local

TRACKED = ("run", "report", "sweep", "sync")  # commands that write into MLflow, by default into this file
DATABASE = "mlflow.db"


@cache
def no_runs() -> bytes:
    """An SQLite file as MLflow makes it, to be copied: its tables take seconds."""
    from mlflow import MlflowClient

    with TemporaryDirectory() as folder:
        MlflowClient(f"sqlite:///{folder}/{DATABASE}").search_experiments()
        return (Path(folder) / DATABASE).read_bytes()


class Ended(NamedTuple):
    """As ``subprocess`` tells it."""

    returncode: int | None
    stdout: str
    stderr: str


class Command:
    """A running ``cyclebench ARGUMENTS`` in a folder, at the head of a process group of its own.

    fresh: it has to make MLflow's database itself; else an empty one is there. figures: whether its reports have any,
    which take most of a small study's time.
    """

    def __init__(self, folder: Path, *arguments: str, fresh: bool = False, figures: bool = True) -> None:
        database = folder / DATABASE
        if not fresh and arguments[0] in TRACKED and "--tracking-uri" not in arguments and not database.exists():
            database.write_bytes(no_runs())
        self.paths = folder / ".stdout", folder / ".stderr"
        given = folder, arguments, figures, *self.paths
        self.process: BaseProcess = worker_context().Process(target=_run, args=given)
        self.process.start()

    def send(self, number: int) -> None:
        """Send a signal to the command alone, as a terminal's Ctrl-C reaches it."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """End the command and its workers on the spot."""
        assert self.process.pid is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()

    def ended(self) -> Ended:
        """Wait for the end."""
        self.process.join(300)
        if self.process.is_alive():
            self.kill()
        return Ended(self.process.exitcode, *(path.read_text() for path in self.paths))


def cyclebench(folder: Path, *arguments: str, fresh: bool = False, figures: bool = True) -> Ended:
    return Command(folder, *arguments, fresh=fresh, figures=figures).ended()


def _run(folder: Path, arguments: tuple[str, ...], figures: bool, *paths: Path) -> None:
    os.setsid()
    os.chdir(folder)
    for number, path in zip((1, 2), paths, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    torch.set_num_threads(1)  # threads of its own would not be there in its forks
    local.worker_context = lambda: multiprocessing.get_context("fork")
    if not figures:
        import reports.page

        reports.page._drawn = lambda *_: iter(())
    sys.argv = ["cyclebench", *arguments]
    main()
