"""YAML as study files and overrides are written in: version 1.2, its core schema (yaml.org/spec/1.2.2, section 10.3).

``yes``, ``on``, ``12:30:00`` and ``2026-01-31`` are texts there, ``012`` is twelve and ``1e3`` a number. Beyond the
schema there is the merge key ``<<``, as most readers have it. Keys are texts and whole numbers have 64 bits: what is
read here is stored as JSON.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from bench.errors import UserError, shown

LONGEST = 4 << 20  # characters
DEEPEST = 64  # lists and mappings inside one another
MOST = 200_000  # values, those that an alias stands for counted again wherever it does

MERGE = "<<"
TAG = "tag:yaml.org,2002:"
SCALARS = {  # of the core schema, in the order in which they are looked for; what is none of them is a text
    "null": re.compile(r"null|Null|NULL|~|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    "float": re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
}


class _Composer(getattr(yaml, "CBaseLoader", yaml.BaseLoader)):  # type: ignore[misc]  # libyaml is ten times as fast
    """Makes the nodes of a document; what they stand for, ``_Reader`` says."""


for _name, _form in SCALARS.items():
    _Composer.add_implicit_resolver(TAG + _name, re.compile(rf"(?:{_form.pattern})\Z"), None)


class _Reader:
    """Values from nodes. Raises yaml.MarkedYAMLError for what may not stand there."""

    def __init__(self) -> None:
        self.left = MOST

    def value(self, node: yaml.Node, depth: int = 0) -> Any:
        """What a node stands for, at a depth in the document. Aliases become copies."""
        self.left -= 1
        if self.left < 0:
            raise _error(node, f"it stands for more than {MOST:,} values")
        if depth > DEEPEST:
            raise _error(node, f"it is nested more than {DEEPEST} deep")
        kind = node.tag.removeprefix(TAG)
        if isinstance(node, yaml.ScalarNode) and kind in ("str", *SCALARS):
            return node.value if kind == "str" else _scalar(node, kind)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.value(item, depth + 1) for item in node.value]
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, depth + 1)
        tag = f"!!{kind}" if node.tag.startswith(TAG) else node.tag
        known = "!!str, !!int, !!float, !!bool, !!null; !!seq of a list; !!map of a mapping"
        raise _error(node, f"tag {shown(tag)} cannot stand here (allowed: {known})")

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.value(key_node, depth)
            if not isinstance(key, str):
                raise _error(key_node, f"key {shown(key)} must be a text")
            if key in found or (key == MERGE and merged):
                raise _error(key_node, f"key {shown(key)} stands twice")
            if key == MERGE and not key_node.style:
                for part in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                    if not isinstance(part, yaml.MappingNode):
                        raise _error(part, f"{MERGE} must be given a mapping, or a list of mappings")
                    merged = {**self.value(part, depth), **merged}
            else:
                found[key] = self.value(value_node, depth)
        return {**merged, **found}


def _scalar(node: yaml.ScalarNode, kind: str) -> Any:
    text = node.value
    if not SCALARS[kind].fullmatch(text):
        raise _error(node, f"{shown(text)} is no !!{kind}")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    digits = (text[2:] if base != 10 else text.lstrip("+-")).lstrip("0") or "0"
    number = int(digits, base) if len(digits) <= 64 else 1 << 64  # Python reads no number of thousands of digits
    number = -number if text.startswith("-") else number
    if not -(1 << 63) <= number < 1 << 63:
        raise _error(node, f"{shown(text)} must be from -2^63 to 2^63 - 1")
    return number


def _error(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, problem, node.start_mark)


def parse_yaml(text: str, where: str) -> Any:
    """What the text holds: None, booleans, integers of 64 bits, floats, texts, lists and mappings with texts as keys.

    Raises UserError, calling it ``where``, for what is not valid YAML, for a key that stands twice, a tag that is not
    of the core schema, and for what is too long, too deep or, with its aliases, too much.
    """
    if len(text) > LONGEST:
        raise UserError(f"{where}: is longer than {LONGEST:,} characters")
    try:
        loader = _Composer(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
        return None if node is None else _Reader().value(node)
    except (yaml.YAMLError, UnicodeEncodeError) as error:
        told = " ".join(str(error).split()).replace('in "<unicode string>", ', "in ")
        raise UserError(f"{where}: not valid YAML: {told}") from None
    except RecursionError:  # of the composer that is not libyaml's, which refuses such a text itself
        raise UserError(f"{where}: not valid YAML: it is nested more than {DEEPEST} deep") from None
