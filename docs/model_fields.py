"""Docstrings and the fields of pydantic models as Markdown, for the pages that docs/reference.py makes."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel

UNBOUNDED = 1e15  # a bound beyond this says only what fits into a number


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(text) for text in line)} |" for line in lines) + "\n"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", r"\|").strip()


def prose(doc: str | None) -> str:
    """A docstring as Markdown: ``name`` as `name`, what looks like HTML as it is."""
    return re.sub(r"``(.+?)``", r"`\1`", inspect.cleandoc(doc or "")).replace("<", "&lt;")


def plain(doc: str | None) -> str:
    """A docstring without its section of attributes."""
    return prose(re.split(r"\n\s*(?:Attributes|Args):\n", inspect.cleandoc(doc or ""))[0])


@cache
def attributes(kind: type) -> dict[str, str]:
    """What the docstrings of a class and of those it comes from say of its attributes, by name."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        section = re.search(r"\bAttributes:\n((?:[ ]+.*\n?|\n)*)", inspect.cleandoc(base.__doc__ or "") + "\n")
        for names, text in re.findall(r"^    ([\w, ]+): (.*(?:\n     +.*)*)", section[1] if section else "", re.M):
            found |= dict.fromkeys(names.split(", "), re.sub(r"\s+", " ", text))
        for name, text in _in_prose(base, getattr(kind, "model_fields", {})):
            found.setdefault(name, text)
    return found


def _in_prose(kind: type, names: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What short docstrings say of fields: ``n_prelude, n_coda: blocks that run once; scratch: further slots``."""
    doc = re.sub(r"[ \n]+", " ", inspect.cleandoc(kind.__doc__ or "").partition("Attributes:")[0])
    places = [
        place
        for place in re.finditer(r"(?:^|(?<=[;.] ))((?:\w+, )*\w+): ", doc)
        if all(name in names for name in place[1].split(", "))
    ]
    ends = [*(place.start() for place in places), len(doc)][1:]
    for place, after in zip(places, ends, strict=False):
        yield from ((name, doc[place.end() : after].strip(" ;")) for name in place[1].split(", "))


def allowed(schema: Mapping[str, Any]) -> str:
    """What a JSON schema lets through, in words."""
    if "$ref" in schema:
        return f"`{schema['$ref'].rpartition('/')[2]}`"
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`" if not isinstance(schema["const"], str) else f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    for key in ("anyOf", "allOf", "oneOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(allowed(part) for part in schema[key]))
    kind = schema.get("type", "anything")
    if kind == "array":
        items = schema.get("items") or {}
        of = [allowed(part) for part in schema.get("prefixItems", ())]
        return f"[{', '.join(of)}]" if of else f"list of {allowed(items)}"
    if kind == "object":
        inner = schema.get("additionalProperties")
        return f"mapping to {allowed(inner)}" if isinstance(inner, dict) and inner else "mapping"
    words = {"integer": "whole number", "string": "text", "boolean": "true or false", "null": "none"}
    return f"{words.get(kind, kind)}{_range(schema)}"


def _range(schema: Mapping[str, Any]) -> str:
    said = []
    for key, word in (
        ("minimum", "from"),
        ("exclusiveMinimum", "above"),
        ("maximum", "to"),
        ("exclusiveMaximum", "below"),
    ):
        if (value := schema.get(key)) is not None and abs(value) < UNBOUNDED:
            said.append(f"{word} {value:g}" if isinstance(value, float) else f"{word} {value}")
    return f" {' '.join(said)}" if said else ""


def _default(schema: Mapping[str, Any], required: bool) -> str:
    if required:
        return "required"
    value = schema.get("default")
    if "$ref" in schema:  # a part with defaults of its own
        return ""
    if isinstance(value, dict | list):
        return f"`{json.dumps(value)}`" if value and len(json.dumps(value)) < 60 else ""
    return "`none`" if value is None else f"`{value if isinstance(value, str) else json.dumps(value)}`"


def fields(kind: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    """Of every field of a pydantic model: its key, what is allowed, its default, and what it is."""
    schema = kind.model_json_schema(by_alias=True)
    told = attributes(kind)
    for name, field in kind.model_fields.items():
        key = field.alias or name
        part = schema["properties"][key]
        yield (
            key,
            allowed(part),
            _default(part, key in schema.get("required", ())),
            field.description or told.get(name, ""),
        )


def field_table(kind: type[BaseModel]) -> str:
    """The fields of a pydantic model; nothing if it has none."""
    rows = [[f"`{key}`", may, default, prose(text)] for key, may, default, text in fields(kind)]
    return table(["key", "allowed", "default", "what it is"], rows) if rows else "No options.\n"


def inside(kind: type[BaseModel], seen: dict[str, type[BaseModel]] | None = None) -> dict[str, type[BaseModel]]:
    """The models that a model is made of, by name, itself first."""
    seen = {} if seen is None else seen
    if kind.__name__ not in seen:
        seen[kind.__name__] = kind
        for field in kind.model_fields.values():
            for inner in _models(field.annotation):
                inside(inner, seen)
    return seen


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)
