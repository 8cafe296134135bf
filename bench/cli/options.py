"""What several commands share: their options."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from bench.errors import UserError
from bench.house import STUDIES
from bench.plugins import import_files


def _import(paths: list[Path] | None) -> list[Path] | None:
    """Called with the value of ``--import`` before the other options are read."""
    import_files(paths or (), "--import")
    return paths


def _studies(incomplete: str) -> list[str]:
    """For the shell's completion."""
    return sorted(path.stem for path in STUDIES.glob(f"{incomplete}*.yaml"))


StudyName = Annotated[
    str,
    typer.Argument(
        metavar="STUDY", help="A study's name (see `cyclebench list`) or a YAML file.", autocompletion=_studies
    ),
]
AnyRun = Annotated[
    str | None,
    typer.Argument(
        metavar="[STUDY]", help="As of `cyclebench report`. Default: all runs there are.", autocompletion=_studies
    ),
]
RunName = Annotated[
    str,
    typer.Argument(
        metavar="STUDY",
        help="A study's name or its YAML file, with the --set and --preset that it was run with; or what the run is "
        "called (see `cyclebench status`).",
        autocompletion=_studies,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override anything in the study, e.g. train.steps=100. Repeatable."
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset", metavar="NAME", help="One of the study's presets, e.g. gpu. Default: small, if it has it."
    ),
]
Runs = Annotated[Path, typer.Option("--runs", help="Folder of the results.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the report; by default inside the results' folder.")]
Tracking = Annotated[str, typer.Option("--tracking-uri", help="Where MLflow keeps its records; of Trackio a folder.")]
TrackerName = Annotated[str, typer.Option("--tracker", metavar="NAME", help="What shows results beside the report.")]
DEFAULT_TRACKER = "mlflow"
Storage = Annotated[
    str | None, typer.Option(help="Database of the trials, any SQLAlchemy URL. Default: optuna.db in --runs.")
]
Imports = Annotated[
    list[Path] | None,
    typer.Option(
        "--import",
        metavar="FILE",
        help="A Python file that registers variants, tasks, rules, gates or figures. Repeatable.",
        callback=_import,
        is_eager=True,
    ),
]
Hang = Annotated[
    float,
    typer.Option(
        "--hang",
        metavar="MINUTES",
        help="A cell without a sign of life for so long is ended, as if its process had died.",
    ),
]
Formats = Annotated[str, typer.Option("--formats", help="Of the figures, with commas between: png, svg, pdf.")]
DEFAULT_HANG = 60.0


def finite(parameter: typer.CallbackParam, value: float | None) -> float | None:
    """Called with the value of an option that is a number."""
    if value is not None and not math.isfinite(value):
        raise UserError(f"{parameter.opts[0]}: {value} (allowed: a finite number)")
    return value


def _numbers(values: list[float] | None) -> list[float] | None:
    """Called with the values of ``--threshold``."""
    if any(math.isnan(value) for value in values or ()):
        raise UserError("--threshold: nan is no number (allowed: numbers, inf and -inf)")
    return values


Threshold = Annotated[
    list[float] | None,
    typer.Option(callback=_numbers, help="Where the rule leaves. Given several times: one for each exit point."),
]
Thresholds = Annotated[
    list[float] | None,
    typer.Option("--threshold", callback=_numbers, help="Repeatable. Default: those tuned on the validation data."),
]
DEFAULT_RUNS = Path("runs")
DEFAULT_TRACKING = "sqlite:///mlflow.db"


def leaving(rule: str | None, threshold: list[float] | None) -> tuple[str, float | list[float]] | None:
    """``--exit`` and ``--threshold`` together, None for no exits. Raises UserError for one without the other."""
    if (rule is None) != (not threshold):
        raise UserError("--exit and --threshold belong together: give both or neither")
    if rule is None or not threshold:
        return None
    return rule, threshold[0] if len(threshold) == 1 else threshold


PLACES = ("--runs", "--out", "--tracking-uri", "--storage", "--address")


def command_line(given: Sequence[str] | None = None, without: Sequence[str] = PLACES) -> str:
    """A command without some options and their values. given: its arguments, by default those of this process;
    without: by default, for the record, the options that only say where things lie.
    """
    kept, skip = ["cyclebench"], False
    for argument in sys.argv[1:] if given is None else given:
        if not skip and argument not in without and not argument.startswith(tuple(f"{name}=" for name in without)):
            kept.append(argument)
        skip = argument in without
    return shlex.join(kept)
