"""Commands about a store as a whole: a study from one into another, and what may go."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from bench.cli.options import DEFAULT_RUNS, Imports, Overrides, Preset, RunName, Runs, Storage
from bench.cli.screen import starting
from bench.errors import UserError
from bench.tables import counted


def export(
    study: RunName,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The archive to be made; a new file.")],
    overrides: Overrides = None,
    preset: Preset = None,
    runs: Runs = DEFAULT_RUNS,
    imports: Imports = None,
) -> None:
    """Write a study into one file, for another machine: manifest, results, traces and models, each with its digest.

    What can be made again stays behind: checkpoints, prepared data, reports, sweeps.
    """
    starting(f"packing {study}")
    from bench.api import load_results  # start-up
    from bench.run.transfer import export_study  # start-up

    results = load_results(study, runs, preset, overrides or ())
    index, cells = export_study(results.store, results.manifest, file)
    size = _shown(sum(packed.size for packed in index.files.values()))
    print(f"{index.study}: {counted(cells, 'cell')}, {counted(len(index.files), 'file')}, {size}, in {file}")
    if (lack := len(results.manifest.cells) - cells) > 0:
        print(f"not in it: {counted(lack, 'cell')} without a record yet")


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `cyclebench export` has made.")],
    runs: Runs = DEFAULT_RUNS,
) -> None:
    """Take a study from another machine: verified cell by cell, and nothing that is here is overwritten."""
    starting(f"reading {file}")
    from bench.run.transfer import import_archive  # start-up
    from bench.run.upgrade import open_store  # start-up

    manifest, taken, other = import_archive(file, open_store(runs))
    for one in taken:
        if one.note:
            print(f"{one.fate}: {one.name} ({one.id[:12]}): {one.note}")
    count = Counter(one.fate for one in taken)
    known, imported = count["known"], counted(count["imported"], "cell")
    print(f"{manifest.study}: {imported} imported, {known} were here already, ", end="")
    print(f"{counted(count['conflict'], 'conflict')}, {count['refused']} refused")
    if other:
        print(f"{other}; its manifest is kept, and what was imported is there for any study that has these cells")
        print(f"For a store of its own: cyclebench import {file} --runs FOLDER")
    else:
        print(f"cyclebench status {manifest.study}, report {manifest.study}, sync {manifest.study}")
    if other or count["conflict"] or count["refused"]:
        raise typer.Exit(1)


def clean(
    yes: Annotated[bool, typer.Option("--yes", help="Do it. Without it nothing is removed.")] = False,
    storage: Storage = None,
    runs: Runs = DEFAULT_RUNS,
) -> None:
    """Show what no study needs, and with --yes remove it: cells of no study, prepared data of no cell, checkpoints of
    finished cells, what killed processes have left half written.
    """
    from bench.run.clean import clean as remove  # start-up
    from bench.run.clean import waste  # start-up
    from bench.run.upgrade import open_store  # start-up
    from bench.store.store import TRIALS  # start-up

    if not runs.is_dir():
        raise UserError(f"--runs: {str(runs)!r} is no folder (allowed: one of results)")
    store, trials = open_store(runs), set[str]()
    sweeps = {sweep.study: sweep.storage for sweep in store.sweeps()}
    if storage is not None or sweeps or (runs / TRIALS).exists():
        from bench.sweep.storage import cells_of_sweeps  # start-up

        trials = cells_of_sweeps(runs, storage, sweeps)
    found, unsure = waste(store, trials)
    if unsure:
        print(f"all {unsure} are kept")
    if not found:
        print(f"{runs}: nothing to clean")
        return
    for one in remove(store, found, trials) if yes else found:
        print(f"{'removed' if yes else 'may go'}: {one.path}: {one.about}, {_shown(one.size)}")
    if not yes:
        print(f"{_shown(sum(one.size for one in found))} in all; nothing was removed (to do it: --yes)")


def _shown(size: int) -> str:
    """A number of bytes."""
    return f"{size / 1e6:.1f} MB"
