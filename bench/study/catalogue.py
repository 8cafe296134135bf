"""The table of variants that the documents show, made from what is registered."""

from __future__ import annotations

from bench.config import ModelConfig
from bench.model.named import NAMED
from bench.model.variant import Variant, get_variant, variants
from bench.study.shapes import relevant
from bench.tables import markdown

SHAPE = ModelConfig(n_blocks=4, n_cycles=2)


def about(kind: type[Variant]) -> str:
    """The first paragraph of a variant's docstring in one line."""
    return " ".join((kind.__doc__ or "").split("\n\n")[0].split())


def variant_table() -> list[str]:
    """A row for each variant of the suite and each name for one with a shape of its own, in Markdown."""
    rows = []
    fields = {name: {**named.model, **named.train} for name, named in NAMED.items()}
    given = {name: ", ".join(f"{field}: {value}" for field, value in of.items()) for name, of in fields.items()}
    for name in variants.names():
        kind = variants.get(name)
        if kind.__module__.startswith("variants."):
            variant = get_variant(name)
            schedule = variant.schedule(relevant(variant, SHAPE))
            said = about(kind) if name not in given else f"{about(kind)} Trained with {given[name]}."
            rows.append((name, str(schedule), said, ", ".join(kind.Options.model_fields)))
    for name, named in NAMED.items():
        if name != named.variant:
            rows.append((name, f"{named.variant} with {given[name]}", named.about, ""))
    columns = ("variant", "schedule of blocks (4 blocks, 2 cycles)", "what it is", "options")
    return markdown(columns, sorted(rows))
