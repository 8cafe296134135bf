"""From a file, a preset and overrides to a study, or to one line that says what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bench.config import CyclesSchedule, EvalConfig, ModelConfig, RopeScaling, Strict, TrainConfig
from bench.errors import UserError, from_validation, unknown
from bench.house import STUDIES
from bench.plugins import import_files
from bench.store.manifest import SWEPT, TUNING
from bench.study.decide import Decide
from bench.study.harness import HarnessEntry
from bench.study.hypotheses import Hypothesis
from bench.study.naming import NOTHING, Change, changes_between, changes_typed, shorten
from bench.study.overrides import apply_override
from bench.study.schema import Study, TaskEntry, Tune, VariantEntry
from bench.study.sweep import BudgetSweep, Sweep, ThresholdSweep
from bench.study.yaml_text import parse_yaml

DEFAULT_PRESET = "small"


def study_names() -> list[str]:
    """The studies that come with the suite."""
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))


def names_a_study(source: str) -> bool:
    """Whether ``load_study`` takes it for a file, or for a study that comes with the suite."""
    return _is_file(source) or source in study_names()


def _is_file(source: str) -> bool:
    return source.endswith((".yaml", ".yml")) or "/" in source


def load_study(source: str, overrides: Sequence[str] = (), preset: str | None = None) -> Study:
    """A study from a YAML file or by the name of one that comes with the suite, at one of its presets (``small`` if it
    has it), with ``key=value`` overrides applied.

    Raises UserError, in one line, for whatever is wrong in the file or the overrides.
    """
    path: Path | None = None
    if _is_file(source):
        path = Path(source)
        if not path.is_file():
            raise UserError(f"study file {source!r} does not exist")
        text = _read(path)
    elif source in study_names():
        text = _read(STUDIES / f"{source}.yaml")
    else:
        raise unknown("study", source, study_names())
    return study_from(parse_yaml(text, source), overrides, source, preset, path.parent if path is not None else None)


def study_from(
    raw: Any, overrides: Sequence[str], where: str, preset: str | None = None, folder: Path | None = None
) -> Study:
    """A study from the mapping a file holds. What its ``imports`` name is imported first.

    Args:
        raw: the mapping.
        overrides: ``key=value`` each.
        where: what messages call the study.
        preset: one of the study's presets.
        folder: that relative paths of ``imports`` start from, by default the working folder.

    Raises:
        UserError: one line that says what is wrong.
    """
    if not isinstance(raw, dict):
        raise UserError(f"{where}: a study must be a mapping of keys, not {type(raw).__name__}")
    raw = at_preset(deepcopy(raw), preset, where)  # what the caller holds stays as it is
    if isinstance(overrides, str):
        raise UserError(f"set: {overrides!r} is one text (allowed: a list of KEY=VALUE)")
    written = deepcopy(raw) if overrides else raw
    for override in overrides:
        apply_override(raw, override)
    if isinstance(imports := raw.get("imports"), list) and all(isinstance(path, str) for path in imports):
        raw["imports"] = [str(((folder or Path()) / path).resolve()) for path in imports]
        import_files(raw["imports"], f"{where}: imports")
    try:
        study = Study.model_validate(raw)
    except ValidationError as error:
        raise _study_error(where, error) from None
    if study.name.endswith((TUNING, SWEPT)):
        raise UserError(
            f"{where}: name = {study.name!r} (allowed: no {TUNING} or {SWEPT} at its end: a study's trials)"
        )
    for task in study.tasks:
        for variant in study.variants:
            study.cell_model(variant, task)
            study.cell_train(variant, task)
    return study.as_changed(_changes(written, study, overrides)) if overrides else study


def _changes(written: dict[str, Any], study: Study, overrides: Sequence[str]) -> tuple[Change, ...]:
    """What the overrides have changed of the study as it is written."""
    try:
        return changes_between(Study.model_validate(written), study)
    except (ValidationError, UserError):  # it lacks something that the overrides give
        return changes_typed(overrides)


def _study_error(where: str, error: ValidationError) -> UserError:
    """The first complaint, with the fields of the part it is about as suggestions."""
    location = error.errors()[0]["loc"]
    parts: dict[str, type[Strict]] = {
        "model": ModelConfig,
        "model.rope_scaling": RopeScaling,
        "train": TrainConfig,
        "train.cycles_schedule": CyclesSchedule,
        "evaluation": EvalConfig,
        "tasks": TaskEntry,
        "variants": VariantEntry,
        "harness": HarnessEntry,
        "hypotheses": Hypothesis,
        "tune": Tune,
        "decide": Decide,
        "sweep": Sweep,
        "sweep.thresholds": ThresholdSweep,
        "sweep.budgets": BudgetSweep,
    }
    kind = parts.get(str(location[0]), Study) if len(location) > 1 else Study
    kind = parts.get(".".join(map(str, location[:2])), kind) if len(location) > 2 else kind
    return from_validation(where, error, [*kind.model_fields, *(["presets"] if kind is Study else [])])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"study file {str(path)!r} cannot be read as UTF-8 text: {error}") from None


def at_preset(raw: dict[str, Any], preset: str | None, where: str) -> dict[str, Any]:
    """The study's mapping with a preset merged over it: mappings key by key, anything else replaced.

    A study at another preset than ``small`` is a study of its own: its name ends in the preset's, so that their
    results stand side by side. Raises UserError for a preset that is not there or changes what the presets share.
    """
    presets = {} if raw.get("presets") is None else raw["presets"]
    if not isinstance(presets, dict) or not all(isinstance(part, dict) for part in presets.values()):
        raise UserError(f"{where}: presets must be a mapping of names to parts of a study")
    if preset is not None and preset not in presets:
        raise unknown(f"preset of {where}:", preset, presets)
    base = {key: value for key, value in raw.items() if key != "presets"}
    chosen = preset or (DEFAULT_PRESET if DEFAULT_PRESET in presets else None)
    if chosen is None:
        return base
    for key in ("name", "presets"):
        if key in presets[chosen]:
            raise UserError(f"{where}: presets.{chosen}.{key}: a preset cannot change the study's {key}")
    if chosen != DEFAULT_PRESET and "name" in base:
        base["name"] = f"{base['name']}-{chosen}"
    return _merged(base, presets[chosen])


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    both = {key for key in changes if isinstance(base.get(key), dict) and isinstance(changes[key], dict)}
    return {**base, **changes, **{key: _merged(base[key], changes[key]) for key in both}}


def said_since(config: Mapping[str, Any], study: Study) -> list[str]:
    """What a study says by now and did not when it was run with a configuration (``Manifest.config``)."""
    try:
        changes = changes_between(Study.model_validate(config), study)
    except (ValidationError, UserError):  # as an earlier version wrote it
        return []
    before = ((change, NOTHING if change.written is None else shorten(change.written)) for change in changes)
    return [f"{change.key}={shorten(change.now)} (when it was run: {written})" for change, written in before]
