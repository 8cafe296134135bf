"""Tables as text, and errors in one line."""

from __future__ import annotations

import csv
import io

import pytest

from bench.errors import first_line, reason_of, typed_line
from bench.tables import csv_text, markdown


def test_csv_has_the_keys_of_all_rows() -> None:
    rows = [{"a": 1, "b": "x,y"}, {"b": "two\nlines", "c": 0.5}]
    text = csv_text(rows)
    assert text.startswith("a,b,c\n") and "\r" not in text
    assert list(csv.DictReader(io.StringIO(text))) == [
        {"a": "1", "b": "x,y", "c": ""},
        {"a": "", "b": "two\nlines", "c": "0.5"},
    ]
    assert csv_text([]) == ""


def test_markdown_keeps_every_value_in_its_field() -> None:
    assert markdown(["name", "p|q"], [["a|b", "two\nlines"], [1, None]]) == [
        "| name | p\\|q |",
        "| --- | --- |",
        "| a\\|b | two<br>lines |",
        "| 1 | None |",
    ]


@pytest.mark.parametrize(
    ("error", "line", "typed"),
    [
        (ValueError("one\ntwo"), "one", "ValueError: one"),
        (ValueError("\n \none\r\ntwo"), "one", "ValueError: one"),
        (ValueError(""), "ValueError", "ValueError"),
        (ValueError(" \n "), "ValueError", "ValueError"),
        (KeyError(), "KeyError", "KeyError"),
        (OSError(), "OSError", "OSError"),
    ],
)
def test_the_first_line_of_an_error(error: Exception, line: str, typed: str) -> None:
    assert first_line(error) == line and typed_line(error) == typed
    assert reason_of(error)[0] == typed


@pytest.mark.parametrize(("text", "line"), [("", ""), (" \n", ""), ("\na \nb", "a")])
def test_the_first_line_of_a_text(text: str, line: str) -> None:
    assert first_line(text) == line
