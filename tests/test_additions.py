"""The table of what variants add: counts held against the cost module, files that can be read again."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from bench.config import ModelConfig
from bench.errors import UserError
from bench.model.costs import costs
from bench.model.variant import get_variant
from bench.perf.additions import cost_rows, shown, write_costs
from bench.study.load import load_study, study_from, study_names
from bench.study.plan import shape_of

RAW: dict[str, Any] = {
    "name": "tiny",
    "question": "What is added?",
    "reference": "htc",
    "model": {"d_model": 16, "n_heads": 2, "n_blocks": 3, "n_cycles": 2},
    "tasks": [{"name": "p_hop", "options": {"hops": 1, "length": 12, "n_train": 20, "n_valid": 5, "n_test": 5}}],
    "variants": [{"name": "ztt", "options": {"gating": "none"}, "changes": {"options.gating": ["token"]}}, "htc"],
    "seeds": 1,
}
PLACE = {"git": None, "cpu": "a cpu", "device": "cpu", "threads": 1, "python": "3", "torch": "2"}


def test_what_is_added_is_counted_against_the_reference(tmp_path: Path) -> None:
    study = study_from(RAW, [], "tiny")
    rows = cost_rows(study, rounds=2, batch=2)
    assert [row["variant"] for row in rows] == ["htc", "ztt", "ztt gating=token"]
    model = ModelConfig(**RAW["model"])
    for row, (name, options) in zip(
        rows, [("htc", {}), ("ztt", {"gating": "none"}), ("ztt", {"gating": "token"})], strict=True
    ):
        found = costs(get_variant(name, options), model, 4, 12)
        added = sum(addition.params for addition in found.additions.values())
        assert row["params"] == found.params and row["added_params"] == added
        more = sum(addition.flops_per_token for addition in found.additions.values())
        assert row["added_forward_flops_per_token"] == pytest.approx(more)
        assert row["activation_bytes_per_sequence"] == found.activation_bytes
        assert row["added_kv_bytes_per_token"] == 0, "zero tokens are parameters: no token of the text needs more cache"
        assert 0 < row["time_ratio_low"] <= row["time_ratio"] <= row["time_ratio_high"]
    assert rows[2]["added_params"] > rows[1]["added_params"] > 0 == rows[0]["added_params"]
    paths = write_costs(study, rows, 2, "cyclebench costs tiny", PLACE, tmp_path)
    read = list(csv.DictReader((tmp_path / "costs.csv").open()))
    assert [(row["variant"], int(row["params"])) for row in read] == [(row["variant"], row["params"]) for row in rows]
    text = (tmp_path / "costs.md").read_text()
    assert "`cyclebench costs tiny`" in text and all(" | ".join(shown(row).values()) in text for row in rows)
    assert sorted(path.name for path in paths) == ["costs.csv", "costs.md"]


def test_what_is_frozen_costs_less() -> None:
    study = study_from({**RAW, "variants": ["htc"], "train": {"trained": "additions+norms"}}, [], "tiny")
    (row,) = cost_rows(study, rounds=1, batch=1)
    model = ModelConfig(**RAW["model"])
    frozen, full = (costs(get_variant("htc"), model, 4, 12, trained=kind) for kind in ("additions+norms", "all"))
    assert row["train_flops_per_token"] == frozen.train_flops_per_token < full.train_flops_per_token


def test_costs_need_a_reference() -> None:
    with pytest.raises(UserError, match="'tiny' needs a reference"):
        cost_rows(study_from({**RAW, "reference": None}, [], "tiny"), 1, 1)


@pytest.mark.parametrize("preset", [None, pytest.param("gpu", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", sorted(set(study_names()) - {"quick", "sharing"}))
def test_shipped_studies_load_at_every_preset_with_options_and_matches_that_can_be_met(
    name: str, preset: str | None
) -> None:
    text = (Path(__file__).parents[1] / "studies" / f"{name}.yaml").read_text()
    if preset and f"  {preset}:" not in text:
        pytest.skip(f"{name} has no preset {preset}")
    study = load_study(name, preset=preset)
    for entry in study.variants:
        for task in study.tasks:
            variant = get_variant(entry.name, entry.options)
            if study.init is None:  # else the shape is that of the checkpoint the study starts from
                variant.schedule(study.cell_model(entry, task))
            if entry.match is not None:
                assert shape_of(study, entry, task, 1000, 128)[1]
