"""The command line. Heavy libraries are imported inside the command that needs them."""

from __future__ import annotations

import gc
import sys
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.cli import cells, explore, models, performance, stores
from bench.cli import exits as exits
from bench.cli.compare import compare
from bench.cli.options import (
    DEFAULT_HANG,
    DEFAULT_RUNS,
    DEFAULT_TRACKER,
    DEFAULT_TRACKING,
    Formats,
    Hang,
    Imports,
    Out,
    Overrides,
    Preset,
    RunName,
    Runs,
    Storage,
    StudyName,
    TrackerName,
    Tracking,
    command_line,
    finite,
)
from bench.cli.runs import status, sync, tell_newer, tell_run, verify
from bench.cli.screen import Json, say, show, starting, tell_json
from bench.errors import UserError, first_line
from bench.house import OWN, PUBLISHED
from bench.tables import counted

if TYPE_CHECKING:
    from bench.api import Results

app = typer.Typer(
    help="Does reusing a transformer's parameters buy accuracy for the compute it costs?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


INTERRUPTED = 130
GARBAGE = 50_000  # new objects between searches for garbage; at Python's 700 those take a sixth of an import of torch
# Columns of tables that go where a terminal is narrow, the first one first.
SPARE = ("parameters", "training FLOPs", "tokens/s", "depth", "non-embedding", "FLOPs/token", "metric", "trials")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"cyclebench {version('cyclebench')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Does reusing a transformer's parameters buy accuracy for the compute it costs?"""


class Retry(StrEnum):
    """What ``run --retry`` may be."""

    failed = "failed"


class Where(StrEnum):
    """What ``run --executor`` may be."""

    local = "local"
    ray = "ray"


@app.command()
def run(
    study: StudyName,
    overrides: Overrides = None,
    preset: Preset = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Cells at a time. Default: the cores over a cell's threads and processes."),
    ] = None,
    pack: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Seeds and learning rates in one stack at most (train.stacked says what is stacked). Default: as "
            "many as pay. No number changes.",
        ),
    ] = None,
    executor: Annotated[Where, typer.Option(help="Processes on this machine, or tasks of Ray.")] = Where.local,
    address: Annotated[
        str | None,
        typer.Option(help="Of the Ray cluster, e.g. auto or HOST:6379. Default: one is started here."),
    ] = None,
    retry: Annotated[
        Retry | None,
        typer.Option(
            help="Run failed cells again. Without it only those that failed of their environment (memory, disk, a "
            "killed process) are."
        ),
    ] = None,
    checkpoint_every: Annotated[
        str, typer.Option(metavar="TIME", help="Seconds (90s), minutes (10m) or optimizer steps (500).")
    ] = "60s",
    hang: Hang = DEFAULT_HANG,
    storage: Storage = None,
    runs: Runs = DEFAULT_RUNS,
    out: Out = None,
    tracking_uri: Tracking = DEFAULT_TRACKING,
    tracker: TrackerName = DEFAULT_TRACKER,
    formats: Formats = "png",
    imports: Imports = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be run and what it would cost, and run nothing.")
    ] = False,
) -> None:
    """Run a study's cells, track them in MLflow and write the report.

    Cells that are done are not run again, interrupted ones go on from their checkpoints, and the same command in
    several processes, on several machines that share the results' folder, divides the cells between them.
    """
    if dry_run:
        cells.tell_ahead(study, overrides or (), preset, runs)
        return
    starting(f"loading {study}")
    from bench.api import run as run_study  # start-up

    results = run_study(
        study,
        overrides or (),
        preset,
        runs,
        jobs,
        pack=pack,
        executor=executor.value,
        address=address,
        retry=retry is not None,
        checkpoint_every=checkpoint_every,
        hang=hang,
        storage=storage,
        tracking_uri=tracking_uri,
        tracker=tracker,
        out=out,
        formats=formats.split(","),
        command=command_line(),
        tell=say,
    )
    _tell(results)
    from bench.store.tracker import trackers  # start-up

    print(f"{tracker + ':':<10} {trackers.get(tracker).shown_by(tracking_uri)}")
    for cell, record in results.failed:
        print(f"failed: {cell.name}: {record.reason}", file=sys.stderr)
    for name, reason in results.unscored.items():
        print(f"not scored: {name}: {reason}", file=sys.stderr)
    if results.failed:
        again = f"{command_line(without=('--retry',))} --retry failed"
        n = len(results.manifest.cells)
        print(f"{len(results.failed)} of {counted(n, 'cell')} failed; to run those again: {again}", file=sys.stderr)
    if results.failed or results.unscored:
        raise typer.Exit(1)


@app.command()
def sweep(
    study: StudyName,
    overrides: Overrides = None,
    preset: Preset = None,
    max_flops: Annotated[
        float | None,
        typer.Option(min=1, help="Executed forward FLOPs per token not to be exceeded (sweep.max_flops)."),
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, max=1024, help="Worker processes. Default: the cores.")] = None,
    hang: Hang = DEFAULT_HANG,
    storage: Storage = None,
    runs: Runs = DEFAULT_RUNS,
    out: Out = None,
    tracking_uri: Tracking = DEFAULT_TRACKING,
    tracker: TrackerName = DEFAULT_TRACKER,
    imports: Imports = None,
) -> None:
    """Search exit thresholds (from stored traces) and training budgets with Optuna, as the study's ``sweep`` says.

    The same command goes on where it was stopped. Everything is chosen on validation data and reported on test data.
    """
    starting(f"loading {study}")
    from bench.study.load import load_study  # start-up

    limit = [] if max_flops is None else [f"sweep.max_flops={max_flops!r}"]
    chosen = load_study(study, [*(overrides or ()), *limit], preset)  # a mistake is told before the long imports
    from bench.run.executors import hang_seconds  # start-up
    from bench.run.upgrade import open_store  # start-up
    from bench.store.environment import git_revision  # start-up
    from bench.store.files import check_folder  # start-up
    from bench.store.tracker import trackers  # start-up
    from bench.sweep.run import run_sweep  # start-up
    from bench.sweep.storage import default_url  # start-up
    from reports.sweeps import budget_rows, findings, threshold_rows, write_sweep  # start-up

    check_folder(out)
    silent = hang_seconds(hang)
    store = open_store(runs, begin=True)
    url, window = storage or default_url(runs), trackers.get(tracker)(tracking_uri, store)
    result = run_sweep(chosen, store, url, jobs, window, command_line(), git_revision(), silent)
    for title, rows in (("thresholds", threshold_rows(result)), ("budgets", budget_rows(result))):
        show(f"{chosen.sweep_name}: {title}, chosen on validation data", rows, SPARE)
    for finding in findings(result):
        say(finding)
    for path in write_sweep(result, out or runs / "reports" / chosen.sweep_name):
        print(path)


@app.command()
def findings(
    folder: Annotated[Path, typer.Option("--published", help="Folder of the published studies.")] = PUBLISHED,
    out: Annotated[Path | None, typer.Option(help="File of the page; by default it is printed.")] = None,
) -> None:
    """One page of what the published studies have found: every hypothesis, its verdict, its interval and its seeds."""
    from bench.store.files import atomic_write  # start-up
    from reports.findings import page  # start-up

    if out is not None and out.is_dir():
        raise UserError(f"--out: {str(out)!r} is a folder (allowed: the file of the page)")
    text = page(folder)
    if out is None:
        print(text, end="")
        return
    atomic_write(out, text.encode())
    say(f"findings: {out}")


@app.command()
def report(
    study: RunName,
    overrides: Overrides = None,
    preset: Preset = None,
    runs: Runs = DEFAULT_RUNS,
    out: Out = None,
    publish: Annotated[
        bool,
        typer.Option("--publish", help="Only tables and PNG plots, into reports/published/STUDY: to be committed."),
    ] = False,
    tracking_uri: Tracking = DEFAULT_TRACKING,
    tracker: TrackerName = DEFAULT_TRACKER,
    formats: Formats = "png",
    imports: Imports = None,
    as_json: Json = False,
) -> None:
    """Write the report of a study's last run again, from the stored results alone, and what MLflow lacks of it."""
    starting(f"reading the results of {study}")
    from bench.api import load_results  # start-up
    from bench.store.tracker import trackers  # start-up

    results = load_results(study, runs, preset, overrides or ())
    folder = OWN if publish else runs / "reports"
    results.report(out or folder / results.manifest.study, formats.split(","), publish)
    if as_json:
        tell_json(tables_of(results))
    else:
        tell_run(results)
        _tell(results)
    window = trackers.get(tracker)(tracking_uri, results.store)
    window.complete(results.manifest, results.paths, results.findings())


@app.command()
def power(
    study: RunName,
    effect: Annotated[
        float | None,
        typer.Option(
            callback=finite,
            help="Effect to show, in the metric's unit, beyond a hypothesis's margin; a hypothesis over tasks of "
            "different units is answered for each task. Default: the one seen.",
        ),
    ] = None,
    power: Annotated[
        float | None, typer.Option(callback=finite, help="Probability of showing it. Default: 0.8.")
    ] = None,
    overrides: Overrides = None,
    preset: Preset = None,
    runs: Runs = DEFAULT_RUNS,
    imports: Imports = None,
    as_json: Json = False,
) -> None:
    """How many seeds a study's hypotheses need, from the variance of the paired differences stored so far, pilots' too;
    of a deciding study, how its looks may be expected to end.
    """
    starting(f"reading the results of {study}")
    from bench.api import load_results  # start-up
    from reports.power import EXPECTED, POWER, power_rows  # start-up

    results = load_results(study, runs, preset, overrides or ())
    manifest = results.manifest
    rows = power_rows(manifest, results.records, effect, power)
    asked = f"seeds needed for power {power or POWER:g}, level 0.05 over the hypotheses"
    if as_json:
        tell_json(rows)
        return
    tell_newer(results)
    show(f"{manifest.study}: {'how its looks may end' if EXPECTED in rows[0] else asked}", rows)
    if effect is None:
        say("An effect seen in few seeds is likely too large: give --effect what would matter to you.")


def tables_of(results: Results) -> dict[str, Any]:
    """The report's tables, for other programs."""
    from reports.fronts import fronts  # start-up
    from reports.table import costs, further_tests, harness, summary_rows  # start-up
    from reports.verdicts import differences, sentences, verdicts  # start-up

    told = results.manifest, results.records
    tables = {"results": summary_rows(*told), "verdicts": verdicts(*told), "differences": differences(*told)}
    tables |= {"fronts": fronts(*told), "further tests": further_tests(*told), "harness": harness(*told)}
    return {"sentences": sentences(*told), **tables, "costs": costs(*told), "files": list(map(str, results.paths))}


def _tell(results: Results) -> None:
    """Print the summary table, the verdict on each hypothesis in a sentence, and where plots and report are."""
    from reports.table import summary_rows  # start-up
    from reports.verdicts import sentences  # start-up

    rows = summary_rows(results.manifest, results.records)
    if not any(row["note"] for row in rows):
        rows[:] = [{key: value for key, value in row.items() if key != "note"} for row in rows]
    show(f"{results.manifest.study}: {results.manifest.question}", rows, SPARE, rows.ends, by="task")
    for sentence in sentences(results.manifest, results.records):
        say(sentence)
    for label, suffix in (("plot", ".png"), ("report", ".html")):
        for path in results.paths:
            if path.suffix == suffix and ("accuracy_vs_flops" in path.name or suffix == ".html"):
                print(f"{label + ':':<10} {path}")


app.command("list")(explore.list_)
app.command("costs")(explore.costs_)
app.command("eval")(models.eval_)
app.command("bench")(performance.bench_)
app.command("import")(stores.import_)
app.command("show")(cells.show_)
for command in (
    explore.profile,
    compare,
    status,
    sync,
    verify,
    models.convert,
    exits.generate,
    exits.execute,
    stores.export,
    stores.clean,
):
    app.command()(command)


def main() -> None:
    """Entry point: every error a user can cause is one line and exit status 2."""
    gc.set_threshold(GARBAGE)
    try:
        status = app(standalone_mode=False)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except typer.TyperException as error:
        print(f"error: {' '.join(error.format_message().split())}", file=sys.stderr)
        status = 2
    except OSError as error:
        print(f"error: {error.strerror or error}: {error.filename or 'no file'}", file=sys.stderr)
        status = 2
    except MemoryError as error:
        print(f"error: the memory of this machine does not suffice: {first_line(error)}", file=sys.stderr)
        status = 2
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    if status == INTERRUPTED:  # typer makes Ctrl-C this status by itself
        print("interrupted: finished cells are kept; the same command goes on from there", file=sys.stderr)
    sys.exit(status)
