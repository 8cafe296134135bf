"""Commands about what has run: where it stands, whether it is right, and MLflow's copy of it."""

from __future__ import annotations

import math
import shlex
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.cli.options import (
    DEFAULT_RUNS,
    DEFAULT_TRACKER,
    DEFAULT_TRACKING,
    AnyRun,
    Imports,
    Overrides,
    Preset,
    RunName,
    Runs,
    TrackerName,
    Tracking,
    command_line,
)
from bench.cli.screen import Json, say, show, starting, tell_json
from bench.errors import UserError
from bench.tables import counted

if TYPE_CHECKING:
    from bench.api import Results
    from bench.run.status import Status
    from bench.store.manifest import Manifest
    from bench.store.store import Store


def status(
    study: AnyRun = None,
    overrides: Overrides = None,
    preset: Preset = None,
    runs: Runs = DEFAULT_RUNS,
    imports: Imports = None,
    as_json: Json = False,
) -> None:
    """Show what is done, running (where, since when, how fast), failed (why), and what is left in FLOPs and hours.

    Without STUDY: which runs of which studies there are, and what each is called.
    """
    if study is None:
        _list_runs(runs, as_json)
        return
    from bench.api import load_results  # start-up
    from bench.run.status import status as status_of  # start-up
    from reports.units import human  # start-up

    results = load_results(study, runs, preset, overrides or ())
    store, manifest = results.store, results.manifest
    found = status_of(store, manifest)
    if as_json:
        tell_json(_as_json(manifest, found))
        return
    n, at_work, failed = len(manifest.cells), len(found.running), len(found.failed)
    print(f"{manifest.study}: {found.done} of {counted(n, 'cell')} done, {at_work} running, {failed} failed, ", end="")
    print(f"{found.waiting} waiting")
    tell_run(results)
    if found.other_mode:
        say(f"{found.other_mode} done by an earlier version in another mode (in a stack, or alone) than would be now")
    if found.running:
        rows = []
        for held in sorted(found.running, key=lambda held: str(held["name"])):
            speed = held.get("tokens_per_second")
            row = {"cell": held["name"], "where": f"{held['owner']['host']}, process {held['owner']['pid']}"}
            row |= {"since": f"{datetime.fromtimestamp(held['since']):%Y-%m-%d %H:%M:%S}"}
            row |= {"step": f"{held.get('step', 0)}/{held.get('steps', '?')}"}
            row |= {"tokens/s": "-" if speed is None else f"{speed:,.0f}"}
            rows.append({**row, "left": _duration(held.get("seconds_left"))})
        show("Running", rows, ("since", "where", "tokens/s"))
    if found.failed:
        failures = [{"cell": name, "of": str(record.kind), "reason": record.reason} for name, record in found.failed]
        show("Failed", failures)
        given = shlex.split(manifest.command)[1:]
        again = command_line([*given, *(["--runs", str(runs)] if runs != DEFAULT_RUNS else [])], without=("--retry",))
        every = f"{again} --retry failed"
        if not given:  # from Python
            again, every = "cyclebench.run(STUDY)", "cyclebench.run(STUDY, retry=True)"
        say(f"Those that failed of the environment are run again by `{again}`, all of them by `{every}`.")
    if manifest.decide is not None:
        _tell_open(store, manifest, found)
    if found.done < n:
        flops = "unknown" if found.left_flops is None else f"{human(found.left_flops)} training FLOPs"
        say(f"left: {flops}, {_duration(found.left_seconds)} at the speed and the number of processes seen so far")


def _as_json(manifest: Manifest, found: Status) -> dict[str, Any]:
    """Where a study stands, for other programs."""
    cells = {"cells": len(manifest.cells), "done": found.done, "waiting": found.waiting, "running": found.running}
    failed = [{"name": name, "id": r.id, "kind": r.kind, "reason": r.reason} for name, r in found.failed]
    left = {"left_flops": found.left_flops, "left_seconds": found.left_seconds}
    return {"study": manifest.study, "changed": manifest.changed, **cells, "failed": failed, **left}


def _list_runs(runs: Path, as_json: bool) -> None:
    """A row for every run of every study."""
    from bench.run.upgrade import open_store  # start-up

    store = open_store(runs)
    manifests = [manifest for name in store.studies() if (manifest := store.manifest(name)) is not None]
    if not manifests:
        raise UserError(f"--runs: {str(runs)!r} holds no run of a study (allowed: the folder of results, see --help)")
    rows = []
    for manifest in manifests:
        done = sum(store.done(cell.id) for cell in manifest.cells)
        row = {"name": manifest.study, "cells done": f"{done}/{len(manifest.cells)}", "seeds": str(len(manifest.seeds))}
        rows.append({**row, "changed by --set": "\n".join(manifest.changed) or "-"})
    if as_json:
        tell_json(rows)
        return
    show(f"Runs in {runs}", rows)
    say("report, status, power, verify, execute, sync and export take a name, or STUDY and the --set it was run with.")


def tell_run(results: Results) -> None:
    """Print what was changed for this run of its study, what the study says by now, and which other runs there are."""
    from bench.run.status import run_in_words, runs_of  # start-up

    tell_newer(results)
    if results.manifest.changed:
        say(f"not the study as it is written: {run_in_words(results.manifest)}")
    for other in runs_of(results.store, results.manifest.study):
        say(f"another run of this study: {run_in_words(other)}")


def tell_newer(results: Results) -> None:
    """Print what has changed since the study was run."""
    if newer := results.newer:
        say(f"the study has changed since this run: {'; '.join(newer)}")


def _tell_open(store: Store, manifest: Manifest, found: Status) -> None:
    """Where the hypotheses of a deciding study stand, what the open ones need, and what to expect until the end."""
    from bench.run.standing import flops_of, flops_to_end, scores, stand, still_open  # start-up
    from bench.run.status import planned_of  # start-up
    from reports.units import human  # start-up

    row = manifest.decide
    assert row is not None
    results = scores(store, manifest, (cell.id for cell in manifest.cells))
    standing = stand(manifest, results)
    limits = planned_of(manifest) if row.max_flops is not None else {}
    limits = limits or found.flops
    opened = still_open(manifest, results, standing, limits)
    rows, by_claim = [], {each.claim: each for each in opened}
    heads = ("verdict", "pairs", "next look", "cells", "FLOPs", "expected pairs")
    for entry, decision in zip(manifest.hypotheses, standing.decisions, strict=True):
        values = [decision.verdict.verdict, str(decision.pairs), "-", "-", "-", "-"]
        if (each := by_claim.get(entry.claim)) is not None:
            flops = flops_of(each.cells, found.flops)
            needs = [str(len(each.cells)), "-" if math.isnan(flops) else human(flops)]
            further = f"{each.further:.0f} more{', if equal' if each.assumed else ''}"
            values = ["open", str(each.pairs), str(each.look), *needs, further]
        rows.append({"hypothesis": entry.claim, **dict(zip(heads, values, strict=True))})
    show("Hypotheses", rows, ("cells", "next look"))
    if row.changed:
        say("The looks, alpha or hypotheses were others when the first cells were run: alpha promises nothing.")
    for each in opened:
        if each.stop:
            say(f"{each.claim}: {each.stop}")
    going = [each for each in opened if not each.stop]
    if going:
        first = min(each.look for each in going)
        cells = {key for each in going if each.look == first for key in each.cells}
        for what, flops in (
            (f"next look, at {first} pairs: {counted(len(cells), 'cell')}", flops_of(cells, found.flops)),
            ("expected until all is decided", flops_to_end(manifest, results, going, found.flops)),
        ):
            told = "unknown" if math.isnan(flops) else f"{human(flops)} training FLOPs"
            say(f"{what}: {told}, {_duration(None if math.isnan(flops) else found.seconds(flops))}")


def _duration(seconds: float | None) -> str:
    return "unknown time" if seconds is None else str(timedelta(seconds=round(seconds)))


def sync(
    study: RunName,
    overrides: Overrides = None,
    preset: Preset = None,
    runs: Runs = DEFAULT_RUNS,
    tracking_uri: Tracking = DEFAULT_TRACKING,
    tracker: TrackerName = DEFAULT_TRACKER,
    imports: Imports = None,
) -> None:
    """Write into MLflow what it lacks of a study: its cells are in the results' folder, whatever became of MLflow."""
    starting(f"comparing {tracking_uri} with the results of {study}")
    from bench.api import load_results  # start-up
    from bench.store.tracker import trackers  # start-up

    results = load_results(study, runs, preset, overrides or ())
    store, manifest = results.store, results.manifest
    window = trackers.get(tracker)(tracking_uri, store)
    window.trusting = False
    files = sorted(path for path in (runs / "reports" / manifest.study).glob("*") if path.is_file())
    window.complete(manifest, files, results.findings())
    if window.broken:
        raise typer.Exit(1)
    say(f"{window.filled} cells added, {window.there} were there already: {tracking_uri}")


def _verify_published(study: str, sample: int, seed: int) -> None:
    from bench.run.published import run_again  # start-up

    found = run_again(study, sample, seed)
    for each in found:
        told = f"{each.metric} {each.found:.6g}, published {each.published:.6g}"
        if each.problem:
            told = f"cannot be run again: {each.problem}"
        elif each.found == each.published:
            told += ": the same to the last digit"
        elif math.isnan(each.tolerance):
            told += ": not the same, and the published seeds (one, or all equal) do not say how far it may lie off"
        else:
            off = "within" if each.holds else "beyond"
            told += f": {off} the tolerance ({each.tolerance:.3g}, 3 sd between seeds)"
        say(f"{each.cell.name} ({each.cell.id[:12]}): {told}")
    well = sum(each.holds for each in found)
    say(f"{well} of {len(found)} cells run again gave what was published")
    if well < len(found) or (sample and not found):
        raise typer.Exit(1)


def verify(
    study: RunName,
    overrides: Overrides = None,
    preset: Preset = None,
    sample: Annotated[int, typer.Option(min=0, help="Finished cells to run again.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Picks the sample.")] = 0,
    published: Annotated[
        bool, typer.Option("--published", help="Of a published study (a name, or a folder): cells run again here.")
    ] = False,
    runs: Runs = DEFAULT_RUNS,
    imports: Imports = None,
) -> None:
    """Check a study's results: ids, data and traces computed again, and a random sample of cells run again."""
    starting(f"checking the results of {study}")
    if published:
        if overrides or preset:
            raise UserError("--published: the study is as it was published (allowed: without --set and --preset)")
        return _verify_published(study, sample, seed)
    from bench.api import load_results  # start-up
    from bench.run.verify import check_stored, rerun  # start-up

    results = load_results(study, runs, preset, overrides or ())
    tell_newer(results)
    store, cells = results.store, results.manifest.cells
    stored = check_stored(store, cells)
    again = rerun(store, cells, sample, seed)
    for finding in [*(f for f in stored if f.problem or f.note), *again]:
        well = "sound" if finding.check == "stored" else "the same numbers"
        say(f"{finding.name} ({finding.id[:12]}), {finding.check}: {finding.problem or well}")
        if finding.note:
            print(f"  {finding.note}")
    sound = sum(not finding.problem for finding in stored)
    same = sum(not finding.problem for finding in again)
    told = f"{same} of {len(again)} cells run again gave the same numbers to the last digit"
    say(f"{sound} of {len(stored)} stored results are sound; {told}")
    if sound < len(stored) or same < len(again) or not stored:
        raise typer.Exit(1)
