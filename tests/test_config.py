"""What a cell is: its id stays what it was, and how it is computed is a part of its training that stands alone."""

from __future__ import annotations

import pytest

from bench.config import Execution, TrainConfig, parse
from bench.errors import UserError
from bench.train.device import autocast, device_of, environment_of, pick_device


def test_how_it_is_computed_is_stored_beside_what_is() -> None:
    told = TrainConfig(threads=2, precision="bfloat16").model_dump()
    assert told["threads"] == 2 and told["precision"] == "bfloat16" and set(Execution.model_fields) < set(told)
    assert not any(isinstance(value, dict) for value in told.values())


def test_a_device_is_chosen_by_how_alone() -> None:
    how = Execution(device="cpu", threads=3, precision="float32")
    assert device_of(how).type == pick_device(how).type == "cpu"
    assert environment_of(how).threads == 3
    with autocast(how, device_of(how)):
        pass


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sharding": "full"}, "sharding = 'full' needs processes > 1"),
        ({"compile": True, "processes": 2}, "compile = True needs processes = 1, not 2"),
        ({"compile": True, "activation_checkpointing": True}, "needs compile = False"),
        ({"cuda_graphs": True, "compile": True}, "cuda_graphs = True needs compile = False"),
        ({"cuda_graphs": True, "processes": 2}, "cuda_graphs = True needs processes = 1, not 2"),
    ],
)
def test_what_cannot_be_computed_so_is_refused(fields: dict[str, object], message: str) -> None:
    for kind in (Execution, TrainConfig):
        with pytest.raises(UserError, match=message):
            parse(kind, fields, "train")


def test_cuda_graphs_need_the_same_number_of_cycles_at_every_step() -> None:
    with pytest.raises(UserError, match="cuda_graphs = True needs random_cycles = False"):
        parse(TrainConfig, {"cuda_graphs": True, "random_cycles": True}, "train")
