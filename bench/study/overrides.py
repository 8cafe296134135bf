"""``--set key=value``: anything in a study's mapping, by a dotted key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.config import EvalConfig, ModelConfig, TrainConfig
from bench.errors import UserError, unknown
from bench.study.hypotheses import Hypothesis
from bench.study.schema import Study, TaskEntry, Tune, VariantEntry
from bench.study.sweep import BudgetSweep, Sweep, ThresholdSweep
from bench.study.yaml_text import parse_yaml

ADDRESSES = ("label", "name", "claim")  # how ``--set`` calls an entry of a list


def apply(raw: dict[str, Any], override: str) -> None:
    """Set ``a.b.c=value`` in the mapping; entries of a list are addressed by their label, name or claim."""
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise UserError(f"--set {override!r} must be KEY=VALUE, for example train.steps=100")
    value = parse_yaml(text, f"--set {override}")
    *parents, last = key.split(".")
    here: Any = raw
    for depth, part in enumerate(parents):
        here = _descend(here, part, ".".join(parents[: depth + 1]))
    if isinstance(here, list):
        raise UserError(
            f"--set {override!r}: {key} is an entry; set one of its fields, for example {key}.options.NAME=VALUE"
        )
    allowed = _allowed(parents)
    if allowed is not None and last not in allowed:
        raise unknown("key in --set:", key, [".".join([*parents, name]) for name in allowed])
    here[last] = value


def _descend(here: Any, part: str, path: str) -> Any:
    """The mapping or list that one part of a dotted key leads to, made where it may be."""
    if isinstance(here, list):
        for position, entry in enumerate(here):
            if isinstance(entry, str):
                entry = here[position] = {"name": entry}
            if isinstance(entry, Mapping) and part in [entry.get(key) for key in ADDRESSES]:
                labelled = [e for e in here if isinstance(e, Mapping) and e.get("label") == part]
                return labelled[0] if labelled else entry
        named = [entry if isinstance(entry, Mapping) else {"name": entry} for entry in here]
        labels = [next((entry[key] for key in ADDRESSES if entry.get(key)), "") for entry in named]
        raise unknown("label in --set:", path, [f"{path.rpartition('.')[0]}.{label}" for label in labels])
    if part not in here or here[part] is None:
        allowed = _allowed(path.split(".")[:-1])
        if allowed is not None and part not in allowed:
            raise unknown("key in --set:", path, [path.removesuffix(part) + name for name in allowed])
        here[part] = {}
    if not isinstance(here[part], dict | list):
        raise UserError(f"--set: {path} is a value ({here[part]!r}), not a group of fields")
    return here[part]


def _allowed(parents: Sequence[str]) -> list[str] | None:
    """The fields below a dotted path; None where anything may stand (options, checked by whoever owns them)."""
    match list(parents):
        case []:
            return list(Study.model_fields)
        case ["tune"]:
            return list(Tune.model_fields)
        case ["sweep"]:
            return list(Sweep.model_fields)
        case ["sweep", "thresholds"]:
            return list(ThresholdSweep.model_fields)
        case ["sweep", "budgets"]:
            return list(BudgetSweep.model_fields)
        case ["model"] | ["tasks" | "variants", _, "model"]:
            return list(ModelConfig.model_fields)
        case ["train"] | ["tasks" | "variants", _, "train"]:
            return list(TrainConfig.model_fields)
        case ["evaluation"]:
            return list(EvalConfig.model_fields)
        case ["tasks", _]:
            return list(TaskEntry.model_fields)
        case ["variants", _]:
            return list(VariantEntry.model_fields)
        case ["hypotheses", _]:
            return list(Hypothesis.model_fields)
        case _:
            return None
