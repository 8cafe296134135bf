"""Tables as text: CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


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
    """A table in Markdown, line by line. Whatever a value holds, it stays in its field."""
    head = list(columns)
    return [_line(head), _line(["---"] * len(head)), *(_line(row) for row in rows)]


def _line(values: Iterable[Any]) -> str:
    fields = ("<br>".join(str(value).splitlines()).replace("|", "\\|") for value in values)
    return f"| {' | '.join(fields)} |"
