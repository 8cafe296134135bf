"""Text from local files."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import model_validator

from bench.data.task import Task, TaskData, TaskSize, register
from bench.data.text import TextOptions, text_data
from bench.errors import UserError

SHARES = {"train": 0.9, "valid": 0.05, "test": 0.05}


@register("text")
class TextFiles(Task):
    """Text from local UTF-8 files, split by file or by place."""

    class Options(TextOptions):
        """files: paths or glob patterns, cut into 90 % train, 5 % validation, 5 % test in order; or train, valid and
        test: paths or patterns for each split.
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
        paths = [path for group in (chosen.files, chosen.train, chosen.valid, chosen.test) for path in _paths(group)]
        copies = 2 + (16 if chosen.tokenizer == "bytes" else 0)  # of a byte: its text, and the tokens of eight bytes
        return TaskSize(copies * sum(os.stat(path).st_size for path in paths), 0.0)

    def build(self) -> TaskData:
        chosen = self.options
        if chosen.files:
            return text_data(split_by_place("".join(_read("files", chosen.files))), chosen)
        return text_data({name: _read(name, getattr(chosen, name)) for name in SHARES}, chosen)


def split_by_place(text: str) -> dict[str, list[str]]:
    """One text cut in order into the splits, by their shares."""
    first = int(len(text) * SHARES["train"])
    second = int(len(text) * (SHARES["train"] + SHARES["valid"]))
    return {"train": [text[:first]], "valid": [text[first:second]], "test": [text[second:]]}


def _paths(patterns: Iterable[str]) -> list[str]:
    """The files that each of the patterns matches, in order."""
    found = [path for pattern in patterns for path in sorted(glob.glob(pattern, recursive=True))]
    return [path for path in found if Path(path).is_file()]


def _read(field: str, patterns: Sequence[str]) -> list[str]:
    texts = []
    for pattern in patterns:
        paths = _paths([pattern])
        if not paths:
            raise UserError(f"text.options.{field}: no file matches {pattern!r}")
        for path in paths:
            try:
                text = Path(path).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"text.options.{field}: cannot read {path!r} as UTF-8 text: {error}") from None
            if not text.strip():
                raise UserError(f"text.options.{field}: {path!r} is empty")
            texts.append(text)
    return texts
