"""Seconds until the command line and the packages are there, in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from functools import partial

import torch

from bench.perf.timing import Row, in_turns, quartiles

TITLE = "start-up in a fresh process"
STARTS: dict[str, tuple[str, ...]] = {
    "python alone": ("-c", ""),
    "import torch": ("-c", "import torch"),
    "import cyclebench": ("-c", "import cyclebench"),
    "cyclebench --help": ("-m", "bench", "--help"),
    "cyclebench list": ("-m", "bench", "list"),
}
MOST = 3


def rows(device: torch.device, rounds: int, starts: Sequence[str] = tuple(STARTS)) -> list[Row]:
    """A row for each; in turns, after one start of each that leaves files in the system's cache. The device takes no
    part.
    """
    rounds = min(rounds, MOST)
    seconds = in_turns([partial(_start, STARTS[name]) for name in starts], rounds, warmup=1)
    return [
        {"what": name, "rounds": rounds} | quartiles(seconds[:, place], "seconds") for place, name in enumerate(starts)
    ]


def _start(arguments: Sequence[str]) -> None:
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
