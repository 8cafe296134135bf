"""Recorded passes: what is around the recording is tested everywhere, the recording itself where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from settings import DEFAULT_ID, DEFAULTS, make
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.config import ModelConfig, TrainConfig
from bench.data.task import TaskData, get_task
from bench.errors import UserError
from bench.train.device import pick_device, repeatable
from bench.train.graphs import Replayed
from bench.train.loop import train

CONFIG = TrainConfig(steps=12, batch_size=8, accumulation=2, eval_sequences=8, cuda_graphs=True)
defaults = pytest.mark.parametrize(("name", "options"), DEFAULTS, ids=DEFAULT_ID)


@pytest.fixture(scope="module")
def data() -> TaskData:
    return get_task("p_hop", {"length": 12, "n_train": 200, "n_valid": 20, "n_test": 20}).build()


class Recorder(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: the operations of one run, to be done again with the very tensors they had."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.done:
            for place, value in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(place, torch.Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)


def recorded(run: Callable[[], None]) -> Callable[[], object]:
    """``bench.train.graphs.cuda_graph`` on a CPU: a run that is not wanted, and one that is recorded."""
    run()
    with Recorder() as recorder:
        run()
    return recorder.replay


def trained(
    data: TaskData, config: TrainConfig, name: str, options: dict[str, Any], device: str, dropout: float
) -> Any:
    # GELU by its definition: its tanh form is computed otherwise where operations are looked at, and so recorded.
    lm = make(name, options, dropout=dropout, activation="gelu").to(device)  # type: ignore[arg-type]
    with repeatable(0, 1):
        history = train(lm, data, config, 0)
    untimed = [{key: value for key, value in entry.items() if key != "seconds"} for entry in history]
    return untimed, {key: value.cpu() for key, value in lm.state_dict().items()}


@defaults
@pytest.mark.long
def test_recorded_passes_train_to_the_same_bits(
    data: TaskData, name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of every variant is the same operations every time; micro-batches add up and steps do not; what is run to
    be recorded leaves neither gradients nor draws (dropout, noise).
    """
    monkeypatch.setattr("bench.train.loop.cuda_graph", recorded)
    plain = trained(data, CONFIG.model_copy(update={"cuda_graphs": False}), name, options, "cpu", 0.1)
    found = trained(data, CONFIG, name, options, "cpu", 0.1)
    assert found[0] == plain[0]
    for key, value in plain[1].items():
        assert torch.equal(found[1][key], value), key


def test_what_has_no_gradient_gets_none() -> None:
    """The optimizer would let it decay."""
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    def passes(x: torch.Tensor) -> torch.Tensor:
        loss = (used * x).sum()
        loss.backward()
        return loss.detach()

    replayed = Replayed([used, unused], torch.device("cpu"), recorded)
    first = replayed(passes, torch.tensor([1.0, 2.0]))
    assert first == 3 and unused.grad is None and used.grad is not None and used.grad.tolist() == [1, 2]
    used.grad.zero_()
    assert replayed(passes, torch.tensor([3.0, 4.0])) == 7 and used.grad.tolist() == [3, 4] and first == 3


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"compile": True}, "cuda_graphs = True needs compile = False"),
        ({"activation_checkpointing": True}, "cuda_graphs = True needs activation_checkpointing = False"),
        ({"random_cycles": True}, "cuda_graphs = True needs random_cycles = False"),
        ({"processes": 2}, "cuda_graphs = True needs processes = 1, not 2"),
    ],
)
def test_what_changes_from_step_to_step_is_refused(other: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainConfig(**{"cuda_graphs": True, "batch_size": 8, **other})


def test_frequencies_made_on_the_host_are_refused() -> None:
    scaled = ModelConfig(family="llama", rope_scaling={"rope_type": "linear", "factor": 2.0})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"cuda_graphs: True cannot be had with model.rope_scaling \(allowed: False\)"):
        CONFIG.check(scaled)


def test_on_a_cpu_they_are_refused() -> None:
    with pytest.raises(UserError, match=r"train.cuda_graphs: True needs a GPU \(allowed here: False\)"):
        pick_device(CONFIG.model_copy(update={"device": "cpu"}))


@pytest.mark.cuda
@defaults
def test_a_graph_trains_to_the_same_bits(data: TaskData, name: str, options: dict[str, Any]) -> None:
    config = CONFIG.model_copy(update={"precision": "float32"})
    plain = trained(data, config.model_copy(update={"cuda_graphs": False}), name, options, "cuda", 0.0)
    found = trained(data, config, name, options, "cuda", 0.0)
    for key, value in plain[1].items():
        assert torch.equal(found[1][key], value), key
