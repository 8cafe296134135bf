"""Sections for the tests of the clock: processes find them by the name of this module."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import torch

from bench.perf import clock
from bench.perf.clock import Emit, Section, run_sections


def quick(setting: Any, emit: Emit) -> None:
    emit({"value": setting})
    emit({"value": 2.0, "missing": float("nan")})


def slow(setting: Any, emit: Emit) -> None:
    emit({"pid": os.getpid()})
    time.sleep(600)


def dying(setting: Any, emit: Emit) -> None:
    emit({"value": 3})
    os._exit(7)


def wrong(setting: Any, emit: Emit) -> None:
    emit({"value": 4})
    raise ValueError("of two\nlines")


def touch(device: str) -> None:
    assert float(torch.ones(3, device=device).sum()) == 3


def section(name: str, run: Any, share: float = 1, least: float = 0.1) -> Section:
    return Section(name, f"title of {name}", run, share, least)


def begin(folder: Path) -> None:
    """Two sections, of which the second one never ends, as the script runs them; in forks of this process, which has
    not used torch yet.
    """
    from bench.perf import gpu

    clock.worker_context = lambda: multiprocessing.get_context("fork")
    sections = [section("quick", quick), section("slow", slow)]
    result: dict[str, Any] = {"command": "c", "rounds": 1, "environment": {"device": "cpu"}}
    result["sections"] = {each.name: {"title": each.title, "state": "not begun", "rows": []} for each in sections}
    run_sections(sections, "here", time.monotonic() + 600, gpu.collect(result, False, folder))
