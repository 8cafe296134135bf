"""Ids last: they are the same in every later version, and what would change their meaning is seen here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from test_runner import RAW, plan

from bench.config import Cell, CyclesSchedule, EvalConfig, Init, ModelConfig, RopeScaling, TrainConfig
from bench.data.task import tasks
from bench.model.variant import get_variant, variants

DEFAULTS = Path(__file__).parent / "defaults.json"
CPU = {"device": "cpu", "precision": "float32"}
BASE: dict[str, Any] = {
    "variant": "ztt",
    "options": {},
    "model": {},
    "train": {**CPU, "stacked": False},
    "task": "p_hop",
    "task_options": {},
    "seed": 0,
    "fingerprint": "f" * 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
FROZEN: list[tuple[dict[str, Any], str]] = [
    ({}, "229bcc1409b17f31"),
    (
        {"seed": 7, "train": {**CPU, "stacked": True}},
        "001e333abf1a1343",
    ),
    (
        {"train": {"device": "cuda", "precision": "bfloat16", "stacked": False, "lr": 3e-3, "steps": 50}},
        "29cbb52d31195c83",
    ),
    (
        {"options": {"gating": "head"}, "model": {"family": "llama", "rope_scaling": YARN}},
        "5f218484e6270638",
    ),
    (
        {"init": {"source": "cell:" + "a" * 64, "sharing": "average"}, "evaluation": {"max_cycles": 3}},
        "b11504a0fe999445",
    ),
    (
        {"variant": "htc", "task_options": {"hops": 2}, "train": {**CPU, "stacked": False, "processes": 2}},
        "fb9cb8b13ab31679",
    ),
]


def cell(**changes: Any) -> Cell:
    return Cell.model_validate({**BASE, **changes})


@pytest.mark.parametrize(("changes", "id"), FROZEN, ids=[id[:8] for _, id in FROZEN])
def test_ids_are_those_they_were(changes: dict[str, Any], id: str) -> None:
    assert cell(**changes).id.startswith(id), "an id has changed: results of days would be trained again"


def test_what_is_at_its_default_is_no_part_of_an_id() -> None:
    told = cell(model={"dropout": 0.0, "n_heads": 4}, train={**CPU, "stacked": False, "lr": 1e-3, "sharding": "none"})
    assert told.id == cell(evaluation={"max_cycles": None}, init=None).id == cell().id


def test_what_changes_no_number_is_no_part_of_an_id() -> None:
    assert cell(train={**BASE["train"], "activation_checkpointing": True}).id == cell().id


@pytest.mark.parametrize(
    "train",
    [{"device": "cuda"}, {"precision": "bfloat16"}, {"stacked": True}, {"threads": 2}, {"compile": True}, {"steps": 9}],
    ids=str,
)
def test_what_may_change_a_number_is_part_of_an_id(train: dict[str, Any]) -> None:
    assert cell(train={**BASE["train"], **train}).id != cell().id


class WiderModel(ModelConfig):
    new_part: int = 5


class WiderTrain(TrainConfig):
    new_habit: str = "none"


class WiderCell(Cell):
    model: WiderModel
    train: WiderTrain
    newer: bool = False


def test_a_new_field_leaves_every_id_as_it_was() -> None:
    for changes, id in FROZEN:
        assert WiderCell.model_validate({**BASE, **changes}).id.startswith(id)
    told = {**BASE, "model": {"new_part": 6}}
    assert WiderCell.model_validate(told).id != cell().id


def test_a_new_option_leaves_every_id_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [planned.cell.id for planned in plan().cells]
    for kind in (variants.get("ztt"), tasks.get("p_hop")):
        wider = type("Options", (kind.Options,), {"__annotations__": {"newest": int}, "newest": 3})
        monkeypatch.setattr(kind, "Options", wider)
    assert get_variant("ztt").options.newest == 3
    assert [planned.cell.id for planned in plan().cells] == before
    other = plan(variants=["htc", {"name": "ztt", "options": {"newest": 4}}])
    assert [planned.cell.id for planned in other.cells if planned.cell.id not in before], "given, it is part of the id"


def test_planned_ids_say_what_is_resolved() -> None:
    for planned in plan().cells:
        assert planned.cell.train.stacked is True and planned.cell.train.device in ("cpu", "cuda")
        assert planned.cell.options == {} and planned.cell.task_options == RAW["tasks"][0]["options"]
    given = plan(train={**RAW["train"], "device": "cpu", "precision": "float32", "stacked": True})
    if planned.cell.train.device == "cpu":
        assert [p.cell.id for p in given.cells] == [p.cell.id for p in plan().cells]


def defaults() -> dict[str, dict[str, Any]]:
    kinds: dict[str, type[BaseModel]] = {
        kind.__name__: kind for kind in (ModelConfig, RopeScaling, TrainConfig, CyclesSchedule, EvalConfig, Init)
    }
    for registry in (variants, tasks):
        ours = {
            name: kind for name, kind in registry.items().items() if kind.__module__.startswith(("bench", "variants"))
        }
        kinds |= {f"{registry.kind} {name}": kind.Options for name, kind in sorted(ours.items())}

    def shown(field: Any) -> Any:
        value = field.get_default(call_default_factory=True)
        return "(required)" if value is PydanticUndefined else json.loads(json.dumps(value, default=list))

    return {name: {key: shown(field) for key, field in kind.model_fields.items()} for name, kind in kinds.items()}


def test_no_default_has_changed() -> None:
    frozen, now = json.loads(DEFAULTS.read_text()), defaults()
    changed = {
        f"{kind}.{key}": (value, now[kind][key])
        for kind, fields in frozen.items()
        for key, value in fields.items()
        if now.get(kind, {}).get(key, value) != value
    }
    assert changed == {}, "ids leave out what is at its default: another default needs another RESULTS_SCHEMA"
    gone = [f"{kind}.{key}" for kind, fields in frozen.items() for key in fields if key not in now.get(kind, {})]
    assert gone == [], "cells in stores have this field: a field that goes needs another RESULTS_SCHEMA"
    new = {
        kind: {key: fields[key] for key in fields if key not in frozen.get(kind, {})} for kind, fields in now.items()
    }
    assert {kind: fields for kind, fields in new.items() if fields} == {}, f"add these to {DEFAULTS.name}"
