"""The host waits for a GPU where it reads a value there: never in a training step, and once at an exit point, to learn
who leaves.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from settings import DEFAULT_ID, DEFAULTS, EVERY, LENGTH, VOCAB, make, shape, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.config import TrainConfig
from bench.data.task import get_task
from bench.errors import UserError
from bench.exits.execute import Granularity, execute
from bench.exits.generation import EarlyExit
from bench.model.language_model import CycleForCausalLM, build_model
from bench.model.variant import get_variant
from bench.train.loop import Training, gradients, loss_of

aten = torch.ops.aten
READS = (
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero),
    *(aten.unique_consecutive, aten._unique2, aten.repeat_interleave),
)
RULES = ("cosine", "confidence", "zero_attention")
defaults = pytest.mark.parametrize(("name", "options"), DEFAULTS, ids=DEFAULT_ID)


class Waits(TorchDispatchMode):
    """Collects the operations whose result's shape, or the host's next step, depends on a value on the device; counts
    how often a tensor is brought to the host as a whole.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.brought = 0

    def __enter__(self) -> Any:
        self.patch = pytest.MonkeyPatch()
        for name in ("cpu", "tolist"):
            self.patch.setattr(torch.Tensor, name, self._counted(getattr(torch.Tensor, name)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patch.undo()

    def _counted(self, original: Any) -> Any:
        def bring(tensor: torch.Tensor) -> Any:
            self.brought += 1
            return original(tensor)

        return bring

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        of = func.overloadpacket
        masks = of in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_) and any(
            index is not None and index.dtype is torch.bool for index in args[1]
        )
        if of in READS or masks:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def usable(lm: CycleForCausalLM, key: str) -> bool:
    return lm.schedule.n_cycles > 1 and (key != "zero_attention" or lm.prefix is not None)


def test_what_waits_is_seen() -> None:
    with Waits() as waits:
        x = torch.arange(4)
        _ = x[x > 1], x.nonzero(), int(x[0]), bool((x > 9).any())
        x[x > 1] = 0
        _ = x.tolist(), x.cpu()
    assert len(waits.found) == 5 and waits.brought == 2


@defaults
@pytest.mark.parametrize("granularity", ["sequence", "token"])
def test_executed_exits(name: str, options: dict[str, Any], granularity: Granularity) -> None:
    lm, ids, goal = make(name, options), tokens(8).numpy(), tokens(8, seed=1).numpy()
    for key in (key for key in RULES if usable(lm, key)):
        for threshold in (0.1, 0.5, 0.9):
            try:
                with Waits() as waits:
                    execute(lm, ids, goal, key, threshold, granularity=granularity)
            except UserError as error:
                assert "chooses the tokens of a cycle by itself" in str(error)
            # Once at each exit point, once for all scores; none of it for each of the sequences, tokens or steps.
            assert not waits.found and waits.brought <= lm.schedule.n_cycles, (key, threshold)


@defaults
@pytest.mark.parametrize("kv", ["recompute", "propagate"])
def test_a_pass_of_generation(name: str, options: dict[str, Any], kv: Any) -> None:
    lm = make(name, options)
    for key in (key for key in RULES if usable(lm, key)):
        lm.exits = EarlyExit(key, 0.5, kv)
        with Waits() as waits:
            cache = lm(tokens(4, 6), use_cache=True).cache
            for seed in range(2):
                lm(tokens(4, 1, seed), cache=cache, use_cache=True)
        assert not waits.found and waits.brought <= 3 * (lm.schedule.n_cycles - 1), key


@defaults
def test_a_training_step(name: str, options: dict[str, Any]) -> None:
    data = get_task("p_hop", {"length": 12, "n_train": 50, "n_valid": 5, "n_test": 5}).build()
    lm = make(name, options, dropout=0.1)  # with which attention takes the form that it has on a GPU
    run = Training(lm, data, TrainConfig(steps=9, batch_size=4, accumulation=2, eval_every=9), 0)
    for _ in range(2):
        with Waits() as waits:
            run.advance(gradients([run])[0])
            assert run.read() is None
        assert not waits.found and not waits.brought


class Hosted(TorchDispatchMode):
    """Collects the operations that read or make something on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device.type == "cpu" for tensor in tensors):
            self.found.append(str(func))
        return out


@pytest.mark.parametrize(("name", "options", "family"), EVERY)
@pytest.mark.long
def test_a_training_step_away_from_the_host(
    name: str, options: dict[str, Any], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device that holds no values: whatever asked for one would fail, and a copy from the host is seen."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # which does not know the device
    variant = get_variant(name, options)
    with torch.device("meta"):
        lm = build_model(variant, shape(variant, family, n_cycles=2), VOCAB, LENGTH).train()
        batch, scored = torch.zeros(2, LENGTH, dtype=torch.long), torch.ones(())
    with Hosted() as hosted:
        loss_of(TrainConfig(), None)(lm, batch, batch, scored)[0].backward()
    assert not hosted.found
