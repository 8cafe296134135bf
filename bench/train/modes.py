"""How a cell is computed, decided when it is planned: its device, its precision, and whether in a stack.

All three change numbers, the last one in the last digits (``bench.train.packing``). So they follow from the cell's
configuration alone, and its id says them. What else is run, by how many processes, and how much room there is decides
only how many cells go into one stack.
"""

from __future__ import annotations

import json
from contextlib import suppress
from functools import lru_cache
from typing import Any, Literal, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.config import ModelConfig, TrainConfig
from bench.errors import UserError
from bench.model.costs import meta_model, training_flops
from bench.model.forms import blank
from bench.model.freezing import freeze
from bench.model.network import Network
from bench.model.tried import telling
from bench.model.variant import Variant
from bench.train.loop import loss_of
from bench.train.packing import run_stacked, stacks

DEEP, FEW = 64, 6  # steps of a model that is tried with so few cycles and blocks
LEAST = 4  # models in a stack: with fewer, stacking costs more time than it saves
CPU_FLOPS = 6e8  # of a step, on one CPU thread: above it the arithmetic takes the time, not the calls
CUDA_FLOPS = 1e12  # of a step of all models of a stack: that much keeps a GPU busy

Kind = Literal["cpu", "cuda"]
APART = {  # fields of the training that a stack cannot have
    "compile": "runs a program of its own",
    "cuda_graphs": "runs a program of its own",
    "activation_checkpointing": "computes parts again outside the stack",
    "random_cycles": "gives every seed a depth of its own",
    "sequence_cycles": "gives every seed a depth of its own",
    "shortcut_loss": "gives every seed a second pass of its own",
}


def resolved(
    config: TrainConfig,
    kind: Kind,
    variant: Variant,
    model: ModelConfig,
    vocab_size: int,
    length: int,
    pretrained: bool = False,
) -> TrainConfig:
    """The training with every ``auto`` resolved.

    Args:
        config: as the study says.
        kind: of the device that it runs on.
        variant: that is trained.
        model: its shape.
        vocab_size: of the data.
        length: tokens of a sequence.
        pretrained: whether it starts from a model outside the study.

    Raises:
        UserError: if ``stacked`` is asked for and impossible.
    """
    precision = config.precision
    if precision == "auto":
        precision = "bfloat16" if kind == "cuda" else "float32"
    config = config.model_copy(update={"device": kind, "precision": precision})
    if config.stacked is False:
        return config
    reason = _apart(config, pretrained)
    if config.stacked is True:
        if not reason and not _possible(variant, model, vocab_size, length, config):
            reason = "the model draws random numbers in training (dropout, noise), or its data decide what runs"
        if reason:
            raise UserError(f"train.stacked: True is impossible here: {reason} (allowed: False, 'auto')")
        return config
    pays = not reason and _pays(variant, model, vocab_size, length, config)
    stacked = pays and _possible(variant, model, vocab_size, length, config)
    return config.model_copy(update={"stacked": stacked})


def _apart(config: TrainConfig, pretrained: bool) -> str:
    """Why such cells cannot be stacked, whatever their models; '' if they can."""
    for field, reason in APART.items():
        if getattr(config, field):
            return f"{field} = {getattr(config, field)} {reason}"
    if config.processes > 1:
        return f"each of processes = {config.processes} has only a part of the cell's batch"
    return "what starts from a pretrained model is large enough alone" if pretrained else ""


def _pays(variant: Variant, model: ModelConfig, vocab_size: int, length: int, config: TrainConfig) -> bool:
    """Whether a step is so small that its calls take the time, and not its arithmetic."""
    lm = meta_model(variant, model, vocab_size, length)
    freeze(lm, config.trained)
    flops = config.batch_size * training_flops(lm, length, None, config.backward_cycles)
    if config.device == "cuda":
        return flops * LEAST <= CUDA_FLOPS
    return flops < CPU_FLOPS * stacks(LEAST, config.threads)  # the smallest pack has so many threads


def _possible(variant: Variant, model: ModelConfig, vocab_size: int, length: int, config: TrainConfig) -> bool:
    """``stackable``, remembered: a study asks for every seed and learning rate."""
    model = _shallow(variant, model)
    options = json.dumps(variant.options.model_dump(mode="json"), sort_keys=True)
    alike = config.model_copy(update={"lr": 1e-3, "steps": 1})
    return _remembered(cast(Any, type(variant)), options, model, vocab_size, length, alike)


def _shallow(variant: Variant, model: ModelConfig) -> ModelConfig:
    """A shape that does what the given one does, in fewer cycles and blocks where these are many: to try it takes a
    thirtieth of a second a step, and neither number decides which kinds of operations run.
    """
    if variant.schedule(model).depth <= DEEP:
        return model
    for fields in (("n_cycles", "n_blocks"), ("n_cycles",)):
        fewer = model.model_copy(update={field: min(getattr(model, field), FEW) for field in fields})
        with suppress(UserError):  # the prelude and the coda may need more blocks
            variant.schedule(fewer)
            return fewer
    return model


@lru_cache(maxsize=1024)
def _remembered(kind: Any, options: str, model: ModelConfig, vocab_size: int, length: int, config: TrainConfig) -> bool:
    return stackable(kind(kind.Options.model_validate_json(options)), model, vocab_size, length, config)


def stackable(variant: Variant, model: ModelConfig, vocab_size: int, length: int, config: TrainConfig) -> bool:
    """Whether several such models can do a training step as one. This is tried, on tensors without numbers.

    It is not possible if training draws random numbers (dropout, noise): a model in a stack would get other draws than
    a model alone. It is not possible either if the data decide which operations run.
    """
    with FakeTensorMode():
        lm = telling(Network(variant, model, vocab_size, length)).train()
        inputs, targets = (part.expand(2, *part.shape) for part in blank(model.form, 1, length))
        try:
            run_stacked([lm, lm], loss_of(config, None), inputs, targets, torch.ones(2))
        except RuntimeError:
            return False
    return True
