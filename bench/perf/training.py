"""Training throughput against other libraries at equal shape: eager, compiled, and as a whole loop."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch._inductor.utils import fresh_cache

from bench.config import ModelConfig, TrainConfig
from bench.data.task import TaskData, task_data
from bench.errors import typed_line
from bench.model.costs import count, training_flops
from bench.model.language_model import CycleForCausalLM, build_model
from bench.model.variant import get_variant
from bench.perf.rivals import XTransformers, beside_trainer, missing, stock
from bench.perf.timing import (
    VOCAB,
    Precision,
    Row,
    Run,
    in_turns,
    matmul,
    peak,
    quartiles,
    timed,
    training_step,
    wait,
)
from bench.train.loop import Training, compile_blocks, gradients
from bench.train.packing import keep_freed_memory

TITLE = "training, float32: tokens/s, share of the matmul peak; ratio: how many times as fast ours is"
GPT2, LLAMA, X = "transformers GPT-2", "transformers Llama", "x-transformers"
BLOCKS, GRAPH = "ours, as train.compile does it", "ours, as train.cuda_graphs does it"
TRAINER, LOOP = "transformers' Trainer", "ours, in cyclebench's loop"
OURS = ("ours", BLOCKS, GRAPH, LOOP)  # no rivals to be faster than


def shape(
    d_model: int,
    family: Literal["gpt2", "llama"] = "gpt2",
    n_blocks: int = 6,
    activation: Literal["gelu_tanh", "gelu"] = "gelu_tanh",
) -> ModelConfig:
    """Of a plain stack with heads of 64, or two where that is more."""
    return ModelConfig(
        family=family,
        activation=activation,
        d_model=d_model,
        n_heads=max(2, d_model // 64),
        n_blocks=n_blocks,
        n_cycles=1,
    )


# GPT-2 has GELU in its tanh form, x-transformers by its definition: each is held against ours with the same.
EAGER = (
    *(shape(width, activation=kind) for width in (128, 256, 384) for kind in ("gelu_tanh", "gelu")),
    *(shape(width, "llama") for width in (128, 256, 384)),
)
# Those of transformers' kinds, again in a process that keeps the memory it frees.
KEPT = tuple(model for model in EAGER if model.d_model < 384 and model.activation == "gelu_tanh")
COMPILED = (shape(128), shape(128, activation="gelu"))
LOOPS = (shape(128), shape(256))


def rows(
    device: torch.device,
    rounds: int,
    eager: Sequence[ModelConfig] = EAGER,
    compiled: Sequence[ModelConfig] = COMPILED,
    loops: Sequence[ModelConfig] = LOOPS,
    batch: int = 8,
    length: int = 256,
    precision: Precision = "float32",
    rivals: Collection[str] = (GPT2, LLAMA, X),
    kept: Sequence[ModelConfig] = KEPT,
) -> list[Row]:
    """A row for each model at each shape; the sides of a shape and a large matmul take turns.

    On a CPU single steps run as in any process of PyTorch's. Our training lets its process keep the memory that it
    frees (``bench.train.packing.keep_freed_memory``), which serves other models no less: the mode "eager, kept" and
    whole loops have it on all sides.

    ``peak_share``: what the shape's training FLOPs take at the matmul's speed over what the step takes; ``params`` of
    all sides agree within a percent. A side that cannot run has a ``note`` that says why, and no figures. On a GPU
    ``step_bytes`` is the memory of a step (``bench.perf.timing.peak``); that of a CUDA graph is held for good.

    Args:
        device: that all of it runs on.
        rounds: turns of every comparison.
        eager: shapes of single steps.
        compiled: shapes of single steps of compiled models.
        loops: shapes that are trained in whole loops, in float32.
        batch: sequences of a step.
        length: their tokens.
        precision: of single steps.
        rivals: in single steps, where they are of the shape's family and activation.
        kept: shapes of single steps in a process that keeps the memory it frees, on a CPU; it does from there on.
    """
    found = []
    for model in eager:
        found += _steps(model, "eager", device, rounds, batch, length, precision, rivals)
    reason = no_compiler()
    for model in compiled:
        refused = [{**_start("all", model, "compiled"), "note": reason}]
        found += refused if reason else _steps(model, "compiled", device, rounds, batch, length, precision, rivals)
    if device.type == "cpu" and kept:
        keep_freed_memory()
        for model in kept:
            found += _steps(model, "eager, kept", device, rounds, batch, length, precision, rivals)
    for model in loops:
        found += _loops(model, device, rounds, batch, length)
    return found


def _steps(
    model: ModelConfig,
    mode: str,
    device: torch.device,
    rounds: int,
    batch: int,
    length: int,
    precision: Precision,
    rivals: Collection[str],
) -> list[Row]:
    """Single training steps on random tokens. mode: if "compiled", others are compiled whole and ours as in training.
    A side that fails does so alone, but for ours, which the others are held against.
    """
    compiled = mode == "compiled"
    base, more = BLOCKS if compiled else "ours", (GRAPH,) if device.type == "cuda" and not compiled else ()
    alike = (LLAMA, X) if model.family == "llama" else (GPT2,) if model.activation == "gelu_tanh" else (X,)
    names = (base, *(name for name in alike if name in rivals), *more)
    sides = {name: model_of(name, model, length).to(device) for name in names if missing(name) is None}
    extra: dict[str, Row] = {name: {} for name in names}
    steps: dict[str, Run] = {}
    with fresh_cache():  # what was compiled before would not be compiled now
        if compiled:
            torch.compile(nn.Linear(1, 1))(torch.ones(1, 1)).backward()  # the compiler's own start is nobody's
        for name, lm in sides.items():
            run: Any = torch.compile(lm) if compiled and name != BLOCKS else lm
            if name == BLOCKS:
                compile_blocks(cast(CycleForCausalLM, lm))
            step = training_step(lm, VOCAB, batch, length, run, name == GRAPH, precision)
            try:
                first = timed(step)
            except Exception as error:
                if name == base:
                    raise
                extra[name]["note"] = typed_line(error)
                continue
            steps[name] = step
            extra[name] |= {"compile_seconds": first - timed(step)} if compiled else {}
        product, product_flops = matmul(device, precision)
        seconds = in_turns([*steps.values(), product], rounds)
        for name, step in steps.items():
            extra[name] |= peak(step, device) if name != GRAPH else {}
    torch.compiler.reset()
    rows = _rows(model, mode, {name: sides[name] for name in steps}, seconds, product_flops, batch, length)
    found = []
    for name in names:
        told = rows.get(name) or {**_start(name, model, mode), "note": missing(name)}
        found.append(told | extra[name])
    return found


def _loops(model: ModelConfig, device: torch.device, rounds: int, batch: int, length: int) -> list[Row]:
    """Our loop and transformers' Trainer on the embedded text: batches, schedule, clipping and readings included."""
    reason = missing(TRAINER)
    if reason is not None:
        return [{**_start(TRAINER, model, "loop"), "note": reason}]
    data = task_data("kjv", {"length": length, "n_train": 64 * batch, "n_valid": batch, "n_test": batch})
    sides = {LOOP: _ours(model, length, data).to(device), TRAINER: stock(model, data.vocab_size, length).to(device)}
    steps = 100 * (rounds + 100)  # so many that no validation falls due
    config = TrainConfig(steps=steps, batch_size=batch, eval_every=steps, precision="float32")
    run = Training(sides[LOOP], data, config, 0)

    def step() -> None:
        run.advance(gradients([run])[0])
        run.look(run.read())
        wait(device)

    product, product_flops = matmul(device)
    seconds = beside_trainer(sides[TRAINER], data.train, batch, rounds, [step, product])[:, [1, 0, 2]]
    return list(_rows(model, "loop", sides, seconds, product_flops, batch, length).values())


def _rows(
    model: ModelConfig,
    mode: str,
    sides: dict[str, Any],
    seconds: NDArray[np.float64],
    product_flops: int,
    batch: int,
    length: int,
) -> dict[str, Row]:
    """By side. seconds: [rounds, sides and the matmul], ours first."""
    ours = next(iter(sides.values()))
    share = batch * training_flops(ours, length) / product_flops * seconds[:, -1:] / seconds
    found = {}
    for place, (name, lm) in enumerate(sides.items()):
        row = _start(name, model, mode) | {"params": count(lm.parameters())}
        row["tokens_per_second"] = batch * length / float(np.median(seconds[:, place]))
        row["peak_share"] = float(np.median(share[:, place]))
        row["rounds"] = len(seconds)
        found[name] = row | ({} if name in OURS else quartiles(seconds[:, place] / seconds[:, 0]))
    return found


def _start(name: str, model: ModelConfig, mode: str) -> Row:
    about = {"family": model.family, "activation": model.activation, "d_model": model.d_model}
    return {"model": name, **about, "mode": mode}


def _ours(model: ModelConfig, length: int, data: TaskData | None = None) -> Any:
    lm = build_model(get_variant("vanilla"), model, data.vocab_size if data else VOCAB, length)
    lm.reset_parameters(0)
    return lm


def model_of(name: str, model: ModelConfig, length: int) -> nn.Module:
    """Of a side, by its name."""
    if name in OURS:
        return _ours(model, length)
    return XTransformers(model, VOCAB, length) if name == X else stock(model, VOCAB, length)


def no_compiler() -> str | None:
    """Why ``torch.compile`` cannot work here, None if it can."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # start-up
    from torch._inductor.exc import InvalidCxxCompiler  # start-up

    try:
        compiler = get_cpp_compiler()
    except InvalidCxxCompiler:
        compiler = ""
    return None if compiler and shutil.which(compiler) else "not compiled: there is no C++ compiler here"
