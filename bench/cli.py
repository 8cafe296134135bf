"""The command line. Heavy libraries are imported inside the command that needs them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.errors import UserError
from bench.exits import commands as exits

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from bench.plan import Plan

app = typer.Typer(
    help="Does reusing a transformer's parameters buy accuracy for the compute it costs?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

StudyName = Annotated[
    str, typer.Argument(metavar="STUDY", help="A study's name (see `cyclebench list`) or a YAML file.")
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
DEFAULT_RUNS = Path("runs")
DEFAULT_TRACKING = "sqlite:///mlflow.db"


@app.command("list")
def list_() -> None:
    """Show variants with their options, tasks, and the studies that come with the suite."""
    from bench.data import task_class, task_names
    from bench.study import load_study, study_names
    from bench.variant import variant_class, variant_names

    console = _console()
    for title, names, kind_of in (("Variants", variant_names(), variant_class), ("Tasks", task_names(), task_class)):
        table = _table(title, "name", "what it is", "options = default")
        for name in names:
            kind: Any = kind_of(name)
            table.add_row(name, _first_line(kind), _options(kind.Options))
        console.print(table)
    studies = _table("Studies", "name", "question")
    for name in study_names():
        studies.add_row(name, load_study(name).question)
    console.print(studies)


@app.command()
def profile(
    variants: Annotated[list[str], typer.Argument(help="Variants to put side by side.")],
    overrides: Overrides = None,
    length: Annotated[int, typer.Option(min=2, help="Sequence length, tokens.")] = 256,
    vocab_size: Annotated[int, typer.Option(min=2, help="Vocabulary.")] = 256,
) -> None:
    """Parameters, FLOPs and memory of variants side by side, with what the zero token and the gate add.

    For example: cyclebench profile htc ztt --set model.d_model=256 --set variants.ztt.options.gating=none
    """
    from dataclasses import asdict

    from bench.costs import costs
    from bench.plan import shape_of
    from bench.study import study_from
    from reports.units import human

    raw = {"name": "profile", "question": "What does each cost?", "tasks": ["p_hop"], "variants": variants, "seeds": 1}
    study = study_from(raw, overrides or (), "profile")
    columns = []
    for entry in study.variants:
        variant = study.variant(entry)
        model, chosen = shape_of(study, entry, study.tasks[0], vocab_size, length)
        found = asdict(costs(variant, model, vocab_size, length))
        schedule = variant.schedule(model)
        rows = {
            "schedule (block of each step)": str(schedule),
            "width, heads, MLP width": f"{model.d_model}, {model.n_heads}, {model.ff}",
            "parameter depth / effective depth": f"{found['n_blocks']} / {found['depth']}",
            "parameters": human(found["params"]),
            "  without embeddings": human(found["params_non_embedding"]),
            "forward FLOPs/token": human(found["forward_flops_per_token"]),
            "training FLOPs/token": human(found["train_flops_per_token"]),
            "KV cache, bytes/token": human(found["kv_bytes_per_token"]),
            "activations, bytes/sequence": human(found["activation_bytes"]),
        }
        for label, addition in found["additions"].items():
            rows[f"  of which {label}: parameters"] = human(addition["params"])
            rows[f"  of which {label}: FLOPs/token"] = human(addition["flops_per_token"])
        if chosen:
            rows[f"matched in {entry.match}"] = chosen
        columns.append((entry.label, rows))
    table = _table(
        f"{study.model.family}, {length} tokens, vocabulary {vocab_size}", "", *(label for label, _ in columns)
    )
    for key in dict.fromkeys(key for _, rows in columns for key in rows):
        table.add_row(key, *(rows.get(key, "-") for _, rows in columns))
    _console().print(table)


@app.command("costs")
def costs_(
    study: StudyName,
    overrides: Overrides = None,
    preset: Preset = None,
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of timed training steps for each variant.")] = 20,
    batch: Annotated[int, typer.Option(min=1, help="Sequences in a timed step.")] = 4,
    out: Annotated[Path, typer.Option("--out", help="Folder of the table.")] = DEFAULT_RUNS / "reports" / "costs",
) -> None:
    """What each variant of a study adds to its reference: parameters, FLOPs, memory, and step time as measured.

    For example: cyclebench costs additions
    """
    from bench.perf.additions import cost_rows, shown, write
    from bench.plan import make_plan
    from bench.runner import environment
    from bench.study import load_study

    chosen = load_study(study, overrides or (), preset)
    place = environment(make_plan(chosen, _command_line(), None).cells[0].cell)
    rows = cost_rows(chosen, rounds, batch)
    tables = [shown(row) for row in rows]
    table = _table(f"{chosen.name}: what is added to {chosen.reference}", *tables[0])
    for row in tables:
        table.add_row(*row.values())
    _console().print(table)
    for path in write(chosen, rows, batch, _command_line(), place, out):
        print(path)


@app.command()
def run(
    study: StudyName,
    overrides: Overrides = None,
    preset: Preset = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Cells at a time. Default: the cores over a cell's threads.")
    ] = None,
    runs: Runs = DEFAULT_RUNS,
    out: Out = None,
    tracking_uri: Annotated[str, typer.Option(help="Where MLflow keeps its records.")] = DEFAULT_TRACKING,
) -> None:
    """Run a study's cells, track them in MLflow and write the report. Cells that are done are not run again."""
    from bench.runner import git_revision, run_study
    from bench.store import Store
    from bench.study import load_study
    from bench.tracking import Tracker
    from bench.tune import tuned_plan

    store = Store(runs)
    tracker = Tracker(tracking_uri, store)

    def run_plan(plan: Plan) -> dict[str, dict[str, Any]]:
        tracker.study(plan.manifest)
        results = run_study(plan, store, jobs, tracker.log)
        tracker.finish([])
        return results

    plan = tuned_plan(load_study(study, overrides or (), preset), run_plan, _command_line(), git_revision())
    for entry in plan.manifest["variants"]:
        if entry["chosen"]:
            print(f"{entry['label']}: matched in {entry['match']}: {entry['chosen']}")
    results = run_plan(plan)
    paths = _write_report(plan.manifest, results, out or runs / "reports" / plan.study.name)
    tracker.finish(paths)
    print(f"MLflow:    .venv/bin/mlflow ui --backend-store-uri {tracking_uri}   (then open http://127.0.0.1:5000)")
    if any(record["status"] == "failed" for record in results.values()):
        raise typer.Exit(1)


@app.command()
def sweep(
    study: StudyName,
    overrides: Overrides = None,
    preset: Preset = None,
    max_flops: Annotated[
        float | None, typer.Option(min=1, help="Executed forward FLOPs per token not to be exceeded (sweep.max_flops).")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Worker processes. Default: the cores.")] = None,
    storage: Annotated[
        str | None, typer.Option(help="Database of the trials, any SQLAlchemy URL. Default: optuna.db in --runs.")
    ] = None,
    runs: Runs = DEFAULT_RUNS,
    out: Out = None,
    tracking_uri: Annotated[str, typer.Option(help="Where MLflow keeps its records.")] = DEFAULT_TRACKING,
) -> None:
    """Search exit thresholds (from stored traces) and training budgets with Optuna, as the study's ``sweep`` says.

    The same command goes on where it was stopped. Everything is chosen on validation data and reported on test data.
    """
    from bench.runner import git_revision
    from bench.store import Store
    from bench.study import load_study
    from bench.sweep.run import run_sweep
    from bench.sweep.storage import default_url
    from bench.tracking import Tracker
    from reports.sweeps import budget_rows, threshold_rows, write

    limit = [] if max_flops is None else [f"sweep.max_flops={max_flops!r}"]
    chosen, store = load_study(study, [*(overrides or ()), *limit], preset), Store(runs)
    url = storage or default_url(runs)
    result = run_sweep(chosen, store, url, jobs, Tracker(tracking_uri, store), _command_line(), git_revision())
    for title, rows in (("thresholds", threshold_rows(result)), ("budgets", budget_rows(result))):
        if rows:
            table = _table(f"{chosen.name}: {title}, chosen on validation data", *rows[0])
            for row in rows:
                table.add_row(*row.values())
            _console().print(table)
    for path in write(result, out or runs / "reports" / chosen.name):
        print(path)


@app.command()
def report(
    study: StudyName,
    preset: Preset = None,
    runs: Runs = DEFAULT_RUNS,
    out: Out = None,
    publish: Annotated[
        bool,
        typer.Option("--publish", help="Only tables and PNG plots, into reports/published/STUDY: to be committed."),
    ] = False,
) -> None:
    """Write the report of a study's last run again, from the stored results alone."""
    manifest, results = _stored(study, preset, runs)
    folder = Path("reports", "published") if publish else runs / "reports"
    _write_report(manifest, results, out or folder / manifest["study"], publish)


@app.command()
def power(
    study: StudyName,
    effect: Annotated[
        float | None,
        typer.Option(help="Effect to show, in the metric's unit, beyond a hypothesis's margin. Default: the one seen."),
    ] = None,
    power: Annotated[float, typer.Option(help="Probability of showing it.")] = 0.8,
    preset: Preset = None,
    runs: Runs = DEFAULT_RUNS,
) -> None:
    """How many seeds a study's hypotheses need, from the variance of the paired differences stored so far."""
    from reports.power import power_rows

    manifest, results = _stored(study, preset, runs)
    rows = power_rows(manifest, results, effect, power)
    table = _table(f"{manifest['study']}: seeds needed for power {power:g}, two-sided, Holm's first step", *rows[0])
    for row in rows:
        table.add_row(*row.values())
    _console().print(table)
    if effect is None:
        print("An effect seen in few seeds is likely too large: give --effect what would matter to you.")


def _stored(study: str, preset: str | None, runs: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Manifest and records of a study's last run. Raises UserError if it has not been run."""
    import reports
    from bench.store import Store
    from bench.study import load_study

    store, name = Store(runs), load_study(study, preset=preset).name
    manifest = store.manifest(name)
    if manifest is None:
        raise UserError(f"study {name!r} has not been run: {runs} holds no record of it (run: cyclebench run {study})")
    return manifest, reports.read(store, manifest)


@app.command()
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
) -> None:
    """Turn a pretrained GPT-2 or Llama into a variant.

    For example: cyclebench convert smollm2 --variant htc --set model.n_cycles=2 --out models/smollm2-htc
    """
    from bench.pretrained.command import convert_to

    rows = convert_to(source, variant, overrides or (), seed, out)
    table = _table(f"{source} -> {out}", "", variant)
    for key, value in rows.items():
        table.add_row(key, value)
    _console().print(table)


@app.command("eval")
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
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of a task; all by default.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 16,
    out: Annotated[Path, typer.Option(help="Folder of the tasks, results and plots.")] = Path("evaluations"),
    tracking_uri: Annotated[str, typer.Option(help="Where MLflow keeps its records.")] = DEFAULT_TRACKING,
) -> None:
    """Score checkpoints with lm-evaluation-harness, and plot the scores against the FLOPs executed.

    For example: cyclebench eval models/smollm2-htc --tasks kjv --cycles 1 --cycles 2 --set kjv.length=256
    """
    from bench.downstream.command import evaluate_all

    rows, paths = evaluate_all(
        checkpoints, tasks.split(","), overrides or (), cycles or (), limit, batch_size, out, tracking_uri
    )
    table = _table("lm-evaluation-harness", "checkpoint", "task", "metric", "value", "stderr", "cycles", "FLOPs/token")
    for row in rows:
        error = "-" if row["stderr"] is None else f"{row['stderr']:.4f}"
        value, flops = f"{row['value']:.4f}", f"{row['flops_per_token']:.4g}"
        table.add_row(row["checkpoint"], row["task"], row["metric"], value, error, str(row["cycles"]), flops)
    _console().print(table)
    for path in paths:
        print(f"{'plot:' if path.suffix == '.png' else 'results:':<10} {path}")


for command in (exits.generate, exits.execute):
    app.command()(command)


def _write_report(
    manifest: dict[str, Any], results: dict[str, dict[str, Any]], out: Path, published: bool = False
) -> list[Path]:
    """Write the report's files, print the summary table and where to look, and return the files."""
    import reports

    paths = reports.write(manifest, results, out, published)
    _console().print(reports.summary_table(manifest, results))
    for label, suffix in (("plot", ".png"), ("report", ".html")):
        for path in (
            path for path in paths if path.suffix == suffix and ("accuracy_vs_flops" in path.name or suffix == ".html")
        ):
            print(f"{label + ':':<10} {path}")
    return paths


def _command_line() -> str:
    return shlex.join(["cyclebench", *sys.argv[1:]])


def _console() -> Console:
    """Standard output, at a width that holds the tables where there is no terminal to tell one."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=180)


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    return Table(*columns, title=title, title_justify="left")


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]


def _options(kind: Any) -> str:
    """The fields of an options model as ``name=default``, one a line."""
    fields: Iterable[tuple[str, Any]] = kind.model_fields.items()
    return "\n".join(f"{name}={'(required)' if field.is_required() else field.get_default()}" for name, field in fields)


def main() -> None:
    """Entry point: every error a user can cause is one line and exit status 2."""
    try:
        status = app(standalone_mode=False)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except typer.TyperException as error:
        print(f"error: {' '.join(error.format_message().split())}", file=sys.stderr)
        status = 2
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted: finished cells are kept; the same command goes on from there", file=sys.stderr)
        status = 130
    sys.exit(status)
