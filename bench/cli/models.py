"""Commands about single models: made from a pretrained one, and scored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.cli.cells import whole_path
from bench.cli.options import DEFAULT_TRACKING, Imports, Threshold, Tracking, leaving
from bench.cli.screen import show, starting
from bench.errors import UserError


def convert(
    source: Annotated[str, typer.Argument(help="A hub id, a folder, a .gguf file, or smollm2.")],
    variant: Annotated[str, typer.Option(help="The variant to make of it.")],
    out: Annotated[Path, typer.Option(help="Folder of the converted model; must not exist or be empty.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="model.n_cycles, model.n_blocks, sharing, options.NAME of the variant. Repeatable.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of whatever the variant adds.")] = 0,
    imports: Imports = None,
) -> None:
    """Turn a pretrained GPT-2 or Llama into a variant.

    For example: cyclebench convert smollm2 --variant htc --set model.n_cycles=2 --out models/smollm2-htc
    """
    starting(f"reading {source}")
    from bench.study.conversion import convert_to  # start-up

    source = whole_path(source)
    rows = convert_to(source, variant, overrides or (), seed, out)
    show(f"{source} -> {out}", [{"": key, variant: value} for key, value in rows.items()])


def eval_(
    checkpoints: Annotated[list[str], typer.Argument(help="Folders, or anything `convert` takes.")],
    tasks: Annotated[str, typer.Option(help="Tasks of this suite or of lm-evaluation-harness, with commas between.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="TASK.OPTION=VALUE", help="Options of this suite's tasks. Repeatable."),
    ] = None,
    cycles: Annotated[
        list[int] | None, typer.Option(min=1, help="Cycles to run at; by default as made. Repeatable.")
    ] = None,
    exit: Annotated[str | None, typer.Option(metavar="RULE", help="Leave early by this rule, e.g. confidence.")] = None,
    threshold: Threshold = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of a task; all by default.")] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="FOLDER", help="Of YAML files of further tasks. Repeatable.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 16,
    out: Annotated[Path, typer.Option(help="Folder of the tasks, results and plots.")] = Path("evaluations"),
    tracking_uri: Tracking = DEFAULT_TRACKING,
    imports: Imports = None,
) -> None:
    """Score checkpoints with lm-evaluation-harness, and plot the scores against the FLOPs executed.

    For example: cyclebench eval models/smollm2-htc --tasks kjv --cycles 1 --cycles 2 --set kjv.length=256
    """
    leave = leaving(exit, threshold)
    names = list(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))  # nothing is scored twice
    if not names:
        raise UserError(f"--tasks: {tasks!r} names no task (allowed: one, or several with commas between)")
    starting("loading lm-evaluation-harness")
    from bench.downstream.command import evaluate_all  # start-up

    checkpoints = list(dict.fromkeys(map(whole_path, checkpoints)))
    numbers, changes = list(dict.fromkeys(cycles or ())), overrides or ()
    rows, paths = evaluate_all(
        checkpoints, names, changes, numbers, limit, batch_size, out, tracking_uri, leave, include or ()
    )
    table = []
    for row in rows:
        taken = str(row["cycles"]) if leave is None else f"{row['mean_cycles']:.2f} of {row['cycles']}"
        told = {"checkpoint": row["checkpoint"], "task": row["task"], "metric": row["metric"]}
        told |= {"value": f"{row['value']:.4f}", "stderr": "-" if row["stderr"] is None else f"{row['stderr']:.4f}"}
        table.append({**told, "cycles": taken, "FLOPs/token": f"{row['flops_per_token']:.4g}"})
    show("lm-evaluation-harness", table, ("stderr", "FLOPs/token"))
    for path in paths:
        print(f"{'plot:' if path.suffix == '.png' else 'results:':<10} {path}")
