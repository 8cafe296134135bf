"""``cyclebench convert``: a source to a checkpoint folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from bench.config import ModelConfig, Sharing, Strict, parse
from bench.errors import UserError
from bench.limits import check_memory, machine_memory
from bench.model.costs import count, meta_model, pass_flops
from bench.model.parts import PARTS
from bench.model.variant import get_variant
from bench.pretrained.convert import convert, logit_difference
from bench.pretrained.share import save_checkpoint
from bench.pretrained.sharing import sources_of
from bench.pretrained.sources import digest, load, outline
from bench.study.overrides import Keys, apply_override
from bench.study.shapes import OF_CYCLES
from bench.study.start import target_shape

CARD_LENGTH = 256  # tokens that FLOPs are told for, or the longest sequence if it is shorter


class Conversion(Strict):
    """What ``--set`` may say of the model to be made.

    Attributes:
        model: fields of its shape.
        sharing: how the source's blocks are shared among fewer.
        options: of the variant.
    """

    model: dict[str, Any] = Field(default_factory=dict)
    sharing: Sharing | None = None
    options: dict[str, Any] = Field(default_factory=dict)


def _below(parents: Sequence[str]) -> Iterable[str] | None:
    fields: dict[tuple[str, ...], Iterable[str]] = {(): Conversion.model_fields, ("model",): ModelConfig.model_fields}
    return fields.get(tuple(parents))


_KEYS = Keys(_below, "model.n_cycles=2")


def conversion(overrides: Sequence[str]) -> Conversion:
    """What the overrides say. Raises UserError, in one line, for what they may not."""
    raw: dict[str, Any] = {}
    for override in overrides:
        apply_override(raw, override, _KEYS)
    return parse(Conversion, raw, "--set")


def convert_to(source: str, variant: str, overrides: Sequence[str], seed: int, out: Path) -> dict[str, str]:
    """Convert, save into the folder ``out`` and return what is to be shown. overrides: fields of ``Conversion``.

    Raises UserError for whatever is wrong, before anything is written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: {str(out)!r} exists already")
    asked = conversion(overrides)
    made = get_variant(variant, asked.options, pretrained=True, shared=asked.sharing is not None)
    for field, without in OF_CYCLES.items():
        if not made.cycled and asked.model.get(field, without) != without:
            value = asked.model[field]
            raise UserError(
                f"--set model.{field}: {value!r} with {variant!r}, which has no cycles (allowed: {without!r})"
            )
    shape = outline(source).shape  # what is not given is as there, but for the cycles
    given = parse(ModelConfig, {**shape.model_dump(), "n_cycles": ModelConfig().n_cycles, **asked.model}, "--set model")
    model = target_shape(shape, given.n_cycles if made.cycled else 1, asked.model, variant)
    sources_of(asked.sharing, shape.n_blocks, made.schedule(model))
    pretrained = load(source)
    sizes = pretrained.outline.vocab_size, pretrained.outline.positions
    params = count(meta_model(made, model, *sizes).parameters())
    check_memory(4 * params, machine_memory(), f"{variant}: {params:,} parameters", "fewer cycles or smaller options")
    lm = convert(pretrained, made, model, asked.sharing, seed)
    off = logit_difference(lm, pretrained)
    length = min(CARD_LENGTH, lm.config.max_position_embeddings)
    lineage = {
        "converted from": source,
        "digest of the source": digest(source),
        "sharing of its blocks": asked.sharing or "none, all kept",
        "seed of what is added": seed,
        "largest logit difference from the source, at one cycle": f"{off:.3g}",
    }
    out.mkdir(parents=True, exist_ok=True)
    save_checkpoint(lm, out, pretrained.tokenizer, lineage, length)
    parts = [part for part in (getattr(lm, name) for name in PARTS) if part is not None]
    added = sum(count(part.parameters()) for part in parts)
    return {
        "blocks of the source": str(shape.n_blocks),
        "sharing": asked.sharing or "all blocks kept",
        "schedule (block of each step)": str(lm.schedule),
        "parameters, of which added": f"{count(lm.parameters()):,}, {added:,}",
        f"forward FLOPs/token at {length} tokens": f"{pass_flops(lm, length).forward / length:,.0f}",
        "largest logit difference at one cycle": f"{off:.3g}",
    }
