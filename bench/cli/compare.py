"""The command that puts studies side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.cli.options import DEFAULT_RUNS, Imports, Runs
from bench.cli.screen import Json, say, show, starting, tell_json
from bench.errors import UserError

if TYPE_CHECKING:
    from reports.compare import Side

BETWEEN = "::"  # a folder of results and the name of a run in it


def compare(
    studies: Annotated[
        list[str],
        typer.Argument(
            metavar="STUDY...",
            help="Names of studies or of runs (see `cyclebench status`). FOLDER::NAME: of another folder of results.",
        ),
    ],
    presets: Annotated[
        list[str] | None,
        typer.Option("--preset", metavar="NAME", help="Compare these presets of one study. Repeatable."),
    ] = None,
    runs: Runs = DEFAULT_RUNS,
    out: Annotated[Path | None, typer.Option("--out", help="A folder for the tables as CSV and Markdown.")] = None,
    imports: Imports = None,
    as_json: Json = False,
) -> None:
    """Put studies side by side: variants that they share, and their differences, paired by the seeds that both have.

    For example: cyclebench compare quick quick+9ecf4a19, or cyclebench compare sharing other/runs::sharing
    """
    starting("reading results")
    from reports.compare import apart, side_by_side  # start-up

    sides = _sides(studies, presets or (), runs)
    beside, differences = side_by_side(sides), apart(sides)
    if not beside:
        names = ", ".join(side.name for side in sides)
        raise UserError(f"STUDY: {names} share no variant on a task of the same metric (see cyclebench status)")
    changes = _what_differs(sides)
    if as_json:
        tell_json({"side by side": beside, "differences": differences, "what differs": changes})
        return
    spare = [key for key in beside[0] if key.startswith("FLOPs, ")]
    show("Side by side, test data", beside, [*spare, "metric"], beside.ends, by="task")
    about = "Paired by seed; corrected p: by Holm's steps over this table."
    below = f"{about} {differences.ends}"
    first, *others = [side.name for side in sides]
    title, spare = f"Differences to {first}", ["against", "Hedges g", "p", "metric", "corrected p", "pairs"]
    if len(others) == 1:
        title, spare = f"Differences of {others[0]} to {first}", ["run", *spare]
    show(title, differences, spare, below, by="task")
    for name, told in changes.items():
        say(f"{name} differs from {sides[0].name} in {'; '.join(told) or 'nothing that the studies tell'}")
    if out is not None:
        for path in _write(out, {"side by side": beside, "differences": differences}):
            print(path)


def _sides(studies: list[str], presets: tuple[str, ...] | list[str], runs: Path) -> list[Side]:
    """The runs to be compared. Raises UserError for fewer than two, and for one that has not been run."""
    from bench.api import load_results  # start-up
    from reports.compare import Side  # start-up

    if presets and len(studies) > 1:
        raise UserError(f"--preset: {', '.join(presets)} are of one study, but {len(studies)} are named (allowed: one)")
    asked = [(studies[0], preset) for preset in presets] if presets else [(study, None) for study in studies]
    sides, places = [], set[tuple[Path, str]]()
    for study, preset in asked:
        folder, between, name = study.rpartition(BETWEEN)
        where = Path(folder) if between else runs
        if between and not where.is_dir():
            raise UserError(f"STUDY: {folder!r}, before {BETWEEN}, is no folder (allowed: one of results)")
        results = load_results(name, where, preset)
        places.add((where.resolve(), results.manifest.study))
        label = results.manifest.study if not between else f"{folder}{BETWEEN}{results.manifest.study}"
        sides.append(Side(label, results.manifest, results.records))
    if len(places) < max(2, len(sides)):
        raise UserError(
            f"STUDY: {', '.join(side.name for side in sides)} is one run (allowed: two or more that differ)"
        )
    return sides


def _what_differs(sides: list[Side]) -> dict[str, list[str]]:
    """What differs from the first run in the others' studies, as they were given."""
    from pydantic import ValidationError  # start-up

    from bench.study.naming import changes_between  # start-up
    from bench.study.schema import Study  # start-up

    try:
        first, *others = [Study.model_validate(side.manifest.config) for side in sides]
    except (ValidationError, UserError):  # a study of an earlier version
        return {}
    told = {side.name: changes_between(first, other) for side, other in zip(sides[1:], others, strict=True)}
    return {name: [f"{change.key}={change.now}" for change in changes][:20] for name, changes in told.items()}


def _write(out: Path, tables: dict[str, list[dict[str, str]]]) -> list[Path]:
    from bench.store.files import atomic_write  # start-up
    from bench.tables import csv_text, markdown  # start-up

    lines, paths = ["# Compared", ""], []
    for title, rows in tables.items():
        paths.append(out / f"{title.replace(' ', '_')}.csv")
        atomic_write(paths[-1], csv_text(rows).encode())
        lines += [f"## {title}", "", *(markdown(rows[0], (row.values() for row in rows)) if rows else ()), ""]
    paths.append(out / "compare.md")
    atomic_write(paths[-1], "\n".join(lines).encode())
    return paths
