"""Tables as text, CSV and Markdown; and text as Markdown shows it, letter by letter."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# What Markdown (CommonMark, with GitHub's tables, strike-through, formulas and check boxes) would take for its own. An
# underscore inside a word, a bracket that opens no link and a sign before a number are none of it: the text stays one
# that can be read as it is written.
_INLINE = re.compile(r"[\\`*<|~$]|&(?=#?\w+;)|\](?=[(\[:])|(?<![^\W_])_|_(?![^\W_])|(?<=\s)#(?=#*$)")
_IN_AN_IMAGE = re.compile(rf"{_INLINE.pattern}|[\[\]]")
_AT_THE_START = re.compile(r"#{1,6}(?=\s|$)|[-+=](?=[-+=\s]*$|\s)|>|\[(?=[ xX]\])|(?P<number>\d{1,9})(?=[.)](\s|$))")
_BREAK = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")


def counted(number: int, one: str, many: str = "") -> str:
    """A number and what there are so many of: ``1 cell``, ``2 cells``. many: by default with an s behind."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV. The columns are the keys of all rows, in the order in which they first stand; no rows: ''."""
    if not rows:
        return ""
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def markdown(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """A table in Markdown, line by line. Whatever a value holds, it stays in its field and is shown as it is."""
    head = list(columns)
    return [_line(head), f"| {' | '.join(['---'] * len(head))} |", *(_line(row) for row in rows)]


def _line(values: Iterable[Any]) -> str:
    fields = ("<br>".join(map(_inline, _BREAK.split(str(value).strip()))) for value in values)
    return f"| {' | '.join(fields)} |"


def _inline(text: str) -> str:
    return _INLINE.sub(r"\\\g<0>", text)


def markdown_text(value: Any) -> str:
    """A value as a line of Markdown, or a part of one, that is shown as it is."""
    line = _inline(" ".join(str(value).split()))
    found = _AT_THE_START.match(line)
    if found is None:
        return line
    end = found.end("number") if found["number"] else 0
    return f"{line[:end]}\\{line[end:]}"


def markdown_image(text: str, file: str) -> str:
    """A picture in Markdown, with the text that stands for it."""
    alt = _IN_AN_IMAGE.sub(r"\\\g<0>", " ".join(text.split()))
    return f"![{alt}]({file})"


def markdown_code(value: Any) -> str:
    """A value as code in a line of Markdown."""
    line = " ".join(str(value).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    room = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{room}{line}{room}{fence}"
