"""What ``--set`` has changed of a study, and what the study is called then.

As it is written, a study has its own name. Changed, it is a run of its own beside that one: its name ends in a digest
of what differs, so that neither overwrites the other's manifest, report or tracking, and the same change, written in
the same way, has the same name whenever it is asked for. More seeds change nothing: they are added to the study.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel

from bench.config import FIRST_PILOT

DIGITS = 8  # of the digest
NAME = rf"[a-z0-9][a-z0-9_-]*(\+[0-9a-f]{{{DIGITS}}}(-[a-z]+)?)?"
"""A study's name, with what follows it where the study is changed, and the part of a run that it is of."""
LONGEST_NAME = 120  # letters: it becomes a folder's
ADDRESSES = ("label", "name", "claim")  # how ``--set`` calls an entry of a list
ASIDE = ("name", "seeds", "imports")  # what changes neither a cell nor what is concluded from cells
NOTHING = "not given"
LONGEST = 80  # letters of a value that are told

Pair = tuple[Any, Any]
"""A part of the study as it is written, and of the study as it is now."""


class Change(NamedTuple):
    """One field by its dotted key: what it is now, and what it is as written, None where that is not known."""

    key: str
    now: str
    written: str | None

    def __str__(self) -> str:
        before = "" if self.written is None else f" (as written: {shorten(self.written)})"
        return f"{self.key}={shorten(self.now)}{before}"


def shorten(text: str) -> str:
    """A value as it is told."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def base_of(name: str) -> str:
    """The name of the study that a run is of."""
    return name.partition("+")[0]


def name_of(name: str, changes: Iterable[Change]) -> str:
    """What a study of that name, which may have been changed before, is called with these changes."""
    base, _, before = name.partition("+")
    told = sorted([change.key, change.now] for change in changes)
    if not told:
        return name
    digest = hashlib.sha256(json.dumps([before, told] if before else told).encode()).hexdigest()
    return f"{base}+{digest[:DIGITS]}"


def changes_between(written: BaseModel, now: BaseModel) -> tuple[Change, ...]:
    """What differs between two studies. What both leave at its default does not count, so that a new field of a later
    version changes no name.
    """
    told, whole = zip(*((s.model_dump(exclude_defaults=True), s.model_dump()) for s in (written, now)), strict=True)
    found = [
        Change(".".join(path), _text(after), _text(before))
        for path, before, after in _differences(told, whole, ())
        if path[0] not in ASIDE
    ]
    pilots = ["pilots" if all(seed >= FIRST_PILOT for seed in study["seeds"]) else "no pilots" for study in whole]
    if pilots[0] != pilots[1]:  # they are never mixed: a study's verdicts are not given on pilots
        found.append(Change("seeds", pilots[1], pilots[0]))
    return tuple(found)


def changes_typed(overrides: Sequence[str]) -> tuple[Change, ...]:
    """The same by the overrides alone, of a study that is none without them."""
    typed = dict(override.partition("=")[::2] for override in overrides)
    return tuple(Change(key, text, None) for key, text in typed.items() if key not in ASIDE)


def _differences(told: Pair, whole: Pair, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """The smallest parts that differ, as written and now.

    Args:
        told: the two studies without what is at its default.
        whole: the two studies with that.
        path: of the part that they are.
    """
    parts, all_parts = ([_parts(value) for value in pair] for pair in (told, whole))
    if None not in all_parts and any(all_parts):
        for key in dict.fromkeys(key for part in parts for key in part or ()):
            below = [tuple((part or {}).get(key, NOTHING) for part in pair) for pair in (parts, all_parts)]
            yield from _differences(below[0], below[1], (*path, key))
    elif told[0] != told[1]:
        before, after = (a if isinstance(a, Mapping) else b for a, b in zip(told, whole, strict=True))
        yield path, before, after


def _parts(value: Any) -> Mapping[str, Any] | None:
    """What ``--set`` addresses below a value: fields, or the entries of a list by labels of their own."""
    if isinstance(value, Mapping):
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(entry, Mapping) for entry in value):
        return None
    labels = [address(entry) for entry in value]
    return dict(zip(labels, value, strict=True)) if len(set(labels)) == len(labels) else None


def address(entry: Mapping[str, Any]) -> str:
    """How ``--set`` calls an entry of a list."""
    return next((str(entry[key]) for key in ADDRESSES if entry.get(key)), "")


def _text(value: Any) -> str:
    """A value as it may be given to ``--set``."""
    try:
        return value if isinstance(value, str) else json.dumps(value, default=str)
    except (TypeError, ValueError):  # keys that are no text, numbers too long to be written
        return type(value).__name__
