"""Memory, in processes of their own: of a training step beside other libraries', and of batches of prepared data."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import torch

from bench.config import ModelConfig
from bench.data.batches import Batches
from bench.data.prepared import load_prepared, save
from bench.data.task import Metric, make_data
from bench.perf.resident import STATUS, peak_bytes, told
from bench.perf.timing import VOCAB, Row, quartiles, training_step
from bench.perf.training import GPT2, LLAMA, model_of, shape

TITLE = "memory in a fresh process; ratio: of a training step, theirs over ours; of data, that of their files over it"
MOST, STEPS = 2, 3
OWN = "RssAnon"  # memory that is no file's
SHAPES = (shape(256), shape(256, "llama"))
SEQUENCES, LENGTH = 1_000_000, 64


def rows(
    device: torch.device,
    rounds: int,
    shapes: Sequence[ModelConfig] = SHAPES,
    sequences: int = SEQUENCES,
    batch: int = 8,
    length: int = 256,
) -> list[Row]:
    """What a training step takes beyond the process that has imported everything (weights and the optimizer's state are
    in it) for ours and for transformers', in turns; and what is taken, beyond what the system may drop at any time, to
    draw batches from prepared data. On a CPU: on a GPU the training section tells it. Linux alone tells the second.
    """
    if device.type != "cpu":
        return []
    found: list[Row] = []
    for model in shapes:
        names = ("ours", GPT2 if model.family == "gpt2" else LLAMA)
        taken = np.array([[_step(name, model, batch, length) for name in names] for _ in range(min(rounds, MOST))])
        for place, name in enumerate(names):
            row: Row = {"what": f"a training step, d {model.d_model}, {length} tokens x {batch}", "model": name}
            row |= {"bytes": int(np.median(taken[:, place])), "rounds": len(taken)}
            found.append(row | (quartiles(taken[:, place] / taken[:, 0]) if place else {}))
    if STATUS.is_file():
        found.append(_data(sequences))
    return found


def step_bytes(name: str, model: str, batch: int, length: int) -> int:
    """The most memory that the process takes in STEPS steps beyond what it holds now. name: of a side of the training
    section; model: a ``ModelConfig`` as JSON.
    """
    torch.set_num_threads(1)
    lm = model_of(name, ModelConfig.model_validate_json(model), length)
    del lm  # what has been imported to make one is no part of a step
    before = psutil.Process().memory_info().rss
    step = training_step(model_of(name, ModelConfig.model_validate_json(model), length), VOCAB, batch, length)
    for _ in range(STEPS):
        step()
    return peak_bytes() - before


def batch_bytes(folder: str) -> int:
    """Memory that is no file's, taken to open prepared data and draw 200 batches of 32 of them."""
    before = told(OWN)
    found = load_prepared(Path(folder))
    assert found is not None
    batches = Batches(found.train, 32, 0)
    for step in range(200):
        batches.batch(step)
    return told(OWN) - before


def _step(name: str, model: ModelConfig, batch: int, length: int) -> int:
    return _child(f"step_bytes({name!r}, {model.model_dump_json()!r}, {batch}, {length})")


def _data(sequences: int) -> Row:
    draw = np.random.default_rng(0)
    few = draw.integers(VOCAB, size=(16, LENGTH + 1))
    many = draw.integers(VOCAB, size=(sequences, LENGTH + 1), dtype=np.uint8).astype(np.int64)
    splits = {name: (part[:, :-1], part[:, 1:]) for name, part in (("train", many), ("valid", few), ("test", few))}
    data = make_data(splits, VOCAB, Metric("accuracy", True, {}))
    with tempfile.TemporaryDirectory() as root:
        folder, room = Path(root) / data.fingerprint, Path(root) / "room"
        room.mkdir()
        save(data, folder, room)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        taken = _child(f"batch_bytes({str(folder)!r})")
    row: Row = {"what": f"batches of {sequences:,} prepared sequences of {LENGTH} tokens", "model": "ours"}
    return row | {"bytes": taken, "file_bytes": size, "ratio": size / taken}


def _child(call: str) -> int:
    run = f"from bench.perf import memory; print(memory.{call})"
    done = subprocess.run([sys.executable, "-c", run], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])
