"""Designs of experiments in a study's lists: one factor at a time, or every combination.

``changes`` gives the entry as it is and, for each value, the entry with that one change; ``grid`` gives the entry with
every combination of the values. The new entries are labelled by what differs: ``ztt gating=scalar``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from itertools import product
from typing import Any, TypeVar

from bench.errors import unknown
from bench.study.entries import Entry

MOST = 1000  # entries that one design may stand for
E = TypeVar("E", bound="Entry")


def expand(entries: Iterable[E]) -> tuple[E, ...]:
    """The entries, each with a design in the place of its own replaced by those it stands for.

    Raises ValueError, in one line, for a key that is no field of an entry, for no values and for two designs in one.
    """
    return tuple(made for entry in entries for made in _expand(entry))


def _expand(entry: E) -> Iterable[E]:
    if not entry.changes and not entry.grid:
        return [entry]
    if entry.changes and entry.grid:
        raise ValueError(f"{entry.label}: give changes (one at a time) or grid (all combinations), not both")
    for design in ("changes", "grid"):
        for key, values in getattr(entry, design).items():
            _check(entry, f"{entry.label}.{design}.{key}", key, values)
    made = 1 + sum(map(len, entry.changes.values())) if entry.changes else math.prod(map(len, entry.grid.values()))
    if made > MOST:
        raise ValueError(f"{entry.label}: the design stands for {made:,} entries (allowed: up to {MOST:,})")
    if entry.changes:
        settings = [{}, *({key: value} for key, values in entry.changes.items() for value in values)]
    else:
        settings = [dict(zip(entry.grid, values, strict=True)) for values in product(*entry.grid.values())]
    return [_changed(entry, setting) for setting in settings]


def _check(entry: Entry, where: str, key: str, values: list[Any]) -> None:
    groups = [name for name in ("options", "model", "train") if key.startswith(f"{name}.")]
    whole = [name for name in type(entry).model_fields if name == "match"]
    if not groups and key not in whole:
        allowed = [*whole, "options.NAME", "model.NAME", "train.NAME"]
        raise ValueError(str(unknown(f"key {where}:", key, allowed)).removeprefix("unknown "))
    if not values:
        raise ValueError(f"{where}: needs at least one value, not []")


def _changed(entry: E, setting: dict[str, Any]) -> E:
    fields = entry.model_dump(exclude={"changes", "grid"})
    for key, value in setting.items():
        group, _, name = key.partition(".")
        fields[group] = {**fields[group], name: value} if name else value
    fields["label"] = " ".join([entry.label, *(f"{key.rpartition('.')[2]}={_text(v)}" for key, v in setting.items())])
    return type(entry).model_validate(fields)


def _text(value: Any) -> str:
    """A value as it is read aloud."""
    return value if isinstance(value, str) else json.dumps(value)
