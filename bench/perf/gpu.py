"""``python -m bench.perf.gpu``: all that is to be known of a GPU in a few minutes, in one JSON and one table.

Every result is written as soon as it is there. Sections that no longer fit into the time are skipped, and the same
command with ``--only`` does them later. ``--device cpu --size tiny`` tries the whole of it where there is no GPU.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch

from bench.config import Execution
from bench.errors import UserError, first_line, unknown
from bench.perf.clock import Take, run_sections
from bench.perf.gpu_sections import SIZES, STOCK, Setting, sections
from bench.perf.sections import place
from bench.perf.timing import Row
from bench.processes import PRELOADED
from bench.train.device import pick_device
from reports.performance import write_tables


@dataclass(frozen=True)
class Goal:
    """What a figure should be.

    Attributes:
        text: of it all.
        section: whose rows it is about.
        key: of the figure.
        bound: of it.
        above: the figure should be at least the bound; else, at most.
        of: of which rows; they have the key.
    """

    text: str
    section: str
    key: str
    bound: float
    above: bool
    of: Callable[[Row], bool] = lambda row: True

    def about(self, section: str, row: Row) -> bool:
        """Whether it is about a row."""
        return section == self.section and self.key in row and self.of(row)

    def met(self, row: Row) -> bool:
        """Whether a row that it is about is as it should be."""
        return bool(row[self.key] >= self.bound if self.above else row[self.key] <= self.bound)


GOALS = (
    Goal("no host synchronisation in a training step", "waits", "waits", 0, False),
    Goal(
        *("training over transformers, eager", "training", "ratio", 1.15, True),
        lambda row: row["mode"] == "eager" and row["model"] in STOCK,
    ),
    Goal(
        *("training over transformers, compiled", "compiled", "ratio", 1.0, True),
        lambda row: row["model"] in STOCK,
    ),
    Goal("8 seeds in one stack over 8 runs, time", "packing", "ratio", 0.3, False, lambda row: row["seeds"] == 8),
    Goal(
        *("a training step with zero token and gate over one without, time", "gates", "ratio", 1.06, False),
        lambda row: row["gating"] == "attention",
    ),
    Goal(
        *("exits at batch 1, time saved over predicted", "exits", "ratio", 0.8, True),
        lambda row: row["batch"] == 1,
    ),
)


def with_goal(section: str, row: Row) -> Row:
    """A row with the goal that it is about, if there is one, and whether that is met."""
    for goal in GOALS:
        if goal.about(section, row):
            told = f"at {'least' if goal.above else 'most'} {goal.bound:g}"
            return row | {"goal": told, "verdict": "met" if goal.met(row) else "missed"}
    return row


def standing(found: dict[str, Any]) -> list[Row]:
    """A row for each goal, by the rows of the sections so far that are about it and were judged."""
    rows = []
    for goal in GOALS:
        judged = [row for row in found.get(goal.section, {"rows": []})["rows"] if goal.about(goal.section, row)]
        judged = [row for row in judged if "verdict" in row]
        met = sum(row["verdict"] == "met" for row in judged)
        verdict = "met" if met == len(judged) else f"missed ({met} of {len(judged)} met)"
        figures = [row[goal.key] for row in judged]
        rows.append(
            {
                "goal": goal.text,
                "bound": f"at {'least' if goal.above else 'most'} {goal.bound:g}",
                "worst": float(min(figures) if goal.above else max(figures)) if figures else "-",
                "verdict": verdict if judged else "not measured",
            }
        )
    return rows


def collect(result: dict[str, Any], judges: bool, out: Path) -> Take:
    """What takes rows and states of sections into the result, and writes it every time.

    Args:
        result: with ``sections``, by name.
        judges: whether goals apply: they are a GPU's at its full size.
        out: folder.
    """

    def take(name: str, row: Row | None, state: str) -> None:
        section = result["sections"][name]
        if row is not None:
            section["rows"].append(with_goal(name, row) if judges else row)
        else:
            now = time.monotonic()
            section |= {"state": state, "seconds": now - section.setdefault("began", now)}
            print(f"{name}: {state} ({section['seconds']:.0f} s, {len(section['rows'])} rows)", flush=True)
        shown = {key: {k: v for k, v in value.items() if k != "began"} for key, value in result["sections"].items()}
        write_tables(result | {"goals": standing(result["sections"]), "sections": shown}, out, "gpu")

    return take


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as everywhere."""
        raise UserError(message)


def _arguments() -> argparse.Namespace:
    parser = _Parser(prog="python -m bench.perf.gpu", description=first_line(__doc__ or ""))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cuda unless said otherwise")
    parser.add_argument("--size", choices=tuple(SIZES), default="full", help="tiny: to try the command itself")
    parser.add_argument("--minutes", type=_minutes, default=8.0, help="for all of it, from the start of the process")
    parser.add_argument("--only", metavar="SECTION", action="append", help="one section; repeatable")
    parser.add_argument("--out", type=Path, default=Path("runs/reports/gpu"), help="folder of gpu.json and gpu.md")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the study's results")
    parser.add_argument("--revision", help="of the code, where there is no repository to ask")
    return parser.parse_args()


def _minutes(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} (allowed: a number above 0)")


def _run(arguments: argparse.Namespace) -> None:
    size = SIZES[arguments.size]
    chosen = {section.name: section for section in sections(size)}
    for name in arguments.only or ():
        if name not in chosen:
            raise unknown("section:", name, chosen)
    pick_device(Execution(device=arguments.device))
    if arguments.device == "cpu":  # small models have nothing to divide among threads, which would wait for each other
        os.environ["OMP_NUM_THREADS"] = "1"  # of the sections' processes
        torch.set_num_threads(1)
    where = place(arguments.device)
    where |= {"git": arguments.revision} if arguments.revision else {}
    started = psutil.Process().create_time() - time.time() + time.monotonic()
    todo = [section for name, section in chosen.items() if not arguments.only or name in arguments.only]
    result: dict[str, Any] = {
        "title": "On a GPU" if arguments.device == "cuda" else "What is measured on a GPU, tried on a CPU",
        "command": shlex.join(["python", "-m", "bench.perf.gpu", *sys.argv[1:]]),
        "rounds": size.rounds,
        "minutes": arguments.minutes,
        "size": arguments.size,
        "environment": where,
        "sections": {each.name: {"title": each.title, "state": "not begun", "rows": []} for each in todo},
    }
    PRELOADED.append("bench.perf.gpu_sections")
    setting = Setting(arguments.device, arguments.size, arguments.runs.resolve())
    judges = arguments.device == "cuda" and arguments.size == "full"
    run_sections(todo, setting, started + 60 * arguments.minutes, collect(result, judges, arguments.out))
    print((arguments.out / "gpu.md").read_text())
    print(*(arguments.out / f"gpu.{kind}" for kind in ("json", "md")), sep="\n")


def main() -> None:
    """The command. Exit status 2 with one line for bad input."""
    try:
        _run(_arguments())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
