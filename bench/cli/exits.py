"""The commands that leave early. Heavy libraries are imported inside the command that needs them."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import typer

from bench.cli.cells import whole_path
from bench.cli.options import (
    DEFAULT_RUNS,
    Imports,
    Overrides,
    Preset,
    RunName,
    Runs,
    Threshold,
    Thresholds,
    finite,
    leaving,
)
from bench.cli.runs import tell_newer
from bench.cli.screen import say, show, starting
from bench.errors import UserError
from bench.tables import counted

Granularity = Literal["sequence", "token"]


def generate(
    checkpoint: Annotated[str, typer.Argument(help="Folder of a saved model, or of a finished cell.")],
    prompt: Annotated[str, typer.Option(help="Text, or token numbers where the model has no tokeniser.")],
    exit: Annotated[str | None, typer.Option(metavar="RULE", help="Leave early by this rule, e.g. confidence.")] = None,
    threshold: Threshold = None,
    kv: Annotated[
        str | None,
        typer.Option(help="Skipped keys and values: recompute (default), propagate, share_last or share_first."),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Default: 64, or as many as fit.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, callback=finite, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of sampling.")] = 0,
    cycles: Annotated[int | None, typer.Option(min=1, help="Another number of cycles than the model has.")] = None,
    imports: Imports = None,
) -> None:
    """Generate behind a prompt; small digits behind every token tell how many cycles it took.

    For example: cyclebench generate runs/ID --prompt "In the beginning" --exit latent_diff --threshold 0.2
    """
    given = leaving(exit, threshold)
    if kv is not None and given is None:
        raise UserError("--kv: needs --exit and --threshold, without which nothing is skipped")
    starting(f"loading {checkpoint}")
    from transformers.utils import logging  # start-up

    from bench.exits.generation import EarlyExit  # start-up
    from bench.exits.stream import Checkpoint, histogram, stream  # start-up

    logging.disable_progress_bar()

    leave = None if given is None else EarlyExit(*given, kv or "recompute")  # type: ignore[arg-type]
    loaded = Checkpoint(whole_path(checkpoint))
    taken = stream(
        loaded,
        prompt,
        leave,
        lambda text: print(text, end="", flush=True),
        max_new_tokens,
        temperature,
        seed,
        cycles,
    )
    print(f"\n\n{len(taken)} tokens, {sum(taken) / len(taken):.2f} cycles on average ({', '.join(histogram(taken))})")


def execute(
    study: RunName,
    overrides: Overrides = None,
    preset: Preset = None,
    rule: Annotated[str, typer.Option(help="The exit rule.")] = "zero_attention",
    threshold: Thresholds = None,
    granularity: Annotated[Granularity, typer.Option(help="What leaves: a sequence, or a token.")] = "sequence",
    rounds: Annotated[int, typer.Option(min=1, help="Timed pairs of passes, with exits and without.")] = 5,
    runs: Runs = DEFAULT_RUNS,
    imports: Imports = None,
) -> None:
    """Really leave early on the test data of a study's last run: saved FLOPs beside saved time, for the report.

    With --granularity token every token leaves by its own signal, and its state goes on serving keys and values.
    """
    starting(f"executing the exits of {study}")
    from transformers.utils import logging  # start-up

    from bench.api import load_results  # start-up
    from bench.run.execution import execute_study  # start-up
    from reports.execution import columns, why_it_costs  # start-up

    logging.disable_progress_bar()
    if unbound := next((at for at in threshold or () if math.isinf(at)), None):
        raise UserError(f"--threshold: {unbound} lets all leave or none (allowed: finite numbers; or --rule fixed)")
    results, rows, found = load_results(study, runs, preset, overrides or ()), [], []
    tell_newer(results)
    if lack := len(results.manifest.cells) - sum(record.status == "done" for record in results.records.values()):
        say(f"{counted(lack, 'cell')} of {len(results.manifest.cells)} without a result; they are left out")
    for label, measured in execute_study(results.store, results.manifest, rule, threshold or None, rounds, granularity):
        rows.append(columns(label, measured))
        found.append(measured)
        starting(f"{label}: {measured.time_saved:.1%} of the time saved")
    if not rows:
        raise UserError(f"--rule: no finished cell of {study!r} has exits that {rule!r} can be used at")
    show("executed exits", rows, ("leaves", "mean cycles", "FLOPs/token", "accuracy"))
    if told := why_it_costs(found):
        say(told)
