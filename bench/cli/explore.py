"""Commands that show what there is and what it costs, without training anything."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from bench.cli.options import DEFAULT_RUNS, Imports, Overrides, Preset, StudyName, command_line
from bench.cli.screen import Json, fits, show, starting, tell_json

if TYPE_CHECKING:
    from bench.model.named import Named


def list_(
    keys: Annotated[
        bool, typer.Option("--keys", help="What `model`, `train` and `evaluation` of a study and --set may say.")
    ] = False,
    imports: Imports = None,
    as_json: Json = False,
) -> None:
    """Show what a study may name: variants and tasks with their options, exit rules, gates, KV policies, studies."""
    starting("loading what a study may name")
    tables = {"Keys of a study": _keys()} if keys else _named()
    if as_json:
        tell_json(tables)
        return
    for title, rows in tables.items():
        show(title, [_in_short(row) for row in rows] if keys else rows)


def _keys() -> list[dict[str, str]]:
    """Every key of a study's shared settings, its default, what is allowed, and what it says."""
    from bench.config import EvalConfig, ModelConfig, TrainConfig  # start-up

    rows = []
    for section, kind in (("model", ModelConfig), ("train", TrainConfig), ("evaluation", EvalConfig)):
        for name, field in kind.model_fields.items():
            default = "(required)" if field.is_required() else _as_written(field.get_default(call_default_factory=True))
            about = " ".join((field.description or "").split())
            rows.append(
                {"key": f"{section}.{name}", "default": default, "allowed": _allowed(field), "what it is": about}
            )
    return rows


def _in_short(row: dict[str, str]) -> dict[str, str]:
    """A key's row with what is allowed beside what it is, which leaves room for both."""
    about = f"{row['what it is']} ({row['allowed']})" if row["what it is"] else row["allowed"]
    return {"key": row["key"], "default": row["default"], "what it is (what is allowed)": about}


def _as_written(value: Any) -> str:
    """A value as a study writes it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _allowed(field: Any) -> str:
    """What a field of a configuration takes, in words."""
    kinds = [kind for kind in get_args(field.annotation) if kind is not NoneType] or [field.annotation]
    optional = NoneType in get_args(field.annotation)
    if get_origin(field.annotation) is Literal:
        return ", ".join(map(_as_written, get_args(field.annotation)))
    words: list[str] = []
    for kind in kinds:
        if get_origin(kind) is Literal:
            words += map(_as_written, get_args(kind))
        else:
            words.append({bool: "true, false", int: "whole number", float: "number", str: "text"}.get(kind, "see docs"))
    ends = {"ge": "from {:g}", "gt": "above {:g}", "le": "to {:g}", "lt": "below {:g}"}
    limits = [
        text.format(float(getattr(one, name)))
        for one in field.metadata
        for name, text in ends.items()
        if getattr(one, name, None) is not None
    ]
    return " ".join([", ".join(words), *limits]) + (" or none" if optional else "")


def _named() -> dict[str, list[dict[str, str]]]:
    """What there is of everything that a study names, by the title of its table."""
    from bench.data.task import tasks  # start-up
    from bench.evaluate.rules import rules  # start-up
    from bench.exits.policy import POLICIES  # start-up
    from bench.model.gates import NONE, gates  # start-up
    from bench.model.named import NAMED  # start-up
    from bench.model.variant import variants  # start-up
    from bench.study.load import load_study, study_names  # start-up

    found: dict[str, list[dict[str, str]]] = {}
    for title, registry in (("Variants", variants), ("Tasks", tasks)):
        kinds: dict[str, Any] = {name: registry.get(name) for name in registry.names()}
        found[title] = [
            {"name": name, "what it is": _first_sentence(kind), "options = default": _options(kind.Options)}
            for name, kind in kinds.items()
        ]
    found["Names of a variant with a shape and a training of its own"] = [
        {"name": name, "what it is": named.about, "variant": ", ".join([named.variant, *_fields(named)])}
        for name, named in sorted(NAMED.items())
    ]
    found["Exit rules (--rule, --exit)"] = [
        {
            "name": name,
            "what it is": _first_sentence(rules.get(name)),
            "leaves where it is": rules.get(name).leave,
            "aggregates": ", ".join(rules.get(name).aggregates),
        }
        for name in rules.names()
    ]
    found["Gates (options.gating)"] = [
        {"name": NONE, "what it is": "No gate: updates are added as in a plain block."},
        *({"name": name, "what it is": _first_sentence(gates.get(name))} for name in gates.names()),
    ]
    found["KV policies of early exits in generation (--kv)"] = [
        {"name": name, "what becomes of skipped slots": about} for name, about in POLICIES.items()
    ]
    found["Studies"] = [{"name": name, "question": load_study(name).question} for name in study_names()]
    return found


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
    imports: Imports = None,
    as_json: Json = False,
) -> None:
    """Parameters, FLOPs and memory of variants side by side, with what the zero token and the gate add.

    For example: cyclebench profile htc ztt --set model.d_model=256 --set variants.ztt.options.gating=none
    """
    starting("loading variants")
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
    table = [
        {"": key, **{label: rows.get(key, "-") for label, rows in columns}}
        for key in dict.fromkeys(key for _, rows in columns for key in rows)
    ]
    if as_json:
        tell_json({label: rows for label, rows in columns})
        return
    title = f"{found[0].model.family}, {length} tokens, vocabulary {vocab_size}"
    show(title, table if fits(table) else [{"variant": label, **rows} for label, rows in columns])


def costs_(
    study: StudyName,
    overrides: Overrides = None,
    preset: Preset = None,
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of timed training steps for each variant.")] = 20,
    batch: Annotated[int, typer.Option(min=1, help="Sequences in a timed step.")] = 4,
    out: Annotated[
        Path | None, typer.Option("--out", help=f"Folder of the table. Default: {DEFAULT_RUNS}/reports/costs/STUDY.")
    ] = None,
    imports: Imports = None,
) -> None:
    """What each variant of a study adds to its reference: parameters, FLOPs, memory, and step time as measured.

    For example: cyclebench costs additions
    """
    starting(f"measuring what the variants of {study} cost")
    from bench.perf.additions import cost_rows, shown, write_costs  # start-up
    from bench.store.files import check_folder  # start-up
    from bench.study.load import load_study  # start-up
    from bench.study.plan import make_plan  # start-up
    from bench.train.device import environment_of  # start-up

    check_folder(out)
    chosen = load_study(study, overrides or (), preset)
    place = environment_of(make_plan(chosen, command_line(), None).cells[0].cell.train).dump()
    rows = cost_rows(chosen, rounds, batch)
    tables = [shown(row) for row in rows]
    show(f"{chosen.name}: what is added to {chosen.reference}", tables)
    folder = out if out is not None else DEFAULT_RUNS / "reports" / "costs" / chosen.name
    for path in write_costs(chosen, rows, batch, command_line(), place, folder):
        print(path)


def _fields(named: Named) -> list[str]:
    """What an entry by this name says of the model and of its training."""
    told = {"model": named.model, "train": named.train}
    return [f"{group}.{key}={value}" for group, given in told.items() for key, value in given.items()]


def _first_sentence(kind: type) -> str:
    text = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
    end = re.search(r"(?<!et al)\. (?=[A-Z])", text)  # a sentence begins with a capital letter
    return text if end is None else text[: end.start() + 1]


def _options(kind: Any) -> str:
    """The fields of an options model as ``name=default``, one a line."""
    fields: Iterable[tuple[str, Any]] = kind.model_fields.items()
    return "\n".join(f"{name}={'(required)' if field.is_required() else field.get_default()}" for name, field in fields)
