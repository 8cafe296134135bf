"""``cyclebench convert``: a source to a checkpoint folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.errors import UserError
from bench.model.costs import count, pass_flops
from bench.pretrained.convert import convert, difference
from bench.pretrained.share import save_checkpoint
from bench.pretrained.sharing import sources_of
from bench.pretrained.sources import digest, load, outline
from bench.study.load import study_from
from bench.study.start import target_shape

CARD_LENGTH = 256  # tokens that FLOPs are told for, or the longest sequence if it is shorter


def convert_to(source: str, variant: str, overrides: Sequence[str], seed: int, out: Path) -> dict[str, str]:
    """Convert, save into the folder ``out`` and return what is to be shown. overrides: fields of a study's variant.

    Raises UserError for whatever is wrong, before anything is written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: {str(out)!r} exists already")
    entry = {"name": variant, "label": "it"}
    raw = {"name": "convert", "question": "-", "init": source, "tasks": ["kjv"], "variants": [entry], "seeds": 1}
    study = study_from(raw, [f"variants.it.{override}" for override in overrides], "convert")
    chosen = study.variants[0]
    made = study.variant(chosen)
    shape = outline(source).shape
    model = study.cell_model(chosen, study.tasks[0])
    model = target_shape(shape, model.n_cycles if made.cycled else 1, chosen.model, variant)
    sources_of(chosen.sharing, shape.n_blocks, made.schedule(model))
    pretrained = load(source)
    lm = convert(pretrained, made, model, chosen.sharing, seed)
    off = difference(lm, pretrained)
    length = min(CARD_LENGTH, lm.config.max_position_embeddings)
    lineage = {
        "converted from": source,
        "digest of the source": digest(source),
        "sharing of its blocks": chosen.sharing or "none, all kept",
        "seed of what is added": seed,
        "largest logit difference from the source, at one cycle": f"{off:.3g}",
    }
    out.mkdir(parents=True, exist_ok=True)
    save_checkpoint(lm, out, pretrained.tokenizer, lineage, length)
    added = sum(count(part.parameters()) for part in (lm.prefix, lm.adapter, lm.recurrence, lm.gate) if part)
    return {
        "blocks of the source": str(shape.n_blocks),
        "sharing": chosen.sharing or "all blocks kept",
        "schedule (block of each step)": str(lm.schedule),
        "parameters, of which added": f"{count(lm.parameters()):,}, {added:,}",
        f"forward FLOPs/token at {length} tokens": f"{pass_flops(lm, length, 'cpu').forward / length:,.0f}",
        "largest logit difference at one cycle": f"{off:.3g}",
    }
