"""YAML is read by the core schema of version 1.2, and told in one line where it cannot be."""

from __future__ import annotations

import math
from typing import Any

import pytest

from bench.errors import UserError
from bench.study.yaml_text import parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[(text, text) for text in ("yes", "No", "on", "OFF", "y", "12:30:00", "1:2:3.4", "2026-13-45", "2026-01-31")],
        *[(text, text) for text in ("1_000", "0b11", "tRue", "=", "<<", "1e", ".", "+.inf2", "nul")],
        *[(text, None) for text in ("null", "Null", "NULL", "~", "")],
        *[(text, True) for text in ("true", "True", "TRUE", "!!bool 'true'")],
        *[(text, 12) for text in ("12", "+12", "012", "0o14", "0xC", "!!int '12'", "0" * 5000 + "12")],
        *[(text, 1000.0) for text in ("1e3", "1000.", "+1.E+3", "1000.0", "!!float 1000")],
        ("-9223372036854775808", -(1 << 63)),
        ("1e-400", 0.0),
        ("'12'", "12"),
        ("!!str 12", "12"),
        ("[yes, {on: no}]", ["yes", {"on": "no"}]),
        ("{!!str 1: 2}", {"1": 2}),
    ],
)
def test_the_core_schema(text: str, value: Any) -> None:
    found = parse_yaml(text, "x")
    assert (found, type(found)) == (value, type(value))


def test_infinities_are_read_so_that_their_field_can_be_told() -> None:
    found = parse_yaml("[.inf, -.INF, 1e400, .nan]", "x")
    assert found[:3] == [math.inf, -math.inf, math.inf] and math.isnan(found[3])


def test_merge_keys() -> None:
    text = "[&a {p: 1, q: 1}, &b {p: 2, s: 2}, {<<: [*a, *b], q: 3}, {q: 3, <<: *a}, {'<<': 1}]"
    assert parse_yaml(text, "x")[2:] == [{"p": 1, "q": 3, "s": 2}, {"p": 1, "q": 3}, {"<<": 1}]


def test_what_an_alias_stands_for_is_a_copy() -> None:
    first, second = parse_yaml("[&a {p: []}, *a]", "x")
    assert first == second and first is not second and first["p"] is not second["p"]


LAUGHS = "[&a [1], " + ", ".join(f"&{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]" for n in range(9)) + "]"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("!!int abc", r"'abc' is no !!int in line 1, column 1"),
        ("!!bool yes", r"'yes' is no !!bool"),
        ("!!int [1]", r"tag '!!int' cannot stand here \(allowed: !!str"),
        ("!!timestamp 2026-01-31", r"tag '!!timestamp' cannot stand here"),
        ("!!python/object/apply:os.abort []", r"tag '!!python/object/apply:os.abort' cannot stand here"),
        ("!mine {}", r"tag '!mine' cannot stand here"),
        ("a: 1\nb: {c: 1,\n d: 2, c: 3}", r"key 'c' stands twice in line 3, column 8"),
        ("{<<: {a: 1}, <<: {b: 1}}", r"key '<<' stands twice"),
        ("{<<: 1}", r"<< must be given a mapping"),
        ("1: 2", r"key 1 must be a text"),
        ("{[a]: 2}", r"key \['a'\] must be a text"),
        ("9223372036854775808", r"must be from -2\^63 to 2\^63 - 1"),
        ("9" * 5000, r"^x: not valid YAML: '9{199}\.\.\. \(5,002 characters\) must be from"),
        ("0x" + "f" * 5000, r"must be from"),
        ("[" * 66 + "]" * 66, r"nested more than 64 deep"),
        ("[" * 3000 + "]" * 3000, r"nest"),
        ("&a [*a]", r"nested more than 64 deep"),
        ("*a", r"undefined alias"),
        ("a: \udcff", r"surrogates not allowed"),
        ("a" * (1 << 23), r"longer than 4,194,304 characters"),
        (LAUGHS, r"stands for more than 200,000 values"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(text: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        parse_yaml(text, "x")
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)
