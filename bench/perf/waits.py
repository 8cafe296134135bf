"""Whether the host waits for the GPU within a training step: torch tells of every such moment."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from bench.config import TrainConfig
from bench.data.task import task_data
from bench.model.language_model import build_model
from bench.model.variant import get_variant
from bench.perf.timing import Row
from bench.perf.training import shape
from bench.train.loop import Training, gradients
from bench.train.modes import stackable

TITLE = "moments of a training step in which the host waits for the GPU, by variant, alone and two seeds in a stack"
SAID = "called a synchronizing"  # what torch says of such a moment
WARM = 2  # steps before the one that is watched
DATA = {"length": 12, "n_train": 50, "n_valid": 5, "n_test": 5}


def rows(device: torch.device, name: str) -> Iterator[Row]:
    """A row for each way to compute a step of a variant, at its default options: ``waits``, and the lines of code that
    wait. On a CPU there is a ``note`` in their place.
    """
    data = task_data("p_hop", DATA)
    config = TrainConfig(steps=100, batch_size=4, accumulation=2, eval_every=100, eval_sequences=2)
    variant = get_variant(name)
    model = shape(32, n_blocks=4).model_copy(update={"n_cycles": 2 if variant.cycled else 1})
    for mode, seeds in (("alone", 1), ("stacked", 2)):
        if mode == "stacked" and not stackable(variant, model, data.vocab_size, data.length, config):
            continue
        runs = []
        for seed in range(seeds):
            lm = build_model(variant, model, data.vocab_size, data.length)
            lm.reset_parameters(seed)
            lm.to(device)  # type: ignore[arg-type]
            runs.append(Training(lm, data, config, seed, stacked=mode == "stacked"))
        yield {"variant": name, "mode": mode} | _watched(runs, device)


def _watched(runs: Sequence[Training], device: torch.device) -> Row:
    """What is told of one step of the runs, after some that are not watched."""

    def step() -> None:
        for run, loss in zip(runs, gradients(runs), strict=True):
            run.advance(loss)

    for _ in range(WARM):
        step()
    if device.type != "cuda":
        step()
        return {"note": "there is no GPU to wait for"}
    with waits() as found:
        step()
    return {"waits": sum(found.values()), "where": ", ".join(f"{place} ({n})" for place, n in found.items())}


@contextmanager
def waits() -> Iterator[Counter[str]]:
    """Count the moments by the line of code, ``file:number``; they are there when it is left."""
    found: Counter[str] = Counter()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            yield found
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found.update(f"{Path(each.filename).name}:{each.lineno}" for each in told if SAID in str(each.message))
