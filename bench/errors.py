"""Errors a user can cause, each told in one line."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from pydantic import ValidationError


class UserError(Exception):
    """Bad input. The message is one line: the field, the value, what is allowed. The CLI exits with status 2."""

    def __init__(self, message: str) -> None:
        """message: made one line, whatever the input that it quotes contains."""
        super().__init__(" ".join(message.splitlines()))


class CellError(Exception):
    """A cell cannot go on (for example: its loss is not finite). Recorded with its reason; the study continues."""


class RankError(Exception):
    """Another process of the cell has failed, for a reason, of a kind and with a traceback as in a failure's record."""

    def __init__(self, reason: str, kind: str, trace: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.kind, self.trace = reason, kind, trace


def unknown(kind: str, value: object, allowed: Iterable[str]) -> UserError:
    """An error for a name that is not registered, with the nearest name that is."""
    names = sorted(allowed)
    near = get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown {kind} {value!r}{hint} (allowed: {', '.join(names) or 'none'})")


def from_validation(where: str, error: ValidationError, fields: Iterable[str] = ()) -> UserError:
    """The first complaint of a pydantic error as one line.

    where: what was being read, e.g. ``"model"``; fields: the valid field names, to suggest the nearest one.
    """
    first = error.errors()[0]
    path = ".".join(str(part) for part in (where, *first["loc"]) if part != "")
    if first["type"] == "extra_forbidden":
        return unknown(f"key in {where or 'the study'}:", first["loc"][-1], fields)
    if first["type"] == "missing":
        return UserError(f"{path} is required and not given")
    message = first["msg"].removeprefix("Value error, ")
    given = "" if isinstance(first["input"], dict) else f" (got {first['input']!r})"
    return UserError(f"{path}: {message}{given}")
