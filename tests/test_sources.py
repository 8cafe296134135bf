"""What starts from a source outside a study is planned as that is: its shape, its vocabulary, its norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import BLOCKS, VOCAB, llama

from bench.config import ModelConfig
from bench.errors import UserError
from bench.model.costs import meta_model, training_flops
from bench.model.language_model import build_model
from bench.model.variant import get_variant
from bench.pretrained.sources import outline
from bench.run.status import planned_flops
from bench.study.conversion import convert_to
from bench.study.load import study_from
from bench.study.plan import make_plan


def test_it_is_matched_budgeted_and_counted_as_it_is(tmp_path: Path) -> None:
    source = llama(tmp_path / "source")
    raw: dict[str, Any] = {
        "name": "started",
        "question": "Is it equal?",
        "reference": "original",
        "model": {"d_model": 16, "n_heads": 2, "n_blocks": 4, "n_cycles": 2},
        "train": {"steps": 4, "batch_size": 4},
        "tasks": [{"name": "p_hop", "options": {"hops": 1, "length": 12, "n_train": 50, "n_valid": 10, "n_test": 20}}],
        "variants": [
            {"name": "vanilla", "label": "original", "init": source},
            {"name": "vanilla", "label": "deep", "match": "depth"},
            {"name": "htc", "budget": "flops"},
        ],
        "seeds": 1,
    }
    made = make_plan(study_from(raw, (), "started"), "", None)
    cells = {planned.variant: planned.cell for planned in made.cells}
    assert cells["deep"].model.n_blocks == cells["original"].model.n_blocks == BLOCKS != 4
    lm = meta_model(get_variant("vanilla"), cells["original"].model, outline(source).vocab_size, 12)
    flops = planned_flops(made.cells)
    assert flops["original", "p_hop"] == 4 * 4 * training_flops(lm, 12)
    one_step = flops["htc", "p_hop"] / cells["htc"].train.steps
    assert abs(flops["htc", "p_hop"] - flops["original", "p_hop"]) <= one_step / 2


def test_low_rank_updates_cannot_make_up_for_norms_of_updates(tmp_path: Path) -> None:
    shape = ModelConfig(d_model=16, n_heads=2, n_blocks=4, n_cycles=1, norm="sandwich")
    lm = build_model(get_variant("vanilla"), shape, VOCAB, 32)
    lm.reset_parameters(0)
    lm.save_pretrained(tmp_path / "sandwich")
    halves = ["model.n_cycles=2", "model.n_blocks=2", "sharing=average"]
    with pytest.raises(UserError, match=r"options\.start: 'svd' cannot make up for the norms of updates"):
        convert_to(str(tmp_path / "sandwich"), "relaxed", halves, 0, tmp_path / "out")
    convert_to(str(tmp_path / "sandwich"), "relaxed", [*halves, "options.start=zero"], 0, tmp_path / "zero")
