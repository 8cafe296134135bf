"""The command line. Heavy libraries are imported inside the command that needs them."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(
    help="Does reusing a transformer's parameters buy accuracy for the compute it costs?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

StudyName = Annotated[str, typer.Argument(help="A study's name (see `cyclebench list`) or a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override anything in the study, e.g. train.steps=100. Repeatable."),
]
Runs = Annotated[Path, typer.Option("--runs", help="Folder of the results.")]


@app.command("list")
def list_() -> None:
    """Show variants with their options, tasks, and the studies that come with the suite."""
    from rich.console import Console

    from bench.data import get_task, task_names
    from bench.study import load_study, study_names
    from bench.variant import variant_class, variant_names

    console = Console()
    variants = _table("Variants", "name", "what it is", "options (default)")
    for name in variant_names():
        kind = variant_class(name)
        variants.add_row(name, _first_line(kind), _options(kind.Options))
    tasks = _table("Tasks", "name", "what it is", "options (default)")
    for name in task_names():
        tasks.add_row(name, _first_line(get_task_class(name)), _options(get_task_class(name).Options))
    studies = _table("Studies", "name", "question")
    for name in study_names():
        studies.add_row(name, load_study(name).question)
    for table in (variants, tasks, studies):
        console.print(table)


def main() -> None:
    """Entry point: every error a user can cause is one line and exit status 2."""
    try:
        status = app(standalone_mode=False)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    sys.exit(status)
