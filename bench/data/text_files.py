"""Text from local files."""

from __future__ import annotations

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pydantic import model_validator

from bench.data.task import Task, TaskData, TaskSize, register
from bench.data.text import TextOptions, looked_in, text_data
from bench.errors import UserError

SHARES = {"train": 0.9, "valid": 0.05, "test": 0.05}
MARK = "\ufeff"  # the byte-order mark that some editors put before a text


@register("text")
class TextFiles(Task):
    """Text from local UTF-8 files, split by file or by place."""

    class Options(TextOptions):
        """files: paths or glob patterns, cut into 90 % train, 5 % validation, 5 % test in order; or train, valid and
        test: paths or patterns for each split.

        What is the name of a file is no pattern, whatever is in it; ``~`` is your home. No two files of ``files``, and
        none of two splits, may say the same. Line ends are read as ``\\n``, a byte-order mark is left out.
        """

        files: tuple[str, ...] = ()
        train: tuple[str, ...] = ()
        valid: tuple[str, ...] = ()
        test: tuple[str, ...] = ()

        @model_validator(mode="after")
        def _one_way(self) -> TextFiles.Options:
            split = [bool(self.train), bool(self.valid), bool(self.test)]
            if bool(self.files) == any(split) or (any(split) and not all(split)):
                raise ValueError("give either files, or all of train, valid and test")
            return self

    def size(self) -> TaskSize:
        chosen = self.options
        given = {name: getattr(chosen, name) for name in ("files", *SHARES)}
        paths = [path for field, patterns in given.items() for pattern in patterns for path in _files(field, pattern)]
        copies = 2 + (4 if chosen.tokenizer == "bytes" else 0)  # of a byte: its text, and tokens of two bytes
        return TaskSize(copies * sum(os.stat(path).st_size for path in paths), 0.0)

    def build(self) -> TaskData:
        chosen = self.options
        read = _Reader()
        if chosen.files:
            return text_data(split_by_place("".join(read.all("files", chosen.files))), chosen, read.notes())
        documents = {name: read.all(name, getattr(chosen, name)) for name in SHARES}
        return text_data(documents, chosen, read.notes())


def split_by_place(text: str) -> dict[str, list[str]]:
    """One text cut in order into the splits, by their shares."""
    first = int(len(text) * SHARES["train"])
    second = int(len(text) * (SHARES["train"] + SHARES["valid"]))
    return {"train": [text[:first]], "valid": [text[first:second]], "test": [text[second:]]}


class _Reader:
    """Reads the files of a task, and knows which text it has read before."""

    def __init__(self) -> None:
        self._from: dict[bytes, tuple[str, str]] = {}  # field and path by the text's digest
        self._counts: Counter[str] = Counter()

    def all(self, field: str, patterns: Sequence[str]) -> list[str]:
        """The texts of the files that an option names."""
        return [self._text(field, path) for pattern in patterns for path in _files(field, pattern)]

    def notes(self) -> list[str]:
        """What was done to the texts, in words."""
        return [f"{count} of {self._counts['']} files {what}" for what, count in self._counts.items() if what]

    def _text(self, field: str, path: str) -> str:
        where = f"text.options.{field}"
        try:
            text = Path(path).read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{where}: cannot read {path!r} as UTF-8 text: {error}") from None
        self._counts[""] += 1
        if text.startswith(MARK):
            self._counts["begin with a byte-order mark, which is left out"] += 1
            text = text.removeprefix(MARK)
        if "\r" in text:
            self._counts["have line ends with a carriage return, read as \\n"] += 1
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        if not text.strip():
            raise UserError(f"{where}: {path!r} is empty")
        if "\0" in text:
            raise UserError(f"{where}: {path!r} has the character NUL at place {text.index(chr(0))}: it is no text")
        digest = hashlib.sha256(text.encode()).digest()
        if digest in self._from:
            other, before = self._from[digest]
            if "files" in (field, other) or field != other:
                of = "" if field == other else f" of {other}"
                raise UserError(
                    f"{where}: {path!r} says the same as {before!r}{of} (allowed: a text once, in one split alone)"
                )
            self._counts[f"of {field} say the same as one before"] += 1
        self._from[digest] = field, path
        return text


def _files(field: str, pattern: str) -> list[str]:
    """The file of that name, else those that match the pattern, in the innermost folder that is there by its name."""
    try:
        whole = Path(pattern).expanduser()
    except RuntimeError:
        raise UserError(
            f"text.options.{field}: {pattern!r}: nobody has that home (allowed: a path, ~/ for yours)"
        ) from None
    if whole.is_file():
        return [str(whole)]
    if whole.is_dir():
        raise UserError(f"text.options.{field}: {pattern!r} is a folder (allowed: {pattern.rstrip('/')}/*.txt)")
    folder = next((parent for parent in whole.parents if parent.is_dir()), Path())
    inside = whole.relative_to(folder)
    found = glob.glob(str(Path(glob.escape(str(folder))) / inside), recursive=True)
    paths = sorted(path for path in found if Path(path).is_file())
    if not paths:
        raise UserError(f"text.options.{field}: no file matches {pattern!r}{looked_in(whole)}")
    return paths
