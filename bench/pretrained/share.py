"""A checkpoint folder that stands on its own: weights, tokeniser, code to load it, and a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from bench.errors import UserError, first_line
from bench.form import TEXT
from bench.model.configuration import CycleConfig
from bench.model.costs import cache_bytes, count, meta_model, non_embedding, pass_flops
from bench.model.language_model import CycleModel
from bench.pretrained.sources import no_bars
from bench.store.digests import CARD
from bench.tables import markdown

SAME = ("task", "metric", "cycles", "exit", "threshold", "asked")  # a later score of the same replaces one
README, FACTS = CARD  # the card, and what it is written from: lineage, and scores as they come


def save_checkpoint(
    lm: CycleModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    lineage: dict[str, Any],
    length: int,
    scores: list[dict[str, Any]] | None = None,
    names: Mapping[int, str] | None = None,
) -> None:
    """Write everything a checkpoint needs into the folder, weights as safetensors.

    ``AutoModelForCausalLM.from_pretrained(folder)`` loads it after ``from cyclebench import CycleForCausalLM``, or by
    itself with ``trust_remote_code=True``.

    Args:
        lineage: where it comes from, for the card.
        length: tokens that FLOPs are told for.
        scores: rows with at least ``task``, ``metric`` and ``value``.
        names: of classes, as far as they are known.
    """
    if names:
        label = {number: names.get(number, f"LABEL_{number}") for number in range(lm.vocab_size)}
        lm.config.id2label, lm.config.label2id = label, {name: number for number, name in label.items()}
    with no_bars():
        lm.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    _write(folder, {"lineage": lineage, "length": length, "scores": scores or []})


def add_scores(folder: Path, scores: list[dict[str, Any]]) -> None:
    """Put further scores on the checkpoint's card, in place of earlier ones of the same ``SAME``."""
    facts = read_facts(folder)
    _write(folder, {**facts, "scores": merged(facts["scores"], scores, SAME)})


def merged(before: list[dict[str, Any]], scores: list[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of scores with further ones, in place of earlier ones that agree in all keys."""

    def told(row: dict[str, Any]) -> str:  # as JSON, which makes the same of several thresholds before and after a file
        return json.dumps([row.get(key) for key in keys])

    new = {told(row) for row in scores}
    return [*(row for row in before if told(row) not in new), *scores]


def read_facts(folder: Path) -> dict[str, Any]:
    """Lineage and scores of a checkpoint; empty ones if it has none."""
    path = folder / FACTS
    if not path.exists():
        return {"lineage": {}, "length": 256, "scores": []}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"checkpoint {str(folder)!r}: {FACTS} is not valid JSON: {error}") from None


def _write(folder: Path, facts: dict[str, Any]) -> None:
    (folder / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    (folder / README).write_text(_card(CycleConfig.from_pretrained(folder), facts), encoding="utf-8")


def _card(config: CycleConfig, facts: dict[str, Any]) -> str:
    variant, model, length = config.build_variant(), config.model, facts["length"]
    lm = meta_model(variant, model, config.vocab_size, config.max_position_embeddings)
    schedule = lm.schedule
    form = model.form
    kind = "CycleForCausalLM" if form == TEXT else "CycleForClassification"
    tag = {} if form.patch is None else {"pipeline_tag": "image-classification"}
    front: dict[str, Any] = {
        "library_name": "transformers",
        **({"pipeline_tag": "text-generation"} if form == TEXT else tag),
    }
    front |= {"tags": ["cyclebench", variant.name]}
    title = f"{variant.name}, {schedule.n_blocks} blocks, {schedule.n_cycles} cycles"
    about = {
        "variant": variant.name,
        "options": json.dumps(variant.options.model_dump(mode="json")),
        "schedule (block of each step)": str(schedule),
        "parameters": f"{count(lm.parameters()):,}",
        "parameters without embeddings": f"{non_embedding(lm):,}",
        f"forward FLOPs/token at {length} tokens": f"{pass_flops(lm, length).forward / length:,.0f}",
        "KV cache, bytes/token (float32)": f"{-(-cache_bytes(lm, length) // length):,}",
    }
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", f"# {title}", ""]
    lines += [first_line(type(variant).__doc__ or ""), "", *markdown(("", ""), about.items())]
    lines += ["", "## Lineage", "", *markdown(("", ""), facts["lineage"].items())]
    if facts["scores"]:
        columns = ["task", "metric", "value", "stderr", "cycles", "flops_per_token", "samples"]
        columns[5:5] = [key for key in ("exit", "threshold", "asked") if any(key in row for row in facts["scores"])]
        rows = [[_cell(row.get(key)) for key in columns] for row in facts["scores"]]
        lines += ["", "## Scores", "", *markdown(columns, rows)]
    lines += [
        "",
        "## Loading",
        "",
        "```python",
        f"from cyclebench import {kind}",
        "",
        f'model = {kind}.from_pretrained("FOLDER")',
        "```",
        "",
    ]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return "-" if value is None else str(value)
