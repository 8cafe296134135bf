"""Commands that show what there is and what it costs, without training anything."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.cli.options import DEFAULT_RUNS, Overrides, Preset, StudyName, command_line, new_table, screen


def list_() -> None:
    """Show what a study may name: variants and tasks with their options, exit rules, gates, KV policies, studies."""
    from bench.data.task import tasks  # start-up
    from bench.evaluate.rules import rules  # start-up
    from bench.exits.policy import POLICIES  # start-up
    from bench.model.gates import NONE, gates  # start-up
    from bench.model.variant import variants  # start-up
    from bench.study.load import load_study, study_names  # start-up
    from bench.study.named import NAMED  # start-up

    console = screen()
    for title, registry in (("Variants", variants), ("Tasks", tasks)):
        table = new_table(title, "name", "what it is", "options = default")
        for name in registry.names():
            kind: Any = registry.get(name)
            table.add_row(name, _first_sentence(kind), _options(kind.Options))
        console.print(table)
    table = new_table("Names of a variant with a shape and a training of its own", "name", "what it is", "variant")
    for name, named in sorted(NAMED.items()):
        told = {"model": named.model, "train": named.train}
        fields = [f"{group}.{key}={value}" for group, given in told.items() for key, value in given.items()]
        table.add_row(name, named.about, ", ".join([named.variant, *fields]))
    console.print(table)
    table = new_table("Exit rules (--rule, --exit)", "name", "what it is", "leaves where it is", "aggregates")
    for name in rules.names():
        rule = rules.get(name)
        table.add_row(name, _first_sentence(rule), rule.leave, ", ".join(rule.aggregates))
    console.print(table)
    table = new_table("Gates (options.gating)", "name", "what it is")
    table.add_row(NONE, "No gate: updates are added as in a plain block.")
    for name in gates.names():
        table.add_row(name, _first_sentence(gates.get(name)))
    console.print(table)
    table = new_table("KV policies of early exits in generation (--kv)", "name", "what becomes of skipped slots")
    for name, about in POLICIES.items():
        table.add_row(name, about)
    console.print(table)
    studies = new_table("Studies", "name", "question")
    for name in study_names():
        studies.add_row(name, load_study(name).question)
    console.print(studies)


def profile(
    variants: Annotated[list[str], typer.Argument(help="Variants to put side by side.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="model.NAME, reference, and of a variant options.NAME, model.NAME, match, label. Repeatable.",
        ),
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Sequence length, tokens.")] = 256,
    vocab_size: Annotated[int, typer.Option(min=2, help="Vocabulary.")] = 256,
) -> None:
    """Parameters, FLOPs and memory of variants side by side, with what the zero token and the gate add.

    For example: cyclebench profile htc ztt --set model.d_model=256 --set variants.ztt.options.gating=none
    """
    from bench.study.profile import profile as profiled  # start-up
    from reports.units import human  # start-up

    found, columns = profiled(variants, overrides or (), length, vocab_size), []
    for each in found:
        model, cost = each.model, each.costs
        rows = {
            "schedule (block of each step)": str(each.schedule),
            "width, heads, MLP width": f"{model.d_model}, {model.n_heads}, {model.ff}",
            "parameter depth / effective depth": f"{cost.n_blocks} / {cost.depth}",
            "parameters": human(cost.params),
            "  without embeddings": human(cost.params_non_embedding),
            "forward FLOPs/token": human(cost.forward_flops_per_token),
            "training FLOPs/token": human(cost.train_flops_per_token),
            "KV cache, bytes/token": human(cost.kv_bytes_per_token),
            "activations, bytes/sequence": human(cost.activation_bytes),
        }
        for label, addition in cost.additions.items():
            rows[f"  of which {label}: parameters"] = human(addition.params)
            rows[f"  of which {label}: FLOPs/token"] = human(addition.flops_per_token)
        if each.chosen:
            rows[f"matched in {each.match}"] = each.chosen
        columns.append((each.label, rows))
    table = new_table(
        f"{found[0].model.family}, {length} tokens, vocabulary {vocab_size}", "", *(label for label, _ in columns)
    )
    for key in dict.fromkeys(key for _, rows in columns for key in rows):
        table.add_row(key, *(rows.get(key, "-") for _, rows in columns))
    screen().print(table)


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
    from bench.perf.additions import cost_rows, shown, write_costs  # start-up
    from bench.study.load import load_study  # start-up
    from bench.study.plan import make_plan  # start-up
    from bench.train.device import environment_of  # start-up

    chosen = load_study(study, overrides or (), preset)
    place = environment_of(make_plan(chosen, command_line(), None).cells[0].cell.train).dump()
    rows = cost_rows(chosen, rounds, batch)
    tables = [shown(row) for row in rows]
    table = new_table(f"{chosen.name}: what is added to {chosen.reference}", *tables[0])
    for row in tables:
        table.add_row(*row.values())
    screen().print(table)
    for path in write_costs(chosen, rows, batch, command_line(), place, out):
        print(path)


def _first_sentence(kind: type) -> str:
    text = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
    end = text.find(". ")
    return text if end < 0 else text[: end + 1]


def _options(kind: Any) -> str:
    """The fields of an options model as ``name=default``, one a line."""
    fields: Iterable[tuple[str, Any]] = kind.model_fields.items()
    return "\n".join(f"{name}={'(required)' if field.is_required() else field.get_default()}" for name, field in fields)
