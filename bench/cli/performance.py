"""The command that measures the suite itself."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from bench.cli.options import DEFAULT_RUNS, command_line
from bench.cli.screen import show, starting


class Device(StrEnum):
    """What ``bench --device`` may be."""

    cpu = "cpu"
    cuda = "cuda"


def bench_(
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="SECTION",
            help="training, additions, packing, thresholds, exits, harness, scaling, startup or memory. Repeatable.",
        ),
    ] = None,
    device: Annotated[Device, typer.Option(help="Where the models run.")] = Device.cpu,
    rounds: Annotated[int, typer.Option(min=1, help="Turns that each comparison is taken over.")] = 20,
    out: Annotated[Path, typer.Option("--out", help="Folder of performance.json, .md and .png.")] = DEFAULT_RUNS
    / "reports"
    / "performance",
) -> None:
    """Measure speed and memory: against other libraries, of the zero token, packing, exits, the harness, start-up.

    For example: cyclebench bench --only training --only packing
    """
    starting("loading what is measured")
    from bench.perf.sections import measured, place  # start-up
    from reports.performance import table, write_performance  # start-up

    sections = {}
    for name, section in measured(only or (), device.value, rounds):
        sections[name] = section
        columns, rows = table(section)
        told = [dict(zip(columns, row, strict=True)) for row in rows]
        show(f"{name} ({section['seconds']:.0f} s): {section['title']}", told)
    result = {"command": command_line(), "rounds": rounds, "environment": place(device.value), "sections": sections}
    for path in write_performance(result, out):
        print(path)
