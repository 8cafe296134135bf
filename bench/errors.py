"""Errors a user can cause, each told in one line."""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Literal

from pydantic import ValidationError

LONGEST = 200  # characters of a value that messages quote
TYPES = {"int", "float", "bool", "str"}
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}


Fault = Literal["cell", "environment"]
"""Whose a failure is: of the cell, which would fail again, or of what it ran on (memory, disk, a killed process)."""


class UserError(Exception):
    """Bad input. The message is one line: the field, the value, what is allowed. The CLI exits with status 2."""

    def __init__(self, message: str) -> None:
        """message: made one line, whatever the input that it quotes contains."""
        super().__init__(" ".join(message.splitlines()))


class InputError(UserError, ValueError):
    """What a model cannot be called with. transformers and its users expect a ValueError there."""


class CellError(Exception):
    """A cell cannot go on (for example: its loss is not finite). Recorded with its reason; the study continues."""


class RankError(Exception):
    """Another process of the cell has failed, for a reason, of a kind and with a traceback as in a failure's record."""

    def __init__(self, reason: str, kind: Fault, trace: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.kind, self.trace = reason, kind, trace


def first_line(error: BaseException | str) -> str:
    """What an error says, in one line; its type where it says nothing, and '' for an empty text."""
    text = str(error).strip()
    if text:
        return text.splitlines()[0].rstrip()
    return "" if isinstance(error, str) else type(error).__name__


def typed_line(error: BaseException) -> str:
    """An error's type and what it says, in one line."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"


@contextmanager
def contained(what: str) -> Iterator[None]:
    """Tell whatever is raised inside in one line, as a UserError: code of a plug-in may raise anything. What the memory
    or the disk refuses, and what is told in a line already, stays what it is.
    """
    try:
        yield
    except (UserError, CellError, RankError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK:
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{os.path.basename(where.filename)}, line {where.lineno}"
        raise UserError(f"{what}: {typed_line(error)} ({place})") from error


def shown(value: object) -> str:
    """A value as messages quote it: as Python writes it, cut short where that is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no numbers of more digits
        return "a number of more than 4,300 digits"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text):,} characters)"


def unknown(kind: str, value: object, allowed: Iterable[object]) -> UserError:
    """An error for a name that is not registered, with the nearest name that is."""
    names, told = sorted(map(str, allowed)), shown(value)
    near = get_close_matches(told.strip("'"), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown {kind} {told}{hint} (allowed: {', '.join(names) or 'none'})")


# What pydantic tells in Python's words, as it is called in a study's file.
KINDS = {
    **dict.fromkeys(("tuple_type", "list_type", "set_type"), "must be a list"),
    **dict.fromkeys(("model_type", "dict_type", "dataclass_type"), "must be a mapping of names to values"),
}


def from_validation(where: str, error: ValidationError, fields: Iterable[str] = ()) -> UserError:
    """The first complaint of a pydantic error as one line.

    where: what was being read, e.g. ``"model"``; fields: the valid field names, to suggest the nearest one.
    """
    first = error.errors()[0]
    path = ".".join(str(part) for part in (where, *first["loc"]) if part != "" and not _of_union(part))
    if first["type"] == "extra_forbidden":
        return unknown(f"key in {where or 'the study'}:", first["loc"][-1], fields)
    if first["type"] == "missing":
        return UserError(f"{path} is required and not given")
    message = KINDS.get(first["type"], first["msg"].removeprefix("Value error, "))
    given = f" (got {shown(first['input'])})"
    if isinstance(first["input"], dict):
        given = " (got a mapping)" if first["type"] in KINDS else ""
    return UserError(f"{path}: {message}{given}")


def _of_union(part: int | str) -> bool:
    """Whether a part of pydantic's path is no field, but one of the types that a field may have."""
    return isinstance(part, str) and (part in TYPES or part.endswith("]") or part.startswith("constrained-"))


def reason_of(error: Exception) -> tuple[str, Fault, str | None]:
    """Why a cell failed, in one line; whether of itself or of its environment; the traceback where it is of use."""
    if isinstance(error, RankError):
        return error.reason, error.kind, error.trace
    text = typed_line(error)
    if isinstance(error, CellError | UserError):
        return str(error), "cell", None
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return f"out of memory: {text}", "environment", traceback.format_exc()
    full = isinstance(error, OSError) and error.errno in DISK
    if full or any(os.strerror(number) in str(error) for number in DISK):  # libraries wrap it in errors of their own
        return f"the disk refuses to be written: {text}", "environment", traceback.format_exc()
    return text, "cell", traceback.format_exc()
