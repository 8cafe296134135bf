"""The pages of the site that are made from the code and from published results, when the site is built.

mkdocs calls ``on_files`` (a hook, see mkdocs.yml). Nothing of this is committed, so that it cannot be out of date. The
pages are made without mkdocs, for the tests.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import typer
from model_fields import field_table, fields, inside, plain, prose, table

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "reports" / "published"
GENERATED = "<!-- made by docs/reference.py -->\n"


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs: add what is made to the files of the site."""
    from mkdocs.structure.files import File  # optional

    for path, content in pages().items():
        files.append(File.generated(config, path, content=content))
    for path, source in pictures().items():
        files.append(File.generated(config, path, abs_src_path=str(source)))
    return files


def pages() -> dict[str, str]:
    """Every page that is made, by its path under docs/; the JSON schema of a study too."""
    return {
        "reference/cli.md": commands(),
        "reference/study.md": study_keys(),
        "reference/study.schema.json": json.dumps(study_schema(), indent=1),
        "reference/variants.md": variants(),
        "reference/tasks.md": tasks(),
        "reference/rules.md": rules(),
        "reference/gates.md": gates(),
        "reference/metrics.md": metrics(),
        "reference/records.md": records(),
        "reference/python.md": python(),
        "findings.md": findings(),
    }


def commands() -> str:
    """The command line."""
    from bench.cli import app

    group = typer.main.get_command(app)
    text = [f"{GENERATED}# Command line\n\nAs `cyclebench --help` and `cyclebench COMMAND --help` tell it.\n"]
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
        options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
        usage = " ".join(["cyclebench", name, "[OPTIONS]", *map(_metavar, arguments)])
        text.append(f"## {name}\n\n```text\n{usage}\n```\n\n{prose(command.help)}\n")
        rows = [[f"`{_metavar(parameter)}`", "", prose(parameter.help)] for parameter in arguments]
        for option in options:
            rows.append([", ".join(f"`{flag}`" for flag in option.opts), _given(option.default), prose(option.help)])
        text.append(table(["argument or option", "default", "what it is"], rows))
    return "\n".join(text)


def _metavar(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper()) + (" ..." if parameter.nargs == -1 else "")


def _given(value: Any) -> str:
    value = getattr(value, "value", value)
    return "" if value is None or value is False or callable(value) else f"`{value}`"


def study_keys() -> str:
    """Every key of a study."""
    from bench.study.schema import Study

    text = [
        f"{GENERATED}# Keys of a study\n",
        "A study is a YAML file. These are all its keys. A cell is one variant trained on one task with one seed (see "
        "the [glossary](../glossary.md)).\n",
        "Editors complete and check studies by the [JSON schema](study.schema.json): put it beside your study and "
        "begin the study with\n\n```yaml\n# yaml-language-server: $schema=study.schema.json\n```\n",
        "Beside these keys a study may have `presets`: a mapping of names to parts of a study, which "
        "`--preset NAME` merges over it. `none` switches off what may be none.\n",
    ]
    for name, kind in inside(Study).items():
        text.append(f"## {name}\n\n{plain(kind.__doc__)}\n\n{field_table(kind)}")
    return "\n".join(text)


def study_schema() -> dict[str, Any]:
    """The JSON schema of a study as it may be written: with short forms, presets, designs and ``none``."""
    from bench.study.load import DEFAULT_PRESET
    from bench.study.schema import MOST_SEEDS, SEED_RANGE, Study

    schema: dict[str, Any] = _written(Study.model_json_schema())
    kinds, parts = inside(Study), schema["$defs"]
    for name, part in [("Study", schema), *parts.items()]:
        for key, _, _, text in fields(kinds[name]):
            part["properties"][key]["description"] = text
        part.pop("required", None) if name.endswith("Entry") else None
    for name in ("TaskEntry", "VariantEntry", "HarnessEntry"):
        parts[name]["required"] = ["name"]
    for name in ("TaskEntry", "VariantEntry"):
        for key in ("model", "train"):
            parts[name]["properties"][key] |= {"$ref": f"#/$defs/{key.capitalize()}Config"}
            parts[name]["properties"][key].pop("default", None)
    for key, name in (("tasks", "TaskEntry"), ("variants", "VariantEntry"), ("harness", "HarnessEntry")):
        schema["properties"][key]["items"] = {"anyOf": [{"type": "string"}, {"$ref": f"#/$defs/{name}"}]}
    seeds = schema["properties"]["seeds"]
    schema["properties"]["seeds"] = {
        "description": seeds.pop("description"),
        "anyOf": [
            {"type": "integer", "minimum": 1, "maximum": MOST_SEEDS},
            {"type": "string", "pattern": SEED_RANGE},
            seeds,
        ],
    }
    schema["required"] = [key for key in schema["required"] if key != "seeds"]
    part = {**schema, "properties": {key: value for key, value in schema["properties"].items() if key != "name"}}
    parts["Preset"] = {key: part[key] for key in ("type", "properties", "additionalProperties")}
    schema["properties"]["presets"] = {
        "type": "object",
        "description": f"The same study at other sizes, by name: merged over it. {DEFAULT_PRESET} is the default.",
        "additionalProperties": {"$ref": "#/$defs/Preset"},
    }
    some = [key for key in schema["required"] if key not in ("name", "question")]
    schema["required"] = [key for key in schema["required"] if key not in some]
    schema["anyOf"] = [{"required": some}, {"required": ["presets"]}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "A study of cyclebench"}


def _written(schema: Any) -> Any:
    """A schema that lets the text ``none`` through wherever nothing is allowed."""
    if isinstance(schema, list):
        return [_written(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _written(part) for key, part in schema.items()}
    if isinstance(made.get("anyOf"), list) and {"type": "null"} in made["anyOf"]:
        made["anyOf"].append({"const": "none"})
    return made


def variants() -> str:
    """Every variant with its options and its source."""
    from bench.model.variant import variants as registry
    from bench.study.catalogue import variant_table

    text = [
        f"{GENERATED}# Variants\n\nA variant is a way of reusing blocks. How to add one: "
        "[a variant](../howto/variant.md).\n",
        "\n".join(variant_table()) + "\n",
    ]
    for name, kind in sorted(registry.items().items()):
        source = plain(inspect.getmodule(kind).__doc__)  # type: ignore[union-attr]
        text.append(f"## {name}\n\n{plain(kind.__doc__)}\n\n{source}\n\n{field_table(kind.Options)}")
    return "\n".join(text)


def tasks() -> str:
    """Every task with its options."""
    from bench.data.task import tasks as registry

    text = [
        f"{GENERATED}# Tasks\n\nWhat models are trained and judged on. How to add one: [a task](../howto/task.md).\n"
    ]
    for name, kind in sorted(registry.items().items()):
        source = plain(inspect.getmodule(kind).__doc__)  # type: ignore[union-attr]
        text.append(f"## {name}\n\n{plain(kind.__doc__)}\n\n{source}\n\n{field_table(kind.Options)}")
    return "\n".join(text)


def rules() -> str:
    """Every exit rule."""
    from bench.evaluate.rules import rules as registry

    rows = []
    for name, kind in sorted(registry.items().items()):
        keys = [kind(aggregate).key for aggregate in kind.aggregates]
        reads = [
            what
            for what, read in (("predictions", kind.reads_logits), ("zero attention", kind.reads_zero_attention))
            if read
        ]
        leave = "at or above" if kind.leave == "above" else "at or below"
        rows.append(
            [
                f"`{name}`",
                ", ".join(f"`{key}`" for key in keys),
                leave,
                ", ".join(reads) or "the state",
                plain(kind.__doc__),
            ]
        )
    head = ["rule", "keys", "leaves where its signal is", "reads", "signal"]
    return (
        f"{GENERATED}# Exit rules\n\nA rule makes a signal at every exit point and leaves by a threshold. A key names "
        "a rule and how the signals of tokens become that of their sequence (the mean, or what "
        "stands behind the point). The costs of what a rule reads are counted. How to add one: "
        f"[an exit rule](../howto/rule.md).\n\n{table(head, rows)}"
    )


def gates() -> str:
    """Every gate."""
    from bench.model.gates import gates as registry

    rows = [[f"`{name}`", plain(kind.__doc__)] for name, kind in sorted(registry.items().items())]
    return (
        f"{GENERATED}# Gates\n\nHow the update of a step is merged into the residual stream: option `gating` of "
        f"[`ztt`](variants.md#ztt), or `none`. How to add one: [a gate](../howto/gate.md).\n\n"
        f"{table(['gate', 'what it does'], rows)}"
    )


METRICS = {
    "accuracy": "share of the scored targets that are predicted right; the default of generated tasks",
    "loss": "mean cross-entropy of a scored target, nats",
    "bits_per_byte": "cross-entropy over the bytes of the text, bits; the default of text",
    "flops_to": "training FLOPs until validation first reaches the score X; runs that never do are counted as such",
    "tokens_to": "training tokens until validation first reaches the score X",
    "area": "mean of the validation score over the tokens of the training",
}


def metrics() -> str:
    """What a hypothesis may be about."""
    from bench.evaluate.targets import COSTS
    from bench.study.hypotheses import AREA, BITS, HIGHER_IS_BETTER

    known = {**HIGHER_IS_BETTER, BITS: False}
    rows = [[f"`{name}`", "test", "more" if up else "less", METRICS[name]] for name, up in known.items()]
    rows += [[f"`{name}@X`", "validation", "less", METRICS[name]] for name in COSTS]
    rows.append([f"`{AREA}`", "validation", "as the task's own", METRICS[AREA]])
    return (
        f"{GENERATED}# Metrics\n\nWhat a hypothesis may be about (`metric:`). On a further test split, such as longer "
        "sequences, `accuracy@NAME` and `loss@NAME`. On a task of lm-evaluation-harness, its own metrics, such as "
        "`acc`.\n\n"
        f"{table(['metric', 'measured on', 'better is', 'what it is'], rows)}\n"
        "Results hold them as `test_accuracy`, `test_loss`, ... (see [records](records.md)).\n"
    )


def records() -> str:
    """What is stored of a cell."""
    from bench.store.records import Failure, Record

    text = [
        f"{GENERATED}# Records\n\nWhat is stored of a cell, in `runs/ID/`: `Record` of one that is "
        "finished, `Failure` of one that is not. FLOPs are per token unless the name says otherwise.\n"
    ]
    for name, kind in {**inside(Record), **inside(Failure)}.items():
        if not hasattr(kind, "root"):
            rows = field_table(kind) if kind.model_fields and "root" not in kind.model_fields else ""
            text.append(f"## {name}\n\n{plain(kind.__doc__)}\n\n{rows}")
    return "\n".join(text)


def python() -> str:
    """The public package, name by name."""
    import cyclebench

    text = [
        f"{GENERATED}# Python\n\nThe names of the package `cyclebench`. They are promised to stay; "
        "everything else may move.\n"
    ]
    for name in cyclebench.__all__:
        thing, (module, attribute) = getattr(cyclebench, name), cyclebench._PLACES[name]
        if inspect.ismethod(thing):  # of a registry
            kind = thing.__self__.kind
            text.append(f"## {name}\n\n`{name}{inspect.signature(thing)}`\n\nOf {kind}s. {prose(thing.__doc__)}\n")
            continue
        place = (
            f"{thing.__module__}.{thing.__qualname__}" if hasattr(thing, "__qualname__") else f"{module}.{attribute}"
        )
        text.append(f"::: {place}\n    options:\n      heading: {name}\n      toc_label: {name}\n")
    return "\n".join(text)


def findings() -> str:
    """What published studies have found, as ``cyclebench findings`` tells it, with their plots."""
    from reports.findings import page

    return f"{GENERATED}{page(PUBLISHED, 'published')}"


def _names() -> list[str]:
    return sorted(path.parent.name for path in PUBLISHED.glob("*/report.md"))


def _fronts(name: str) -> list[Path]:
    return sorted((PUBLISHED / name).glob("accuracy_vs_flops_*.png"))


def pictures() -> dict[str, Path]:
    """The pictures of the page of findings and of the first page, by path under docs/."""
    return {f"published/{name}/{picture.name}": picture for name in _names() for picture in _fronts(name)}
