"""Studies whose cells are trained in stacks: which go together, and that each gets what it gets by itself."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from test_packing import assert_near
from test_runner import RAW, plan

from bench.errors import UserError
from bench.run.going import run_cell
from bench.run.packs import packs
from bench.run.runner import Running, run_study
from bench.run.verify import rerun
from bench.store.store import Store


def test_what_goes_together() -> None:
    made = plan(variants=["htc", "ztt"], seeds=5)
    size = lambda slots, pack: Counter(len(group) for group in packs(made.cells, slots, pack))  # noqa: E731
    assert size(1, None) == {5: 2} and size(2, None) == {5: 2}
    assert size(3, None) == {2: 4, 1: 2} or size(3, None) == {2: 2, 3: 2}
    assert size(1, 1) == {1: 10} and size(1, 4) == {3: 2, 2: 2} and size(10, None) == {1: 10}
    for group in packs(made.cells, 1, None):
        assert len({planned.variant for planned in group}) == 1
    both = [p for lr in (1e-3, 3e-3) for p in plan(variants=["htc"], seeds=2, train={**RAW["train"], "lr": lr}).cells]
    assert [len(group) for group in packs(both, 1, None)] == [4]
    assert all(len(group) == 1 for group in packs(plan(train={**RAW["train"], "stacked": False}, seeds=5).cells, 1, 8))


def modes(**changes: Any) -> set[Any]:
    return {planned.cell.train.stacked for planned in plan(variants=["htc"], **changes).cells}


LARGE = {**RAW["model"], "d_model": 512}
ALONE = ("compile", "activation_checkpointing", "random_cycles", "sequence_cycles")
IMPOSSIBLE = [
    *({"train": {**RAW["train"], name: True}} for name in ALONE),
    {"train": {**RAW["train"], "processes": 2}},
    {"model": {**RAW["model"], "dropout": 0.1}},
]


def test_the_configuration_alone_says_whether_cells_are_stacked() -> None:
    assert modes() == modes(seeds=[7]) == modes(seeds=9) == {True}
    assert modes(model=LARGE) == {False}, "its arithmetic takes the time"
    assert modes(model=LARGE, train={**RAW["train"], "stacked": True}) == {True}
    assert modes(train={**RAW["train"], "stacked": False}) == {False}
    assert modes(train={**RAW["train"], "batch_size": 3000}) == {False}


@pytest.mark.parametrize("changes", IMPOSSIBLE, ids=str)
def test_what_cannot_be_stacked_is_not(changes: dict[str, Any]) -> None:
    assert modes(**changes) == {False}
    asked = {**RAW["train"], **changes.get("train", {}), "stacked": True}
    with pytest.raises(UserError, match=r"^train.stacked: True is impossible here: .* \(allowed: False, 'auto'\)$"):
        plan(**{**changes, "train": asked})


@pytest.mark.parametrize(
    ("part", "field", "values"),
    [("train", "precision", ("float32", "bfloat16")), ("model", "flops", ("full", "executed"))],
)
def test_a_study_is_of_one_kind(part: str, field: str, values: tuple[str, str]) -> None:
    first, second = ({"name": "htc", "label": value, part: {field: value}} for value in values)
    said = (
        f"{part}.{field}: '{values[0]}' for {values[0]} on p_hop, '{values[1]}' for {values[1]} on p_hop in one study"
    )
    with pytest.raises(UserError, match=said):
        plan(variants=[first, second], reference=None)


def untimed(record: Any) -> dict[str, Any]:
    told = json.loads(json.dumps(record.dump()))
    told["history"] = [{key: value for key, value in entry.items() if key != "seconds"} for entry in told["history"]]
    return {key: value for key, value in told.items() if key != "timing"}


@pytest.mark.long
def test_however_cells_are_run_they_get_the_same_bits(tmp_path: Path) -> None:
    """With others or alone, in one process or two, all at once or some seeds later."""
    many = {"variants": ["htc", {"name": "ztt", "label": "alone", "train": {"stacked": False}}], "reference": None}
    made, few = plan(seeds=3, **many), plan(seeds=1, **many)

    def ran(name: str, how: Running, *plans: Any) -> dict[str, Any]:
        for each in plans:
            run_study(each, Store(tmp_path / name), how, lambda *_: None)
        store = Store(tmp_path / name)
        return {p.cell.id: (store.record(p.cell.id), p.cell) for p in made.cells}

    by_hand = Store(tmp_path / "by hand")
    for planned in made.cells:
        run_cell(planned.cell, by_hand)
    ways = [
        ran("jobs 1", Running(1), made),
        ran("jobs 2", Running(2), made),
        ran("pack 1", Running(1, pack=1), made),
        ran("pack 2", Running(1, pack=2), made),
        ran("later", Running(1), few, made),
        {p.cell.id: (by_hand.record(p.cell.id), p.cell) for p in made.cells},
    ]
    for id, (expected, cell) in ways[0].items():
        assert expected.stacked is cell.train.stacked
        for way in ways[1:]:
            assert untimed(way[id][0]) == untimed(expected)
    assert {cell.train.stacked for _, cell in ways[0].values()} == {True, False}


@pytest.mark.long
def test_a_study_in_packs(tmp_path: Path) -> None:
    """Each cell has its own record, log and model; one that fails does so alone."""
    made, apart = plan(variants=["htc", "ztt"], seeds=3), {**RAW["train"], "stacked": False}
    lone = run_study(
        plan(variants=["htc", "ztt"], seeds=3, train=apart), Store(tmp_path / "lone"), Running(1), lambda *_: None
    )
    store, seen = Store(tmp_path / "packs"), list[str]()
    results = run_study(made, store, Running(1, pack=3), lambda record, planned: seen.append(record.id))
    assert sorted(seen) == sorted(results) and not set(results) & set(lone)
    for planned, other in zip(made.cells, lone.values(), strict=True):
        id = planned.cell.id
        assert not other.stacked and results[id].stacked
        assert_near(results[id].dump()["history"], other.dump()["history"])
        text = (store.folder(id) / "log.txt").read_text()
        assert text.count("INFO begins") == 1 and text.count("INFO done") == 1 and f"seed {planned.cell.seed}" in text
        assert (store.folder(id) / "model" / "model.safetensors").is_file()
        assert not list(store.folder(id).glob("lease.*")) and not (store.folder(id) / "checkpoints").exists()
    (again,) = rerun(store, made.manifest.cells, 1)
    assert not again.problem, "run again without its pack it gives the same numbers to the last digit"


def test_a_cell_that_blows_up_in_a_pack_fails_alone(tmp_path: Path) -> None:
    wild = {**RAW["train"], "grad_clip": 1e30, "weight_decay": 1e30}
    cells = [p for lr in (1e-33, 10.0) for p in plan(variants=["htc"], seeds=1, train={**wild, "lr": lr}).cells]
    made = plan(variants=["htc"], seeds=1)
    made = type(made)(made.study, tuple(cells), made.manifest)
    results = run_study(made, Store(tmp_path), Running(1, pack=2), lambda *_: None)
    good, bad = (results[planned.cell.id] for planned in cells)
    assert good.status == "done" and good.stacked
    assert bad.status == "failed" and "loss is nan" in bad.reason and bad.kind == "cell"
