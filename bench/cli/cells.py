"""Commands about single cells, and about the cells that a study would run."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.cli.options import DEFAULT_RUNS, Runs
from bench.cli.screen import Json, say, show, starting, tell_json
from bench.errors import UserError
from bench.tables import counted

if TYPE_CHECKING:
    from bench.store.store import Store

FEWEST = 4  # letters of an id that tell it


def show_(
    cell: Annotated[str, typer.Argument(metavar="ID", help="Of a cell: its first letters are enough.")],
    runs: Runs = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Show what a cell is: the studies it belongs to, its configuration, and what came out of it."""
    from bench.run.upgrade import open_store  # start-up
    from bench.store.records import configuration, dotted  # start-up
    from bench.store.versions import read  # start-up
    from reports.units import human  # start-up

    store = open_store(runs)
    id = whole_id(store, cell)
    record = store.record(id)
    places = [
        f"{manifest.study}: {row.name}"
        for name in store.studies()
        if (manifest := store.manifest(name)) is not None
        for row in manifest.cells
        if row.id == id
    ]
    if record is None:
        told, state = read(store.folder(id) / "cell.json") or {}, "no result yet"
    else:
        told, state = configuration(record), record.status
    rows = {"id": id, "state": state, "in": "\n".join(places) or "no study", "folder": str(store.folder(id))}
    rows |= {key: str(value) for key, value in dotted(told)}
    if record is not None and record.status == "failed":
        rows["reason"] = record.reason
    if record is not None and record.status == "done":
        rows |= {key: f"{value:.4g}" for key, value in record.scores.items()}
        rows |= {f"costs.{key}": human(float(value)) for key, value in record.costs.dump().items()}
        rows |= {"training, seconds": f"{record.timing.train_seconds:.1f}", "exit rules": _rules(record)}
    if as_json:
        tell_json(rows if record is None else record.dump())
        return
    show(f"Cell {id[:12]}", [{"": key, "is": value} for key, value in rows.items() if value])


def _rules(record: Any) -> str:
    return ", ".join(key for key in record.exits.rules if "." not in key) if record.exits else ""


def whole_id(store: Store, start: str) -> str:
    """The id of the cell in a store that begins so. Raises UserError if there is none, or are several."""
    ids = [path.name for path in store.root.glob(f"{start}*") if _is_id(path.name)] if _is_start(start) else []
    if len(ids) == 1:
        return ids[0]
    former = store.current(start) if not ids and _is_start(start) else None  # by an id of an earlier version
    if former and store.folder(former).is_dir():
        return former
    known = f", such as {', '.join(id[:12] for id in sorted(ids)[:3])}" if ids else ""
    kind = f"what {len(ids)} cells begin with" if ids else f"no cell in {store.root}"
    raise UserError(f"ID: {start!r} is {kind} (allowed: the first letters of one cell's id, at least {FEWEST}{known})")


def whole_path(source: str) -> str:
    """A folder of a model, where the name of a cell's folder in it may be shortened."""
    path = Path(source)
    if path.exists():
        return source
    for part in (path, *path.parents):
        if part.parent.is_dir() and _is_start(part.name):
            found = [other for other in part.parent.glob(f"{part.name}*") if _is_id(other.name)]
            if len(found) == 1:
                return str(found[0] / path.relative_to(part))
    return source


def _is_id(name: str) -> bool:
    return len(name) == 64 and _is_start(name)


def _is_start(name: str) -> bool:
    return len(name) >= FEWEST and all(letter in "0123456789abcdef" for letter in name)


def tell_ahead(study: str, overrides: Sequence[str], preset: str | None, runs: Path) -> None:
    """Print what ``run`` would run, and what it would cost."""
    starting(f"planning {study}")
    from bench.run.ahead import ahead  # start-up
    from bench.run.upgrade import open_store  # start-up
    from bench.study.load import load_study  # start-up
    from reports.units import human  # start-up

    loaded = load_study(study, overrides, preset)
    found = ahead(loaded, open_store(runs))
    rows = []
    for part in found.parts:
        row = {"task": part.task, "variant": part.variant, "done": f"{part.done}/{part.cells}"}
        row |= {"failed": str(part.failed), "to run": str(part.left), "FLOPs of a cell": human(part.flops)}
        rows.append({**row, "FLOPs to run": human(part.left * part.flops)})
    show(f"{loaded.name}: what would be run", rows, ("failed", "FLOPs of a cell"), by="task")
    for line in found.replaced:
        say(line)
    cells = sum(part.left for part in found.parts)
    cost = f"{counted(cells, 'cell')} to run, {human(found.flops)} training FLOPs"
    speed = "how long that takes is not known before one of them is done"
    if found.seconds is not None:
        speed = f"{timedelta(seconds=round(found.seconds))} one by one, at the speed of those that are done"
    say(f"{cost}; {speed}." if cells else "nothing to run")
    if failed := sum(part.failed for part in found.parts):
        say(f"{counted(failed, 'cell')} failed of themselves, and are run again only with --retry failed.")
    if found.trials:
        say(f"Before them, {counted(found.trials, 'cell')} of the tuning, {human(found.trial_flops)} training FLOPs.")
    if loaded.decides and (decide := loaded.decide) is not None:
        limits = [] if decide.max_cells is None else [f"it has {counted(decide.max_cells, 'cell')} (decide.max_cells)"]
        if decide.max_flops is not None:
            limits.append(f"they cost {human(decide.max_flops)} training FLOPs (decide.max_flops)")
        ends = f", and ends at the latest when {' or '.join(limits)}" if limits else ""
        say(f"The study decides by looks: it may end with fewer cells than these{ends}.")
