"""The table of variants in a text such as the README, made from what is registered.

``python -m bench.study.catalogue README.md`` brings it up to date, between two marks.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench.config import ModelConfig
from bench.errors import UserError
from bench.model.variant import Variant, get_variant, variants
from bench.study.named import NAMED
from bench.study.shapes import relevant
from bench.tables import markdown

BEGIN, END = "<!-- variants: made by python -m bench.study.catalogue README.md -->", "<!-- end of variants -->"
SHAPE = ModelConfig(n_blocks=4, n_cycles=2)


def about(kind: type[Variant]) -> str:
    """The first paragraph of a variant's docstring in one line."""
    return " ".join((kind.__doc__ or "").split("\n\n")[0].split())


def variant_table() -> list[str]:
    """A row for each variant of the suite and each name for one with a shape of its own, in Markdown."""
    rows = []
    for name in variants.names():
        kind = variants.get(name)
        if kind.__module__.startswith("variants."):
            variant = get_variant(name)
            schedule = variant.schedule(relevant(variant, SHAPE))
            rows.append((name, str(schedule), about(kind), ", ".join(kind.Options.model_fields)))
    for name, named in NAMED.items():
        given = ", ".join(f"{field}: {value}" for field, value in {**named.model, **named.train}.items())
        rows.append((name, f"{named.variant} with {given}", named.about, ""))
    columns = ("variant", "schedule of blocks (4 blocks, 2 cycles)", "what it is", "options")
    return markdown(columns, sorted(rows))


def with_table(text: str) -> str:
    """The text with the table as it is now. Raises UserError if it does not have the marks, one of each."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UserError(f"text: the lines {BEGIN!r} and {END!r} must stand in it, once each")
    before, rest = text.split(BEGIN)
    return "\n".join([f"{before}{BEGIN}", *variant_table(), f"{END}{rest.split(END)[1]}"])


if __name__ == "__main__":
    for file in map(Path, sys.argv[1:]):
        file.write_text(with_table(file.read_text(encoding="utf-8")), encoding="utf-8")
