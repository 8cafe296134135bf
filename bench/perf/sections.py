"""The sections of ``cyclebench bench``: each a function of the device and the rounds that returns rows."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from bench.config import Execution
from bench.errors import unknown
from bench.perf import exits, harness, memory, packing, scaling, startup, traces, training, zero_tokens
from bench.perf.timing import Row
from bench.train.device import environment_of, pick_device

SECTIONS: dict[str, tuple[str, Callable[[torch.device, int], list[Row]]]] = {
    "training": (training.TITLE, training.rows),
    "additions": (zero_tokens.TITLE, zero_tokens.rows),
    "packing": (packing.TITLE, packing.rows),
    "thresholds": (traces.TITLE, traces.rows),
    "exits": (exits.TITLE, exits.rows),
    "harness": (harness.TITLE, harness.rows),
    "scaling": (scaling.TITLE, scaling.rows),
    "startup": (startup.TITLE, startup.rows),
    "memory": (memory.TITLE, memory.rows),
}


def measured(only: Collection[str], device: str, rounds: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The sections asked for, all if none is, in their order, as they are done: title, seconds and rows by name.

    Raises UserError, before anything is run, for a name that is not a section and a device that is not here.
    """
    for name in only:
        if name not in SECTIONS:
            raise unknown("section of the bench", name, SECTIONS)
    place = pick_device(Execution.model_validate({"device": device}))
    return ((name, _run(name, place, rounds)) for name in SECTIONS if not only or name in only)


def _run(name: str, device: torch.device, rounds: int) -> dict[str, Any]:
    title, rows = SECTIONS[name]
    start = time.perf_counter()
    found = rows(device, rounds)
    return {"title": title, "seconds": time.perf_counter() - start, "rows": found}


def place(device: str) -> dict[str, Any]:
    """Where the numbers are made: the environment as cells record it, the cores, and the other libraries' versions."""
    train = Execution.model_validate({"device": device, "threads": torch.get_num_threads()})
    others: dict[str, str | None] = {}
    for name in ("accelerate", "x-transformers"):
        try:
            others[name] = version(name)
        except PackageNotFoundError:
            others[name] = None
    gpu = {"cuda": torch.version.cuda, "driver": _driver()} if device == "cuda" else {}
    return {**environment_of(train).dump(), **gpu, "cores": os.cpu_count(), **others}


def _driver() -> str | None:
    """The version of the GPU's driver, None if nobody tells."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return told[0] if told else None
