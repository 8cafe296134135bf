"""Recorded passes: what is around the recording is tested everywhere, the recording itself where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from settings import DEFAULT_ID, DEFAULTS, make
from torch import nn

from bench.config import TrainConfig
from bench.data import TaskData, get_task
from bench.errors import UserError
from bench.graphs import Replayed
from bench.train import pick_device, train

CONFIG = TrainConfig(steps=12, batch_size=8, accumulation=2, eval_sequences=8, cuda_graphs=True)
defaults = pytest.mark.parametrize(("name", "options"), DEFAULTS, ids=DEFAULT_ID)


@pytest.fixture(scope="module")
def data() -> TaskData:
    return get_task("p_hop", {"length": 12, "n_train": 200, "n_valid": 20, "n_test": 20}).build()


def again(run: Callable[[], None]) -> Callable[[], object]:
    """What a CUDA graph is from outside: some runs whose effects are not wanted, then one whenever it is asked for."""
    for _ in range(3):
        run()
    return run


def trained(
    data: TaskData, config: TrainConfig, name: str, options: dict[str, Any], device: str, dropout: float
) -> Any:
    lm = make(name, options, dropout=dropout).to(device)  # type: ignore[arg-type]
    torch.manual_seed(0)
    history = train(lm, data, config, 0)
    untimed = [{key: value for key, value in entry.items() if key != "seconds"} for entry in history]
    return untimed, {key: value.cpu() for key, value in lm.state_dict().items()}


@defaults
def test_repeated_passes_train_to_the_same_bits(
    data: TaskData, name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro-batches add up, steps do not, trial runs leave neither gradients nor draws (dropout, noise)."""
    monkeypatch.setattr("bench.train.cuda_graph", again)
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

    replayed = Replayed(passes, [used, unused], torch.device("cpu"), again)
    first = replayed(torch.tensor([1.0, 2.0]))
    assert first == 3 and unused.grad is None and used.grad is not None and used.grad.tolist() == [1, 2]
    used.grad.zero_()
    assert replayed(torch.tensor([3.0, 4.0])) == 7 and used.grad.tolist() == [3, 4] and first == 3


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


def test_on_a_cpu_they_are_refused() -> None:
    with pytest.raises(UserError, match=r"train.cuda_graphs: True needs a GPU \(allowed here: False\)"):
        pick_device(CONFIG.model_copy(update={"device": "cpu"}))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@defaults
def test_a_graph_trains_to_the_same_numbers(data: TaskData, name: str, options: dict[str, Any]) -> None:
    config = CONFIG.model_copy(update={"precision": "float32"})
    plain = trained(data, config.model_copy(update={"cuda_graphs": False}), name, options, "cuda", 0.0)
    found = trained(data, config, name, options, "cuda", 0.0)
    for key, value in plain[1].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-3, atol=1e-4, msg=key)
