"""The host waits for a GPU where it reads a value there: never in a training step, and once at an exit point, to learn
who leaves.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from settings import DEFAULT_ID, DEFAULTS, make, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from bench.config import TrainConfig
from bench.data import get_task
from bench.errors import UserError
from bench.exits.execute import Granularity, execute
from bench.exits.generation import EarlyExit
from bench.model import CycleForCausalLM
from bench.train import Training, gradients

aten = torch.ops.aten
READS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.unique_consecutive)
RULES = ("cosine", "confidence", "zero_attention")
defaults = pytest.mark.parametrize(("name", "options"), DEFAULTS, ids=DEFAULT_ID)


class Waits(TorchDispatchMode):
    """Collects the operations whose result's shape, or the host's next step, depends on a value on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        of = func.overloadpacket
        masks = of is aten.index and any(index is not None and index.dtype is torch.bool for index in args[1])
        if of in READS or masks:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def usable(lm: CycleForCausalLM, key: str) -> bool:
    return lm.schedule.n_cycles > 1 and (key != "zero_attention" or lm.prefix is not None)


def test_what_waits_is_seen() -> None:
    with Waits() as waits:
        x = torch.arange(4)
        _ = x[x > 1], x.nonzero(), int(x[0]), bool((x > 9).any())
    assert len(waits.found) == 4


@defaults
@pytest.mark.parametrize("granularity", ["sequence", "token"])
def test_executed_exits(name: str, options: dict[str, Any], granularity: Granularity) -> None:
    lm, ids, goal = make(name, options), tokens(8).numpy(), tokens(8, seed=1).numpy()
    for key in (key for key in RULES if usable(lm, key)):
        for threshold in np.linspace(0.02, 0.98, 5):
            try:
                with Waits() as waits:
                    execute(lm, ids, goal, key, float(threshold), granularity=granularity)
            except UserError as error:
                assert "chooses the tokens of a cycle by itself" in str(error)
            assert not waits.found, (key, threshold)


@defaults
@pytest.mark.parametrize("kv", ["recompute", "propagate", "share_first"])
def test_a_pass_of_generation(name: str, options: dict[str, Any], kv: Any) -> None:
    lm = make(name, options)
    for key in (key for key in RULES if usable(lm, key)):
        for threshold in (0.1, 0.5, 0.9):
            lm.exits = EarlyExit(key, threshold, kv)
            with Waits() as waits:
                cache = lm(tokens(4, 6), use_cache=True).cache
                for seed in range(3):
                    lm(tokens(4, 1, seed), cache=cache, use_cache=True)
            assert not waits.found, (key, threshold)


@defaults
def test_a_training_step(name: str, options: dict[str, Any]) -> None:
    data = get_task("p_hop", {"length": 12, "n_train": 50, "n_valid": 5, "n_test": 5}).build()
    lm = make(name, options, dropout=0.1)  # with which attention takes the form that it has on a GPU
    run = Training(lm, data, TrainConfig(steps=9, batch_size=4, accumulation=2, eval_every=9), 0)
    for _ in range(2):
        with Waits() as waits:
            run.advance(gradients([run])[0])
            assert run.read() is None
        assert not waits.found
