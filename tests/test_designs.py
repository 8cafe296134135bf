"""Designs and presets: what a study's lists expand to, and one clear line for what they cannot."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from bench.data.task import task_data
from bench.errors import UserError
from bench.study.load import load_study, study_from
from bench.study.schema import Study

RAW: dict[str, Any] = {"name": "s", "question": "q", "tasks": ["p_hop"], "variants": ["htc"], "seeds": 2}


def load(preset: str | None = None, overrides: tuple[str, ...] = (), **changes: Any) -> Study:
    return study_from(deepcopy({**RAW, **changes}), overrides, "s.yaml", preset)


def test_changes_are_made_one_at_a_time_beside_the_entry_itself() -> None:
    entry = {
        "name": "ztt",
        "options": {"lookup": "cycle"},
        "changes": {"options.gating": ["none", "scalar"], "options.zero_tokens": [2], "model.n_cycles": [1]},
    }
    found = load(variants=["htc", entry]).variants
    assert [(e.label, e.options, e.model) for e in found] == [
        ("htc", {}, {}),
        ("ztt", {"lookup": "cycle"}, {}),
        ("ztt gating=none", {"lookup": "cycle", "gating": "none"}, {}),
        ("ztt gating=scalar", {"lookup": "cycle", "gating": "scalar"}, {}),
        ("ztt zero_tokens=2", {"lookup": "cycle", "zero_tokens": 2}, {}),
        ("ztt n_cycles=1", {"lookup": "cycle"}, {"n_cycles": 1}),
    ]
    assert not any(e.changes or e.grid for e in found)


def test_a_grid_is_every_combination_and_nothing_else() -> None:
    grid = {"options.gating": ["none", "tanh"], "train.lr": [1e-3, 2e-3]}
    found = load(variants=[{"name": "ztt", "label": "z", "grid": grid}]).variants
    assert [(e.label, e.options["gating"], e.train["lr"]) for e in found] == [
        ("z gating=none lr=0.001", "none", 1e-3),
        ("z gating=none lr=0.002", "none", 2e-3),
        ("z gating=tanh lr=0.001", "tanh", 1e-3),
        ("z gating=tanh lr=0.002", "tanh", 2e-3),
    ]
    matched = load(variants=["htc", {"name": "vanilla", "grid": {"match": ["params", "depth"]}}], reference="htc")
    assert [(e.label, e.match) for e in matched.variants[1:]] == [
        ("vanilla match=params", "params"),
        ("vanilla match=depth", "depth"),
    ]
    tasks = load(tasks=[{"name": "p_hop", "grid": {"options.hops": [1, [1, 2]]}}]).tasks
    assert [(task.label, task.options["hops"]) for task in tasks] == [
        ("p_hop hops=1", 1),
        ("p_hop hops=[1, 2]", [1, 2]),
    ]


def test_an_override_reaches_all_that_an_entry_stands_for() -> None:
    variants = [{"name": "ztt", "changes": {"options.gating": ["none"]}}]
    found = load(overrides=("variants.ztt.options.zero_tokens=2",), variants=variants).variants
    assert [e.options["zero_tokens"] for e in found] == [2, 2]
    found = load(overrides=("variants.ztt.changes={options.gating: [tanh]}",), variants=variants).variants
    assert [e.label for e in found] == ["ztt", "ztt gating=tanh"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"changes": {"option.gating": ["none"]}}, r"ztt\.changes\.option\.gating.*'options\.NAME'"),
        ({"grid": {"options.gating": []}}, r"ztt\.grid\.options\.gating: needs at least one value"),
        ({"grid": {"options.gating": "none"}}, r"variants.*gating.*list.*'none'"),
        ({"grid": {"match": ["parms"]}}, r"match.*'params', 'flops' or 'depth'"),
        ({"grid": {"options.a": [1]}, "changes": {"options.b": [1]}}, r"changes .* or grid .*not both"),
        ({"changes": {"options.gating": ["none", "none"]}}, r"label 'ztt gating=none' stands twice"),
        ({"changes": {"model.d_modl": [8]}}, r"variants\.ztt d_modl=8\.model.*did you mean 'd_model'"),
        ({"chagnes": {}}, r"'chagnes'; did you mean 'changes'"),
    ],
)
def test_bad_designs_are_one_clear_line(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load(variants=[{"name": "ztt", **entry}])
    assert "\n" not in str(error.value)


PRESETS = {
    "small": {"train": {"steps": 7}},
    "gpu": {"model": {"d_model": 768}, "train": {"batch_size": 64}, "tasks": ["kjv"]},
}


def test_a_preset_is_merged_over_the_study_and_names_it() -> None:
    shared: dict[str, Any] = {"model": {"n_blocks": 3}, "train": {"steps": 5, "lr": 0.01}, "presets": PRESETS}
    small, gpu = load(**shared), load("gpu", **shared)
    assert load("small", **shared) == small and small.name == "s" and gpu.name == "s-gpu"
    assert (small.train.steps, small.train.lr, small.model.n_blocks) == (7, 0.01, 3)
    assert (gpu.train.steps, gpu.train.batch_size, gpu.model.d_model, gpu.model.n_blocks) == (5, 64, 768, 3)
    assert [task.name for task in gpu.tasks] == ["kjv"] and [task.name for task in small.tasks] == ["p_hop"]
    assert load("gpu", ("train.batch_size=2",), **shared).train.batch_size == 2, "overrides come last"
    assert load(presets={"gpu": {"train": {"steps": 7}}}).train.steps != 7, "only small is taken unasked"


@pytest.mark.parametrize(
    ("preset", "presets", "message"),
    [
        ("gpv", PRESETS, r"unknown preset of s\.yaml: 'gpv'; did you mean 'gpu'"),
        ("gpu", None, r"unknown preset of s\.yaml: 'gpu' \(allowed: none\)"),
        (None, ["gpu"], r"presets must be a mapping"),
        ("gpu", {"gpu": {"name": "x"}}, r"presets\.gpu\.name: a preset cannot change the study's name"),
        ("gpu", {"gpu": {"modle": {}}}, r"'modle'; did you mean 'model'"),
    ],
)
def test_bad_presets_are_one_clear_line(preset: str | None, presets: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load(preset, presets=presets)
    assert "\n" not in str(error.value)


def test_the_data_of_every_task_of_the_shipped_tasks_study_can_be_made() -> None:
    for task in load_study("tasks").tasks:
        data = task_data(task.name, task.options)
        assert len(data.train) and all(len(split) for split in data.tests.values()), task.label
