"""``--set key=value``: anything in a mapping, by a dotted key."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.config import EvalConfig, ModelConfig, TrainConfig
from bench.errors import UserError, shown, unknown
from bench.study.decide import Decide
from bench.study.harness import HarnessEntry
from bench.study.hypotheses import Hypothesis
from bench.study.naming import ADDRESSES, address
from bench.study.schema import Study, TaskEntry, Tune, VariantEntry
from bench.study.sweep import BudgetSweep, Sweep, ThresholdSweep
from bench.study.yaml_text import parse_yaml


@dataclass(frozen=True)
class Keys:
    """What a command's ``--set`` may set.

    below: the fields below a dotted path, None where anything may stand (options, checked by whoever owns them);
    example: an override that is right, for messages.
    """

    below: Callable[[Sequence[str]], Iterable[str] | None]
    example: str

    def check(self, parents: Sequence[str], last: str) -> None:
        """Raises UserError, with the nearest key, if ``last`` is no field below its parents."""
        allowed = self.below(parents)
        if allowed is not None and last not in (names := list(allowed)):
            key, keys = ".".join([*parents, last]), [".".join([*parents, name]) for name in names]
            raise unknown("key in --set:", key, keys)


def _below_study(parents: Sequence[str]) -> Iterable[str] | None:
    match list(parents):
        case []:
            return Study.model_fields
        case ["tune"]:
            return Tune.model_fields
        case ["decide"]:
            return Decide.model_fields
        case ["sweep"]:
            return Sweep.model_fields
        case ["sweep", "thresholds"]:
            return ThresholdSweep.model_fields
        case ["sweep", "budgets"]:
            return BudgetSweep.model_fields
        case ["model"] | ["tasks" | "variants", _, "model"]:
            return ModelConfig.model_fields
        case ["train"] | ["tasks" | "variants", _, "train"]:
            return TrainConfig.model_fields
        case ["evaluation"]:
            return EvalConfig.model_fields
        case ["tasks", _]:
            return TaskEntry.model_fields
        case ["variants", _]:
            return VariantEntry.model_fields
        case ["harness", _]:
            return HarnessEntry.model_fields
        case ["hypotheses", _]:
            return Hypothesis.model_fields
        case _:
            return None


OF_STUDY = Keys(_below_study, "train.steps=100")


def apply_override(raw: dict[str, Any], override: str, keys: Keys = OF_STUDY) -> None:
    """Set ``a.b.c=value`` in the mapping; entries of a list are addressed by their label, name or claim.

    Raises UserError, in one line, for what is no such text, for a key that ``keys`` does not know, and for bad YAML.
    """
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise UserError(f"--set {shown(override)} must be KEY=VALUE, for example {keys.example}")
    value = parse_yaml(text, f"--set {shown(override)}")
    *parents, last = key.split(".")
    here: Any = raw
    for depth, part in enumerate(parents):
        here = _descend(here, part, parents[:depth], keys)
    if isinstance(here, list):
        raise UserError(
            f"--set {shown(override)}: {key} is an entry; set one of its fields, for example {key}.options.NAME=VALUE"
        )
    keys.check(parents, last)
    here[last] = value


def _descend(here: Any, part: str, parents: Sequence[str], keys: Keys) -> Any:
    """The mapping or list that one part of a dotted key leads to, made where it may be."""
    path = ".".join([*parents, part])
    if isinstance(here, list):
        named = [entry if isinstance(entry, Mapping) else {"name": entry} for entry in here]
        meant = [n for n, entry in enumerate(named) if address(entry) == part]
        meant = meant or [n for n, entry in enumerate(named) if part in [entry.get(key) for key in ADDRESSES]]
        labels = [".".join([*parents, address(entry)]) for entry in named]
        if not meant:
            raise unknown("label in --set:", path, labels)
        if len(meant) > 1:
            raise UserError(f"--set: {path} is the name of {len(meant)} entries (allowed: {', '.join(labels)})")
        here[meant[0]] = named[meant[0]]
        return named[meant[0]]
    if part not in here or here[part] is None:
        keys.check(parents, part)
        here[part] = {}
    if not isinstance(here[part], dict | list):
        raise UserError(f"--set: {path} is a value ({shown(here[part])}), not a group of fields")
    return here[part]
