"""What a study file says: a question, its variants, tasks, seeds and hypotheses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from bench.config import ModelConfig, Strict, TrainConfig, parse
from bench.errors import UserError, from_validation, unknown
from bench.hypotheses import Hypothesis, check_labels

ADDRESSES = ("label", "name", "claim")  # how ``--set`` calls an entry of a list


class Entry(Strict):
    """One row of ``tasks`` or ``variants``; a bare name stands for itself.

    label: how reports call it, its name by default; model, train: fields that differ from the study's.
    """

    name: str
    label: str = ""
    options: dict[str, Any] = Field(default_factory=dict)
    model: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        value = {"name": value} if isinstance(value, str) else value
        if isinstance(value, dict) and not value.get("label"):
            return {**value, "label": value.get("name", "")}
        return value


class TaskEntry(Entry):
    """A task with its options."""


class VariantEntry(Entry):
    """A variant with its options; match: what is held equal to the study's reference variant."""

    match: Literal["params", "flops", "depth"] | None = None


class Study(Strict):
    """A question, its cells (variants x tasks x seeds) and what they share. ``seeds: n`` means 0 to n - 1."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    question: str
    reference: str | None = None
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    tasks: tuple[TaskEntry, ...] = Field(min_length=1)
    variants: tuple[VariantEntry, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    hypotheses: tuple[Hypothesis, ...] = ()

    @field_validator("seeds", mode="before")
    @classmethod
    def _seeds(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            if value < 1:
                raise ValueError("must be at least 1, or a list of seeds")
            return tuple(range(value))
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds = {list(self.seeds)} must be different and not negative")
        for field, entries in (("tasks", self.tasks), ("variants", self.variants)):
            labels = [entry.label for entry in entries]
            for label in labels:
                if labels.count(label) > 1:
                    raise ValueError(f"{field}: label {label!r} stands twice; give each entry a label of its own")
        labels = [entry.label for entry in self.variants]
        if self.reference is not None and self.reference not in labels:
            raise ValueError(f"reference = {self.reference!r} must be one of the variants' labels: {', '.join(labels)}")
        if self.reference is None and any(entry.match for entry in self.variants):
            raise ValueError("match needs the study's reference: the label of the variant to match")
        try:
            check_labels(self.hypotheses, labels, [entry.label for entry in self.tasks])
        except UserError as error:
            raise ValueError(str(error)) from None
        return self

    def cell_model(self, variant: VariantEntry, task: TaskEntry) -> ModelConfig:
        """The shape of a cell: the study's, changed by the task, then by the variant."""
        return _merge(self.model, "model", variant, task)

    def cell_train(self, variant: VariantEntry, task: TaskEntry) -> TrainConfig:
        """The training of a cell: the study's, changed by the task, then by the variant."""
        return _merge(self.train, "train", variant, task)


def _merge(base: Any, field: str, variant: VariantEntry, task: TaskEntry) -> Any:
    changes = {**getattr(task, field), **getattr(variant, field)}
    where = f"variants.{variant.label}.{field}" if getattr(variant, field) else f"tasks.{task.label}.{field}"
    return parse(type(base), {**base.model_dump(), **changes}, where if changes else field)


def study_names() -> list[str]:
    """The studies that come with the suite."""
    return sorted(path.name.removesuffix(".yaml") for path in files("studies").iterdir() if path.name.endswith(".yaml"))


def load_study(source: str, overrides: Sequence[str] = ()) -> Study:
    """A study from a YAML file or by the name of one that comes with the suite, with ``key=value`` overrides applied.

    Raises UserError, in one line, for whatever is wrong in the file or the overrides.
    """
    if source.endswith((".yaml", ".yml")) or "/" in source:
        path = Path(source)
        if not path.is_file():
            raise UserError(f"study file {source!r} does not exist")
        text = _read(path)
    elif source in study_names():
        text = files("studies").joinpath(f"{source}.yaml").read_text(encoding="utf-8")
    else:
        raise unknown("study", source, study_names())
    return study_from(_load_yaml(text, source), overrides, source)


def study_from(raw: Any, overrides: Sequence[str], where: str) -> Study:
    """A study from the mapping a file holds. where: what messages call it."""
    if not isinstance(raw, dict):
        raise UserError(f"{where}: a study must be a mapping of keys, not {type(raw).__name__}")
    for override in overrides:
        _override(raw, override)
    try:
        study = Study.model_validate(raw)
    except ValidationError as error:
        raise _study_error(where, error) from None
    for task in study.tasks:
        for variant in study.variants:
            study.cell_model(variant, task)
            study.cell_train(variant, task)
    return study


def _study_error(where: str, error: ValidationError) -> UserError:
    """The first complaint, with the fields of the part it is about as suggestions."""
    location = error.errors()[0]["loc"]
    parts: dict[str, type[Strict]] = {
        "model": ModelConfig,
        "train": TrainConfig,
        "tasks": TaskEntry,
        "variants": VariantEntry,
        "hypotheses": Hypothesis,
    }
    kind = parts.get(str(location[0]), Study) if len(location) > 1 else Study
    return from_validation(where, error, kind.model_fields)


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice instead of keeping the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _load_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"study file {str(path)!r} cannot be read as UTF-8 text: {error}") from None


def _override(raw: dict[str, Any], override: str) -> None:
    """Set ``a.b.c=value`` in the mapping; entries of a list are addressed by their label, name or claim."""
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise UserError(f"--set {override!r} must be KEY=VALUE, for example train.steps=100")
    value = _load_yaml(text, f"--set {override}")
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
        case ["model"] | ["tasks" | "variants", _, "model"]:
            return list(ModelConfig.model_fields)
        case ["train"] | ["tasks" | "variants", _, "train"]:
            return list(TrainConfig.model_fields)
        case ["tasks", _]:
            return list(TaskEntry.model_fields)
        case ["variants", _]:
            return list(VariantEntry.model_fields)
        case ["hypotheses", _]:
            return list(Hypothesis.model_fields)
        case _:
            return None
