"""What a model costs: parameters, FLOPs and memory, from its schedule; and the measured check of the FLOPs.

FLOPs count 2 for a multiply-add: matrix products and attention as executed (causal attention is charged in full, unless
``model.flops`` says otherwise), with everything a variant adds; norms, activations and other element-wise work are left
out, as is usual.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy

from bench.config import Count, ModelConfig, Trained
from bench.errors import UserError
from bench.model.attention import attention_flops
from bench.model.blocks import Block
from bench.model.counter import counted_flops
from bench.model.flops import Flops
from bench.model.forms import blank, first_flops
from bench.model.freezing import freeze
from bench.model.keys import borrows, filled, windows
from bench.model.network import Network
from bench.model.parts import PARTS, Part, gate_at
from bench.model.schedule import Schedule, Step
from bench.model.tried import telling
from bench.model.variant import Variant


@dataclass(frozen=True)
class Addition:
    """What one part adds to the same model without it."""

    params: int
    flops_per_token: float  # forward


@dataclass(frozen=True)
class Costs:
    """Of one model at one sequence length. FLOPs are per token of that length; bytes are of float32."""

    length: int
    depth: int
    n_blocks: int
    params: int  # every parameter once, however often its block runs
    params_non_embedding: int  # without token and position embeddings and an untied LM head
    forward_flops_per_token: float
    train_flops_per_token: float  # forward and backward
    kv_bytes_per_token: int  # of the whole cache of such a sequence, with what a recurrence remembers there, rounded up
    activation_bytes: int  # kept by autograd for the backward pass of one sequence
    additions: dict[str, Addition]


def meta_model(variant: Variant, model: ModelConfig, vocab_size: int, length: int) -> Network:
    """A model without storage: shapes and parameter counts only."""
    with torch.device("meta"):
        return Network(variant, model, vocab_size, length)


def costs(
    variant: Variant,
    model: ModelConfig,
    vocab_size: int,
    length: int,
    positions: int | None = None,
    trained: Trained = "all",
) -> Costs:
    """All costs of a variant at a shape, vocabulary and sequence length, without training or timing anything.

    Args:
        positions: the longest sequence the model is made for, ``length`` by default.
        trained: what is not frozen in training.
    """
    lm = meta_model(variant, model, vocab_size, positions or length)
    freeze(lm, trained)
    schedule = lm.schedule
    total = pass_flops(lm, length)
    return Costs(
        length=length,
        depth=schedule.depth,
        n_blocks=schedule.n_blocks,
        params=count(lm.parameters()),
        params_non_embedding=non_embedding(lm),
        forward_flops_per_token=total.forward / length,
        train_flops_per_token=training_flops(lm, length) / length,
        kv_bytes_per_token=-(-cache_bytes(lm, length) // length),
        activation_bytes=activation_bytes(variant, model, vocab_size, length),
        additions=additions(lm, length),
    )


def step_flops(
    lm: Network,
    steps: Iterable[Step],
    length: int,
    with_mass: bool = False,
    inside: int | None = None,
    count: Count | None = None,
) -> Flops:
    """FLOPs of the given steps for one sequence. with_mass: zero attention is read at every step; inside: the steps run
    for so many of the tokens alone, the keys and values of the others being there; count: of causal attention, by
    default the model's.
    """
    total, run_on = Flops(), length if inside is None else inside
    prefix, adapter, model = lm.prefix, lm.adapter, lm.model_shape
    count = count or model.flops
    for step in steps:
        n_prefix = prefix.n_tokens if prefix is not None and prefix.covers(step) else 0
        gate = gate_at(lm.gate, step)
        mass = with_mass or (gate is not None and gate.reads_zero_attention)
        total += cast(Block, lm.blocks[step.block]).flops(step, run_on)
        shape = model.n_heads, length, model.head_dim
        own = count
        if adapter is not None and adapter.looks_back(step):
            total += attention_flops(*shape, 0, False, True, inside, model.form, count)
            if adapter.window is not None and adapter.window < length:
                own = "full"  # under a mask
        total += attention_flops(*shape, n_prefix, mass, prefix is None or prefix.trained_key, inside, model.form, own)
        for part in _parts(lm):
            total += Flops() if part is lm.gate and gate is None else part.flops(step, run_on)
    return total


def frozen_flops(lm: Network, steps: Iterable[Step], tokens: int) -> Flops:
    """FLOPs of the keys and values that so many tokens of one sequence, which have left, go on giving to the steps."""
    total, model, adapter = Flops(), lm.model_shape, lm.adapter
    for step in steps:
        if borrows(model, step):
            continue
        total += Flops(2 * tokens * model.d_model * 2 * model.kv_heads * model.head_dim)
        if adapter is not None and "qkv" in adapter.linears:
            total += adapter.delta_flops(step, "qkv", tokens)
    return total


def head_flops(lm: Network, length: int) -> Flops:
    """FLOPs of the LM head for one sequence."""
    return Flops(2 * lm.model_shape.form.places(length) * lm.model_shape.d_model * lm.vocab_size)


def start_flops(lm: Network, schedule: Schedule, length: int) -> Flops:
    """FLOPs of what comes before the cycles for one sequence."""
    return first_flops(lm.model_shape, length) + step_flops(lm, schedule.prelude, length)


def cycle_flops(
    lm: Network,
    schedule: Schedule,
    cycle: int,
    length: int,
    with_mass: bool = False,
    inside: int | None = None,
    frozen: int = 0,
    ran: tuple[int, int] | None = None,
) -> Flops:
    """FLOPs of cycle 0, 1, ... of the recurrent part for one sequence. inside: tokens that have not left, None: all;
    frozen: those that have, and stand before one that has not; ran: tokens that the cycle before and this one are for,
    where the sequence decides (``Recurrence.ran``).
    """
    if lm.recurrence is not None and ran is not None:
        total = step_flops(lm, schedule.cycles[cycle], ran[1], with_mass)
        total += lm.recurrence.chosen_flops(cycle, length, ran[0])
    else:
        run_on = length if lm.recurrence is None else lm.recurrence.tokens(cycle, length)
        masked = lm.recurrence is not None and lm.recurrence.masks and cycle > 0
        total = step_flops(lm, schedule.cycles[cycle], run_on, with_mass, inside, "full" if masked else None)
        total += frozen_flops(lm, schedule.cycles[cycle], frozen)
        if lm.recurrence is not None:
            total += lm.recurrence.cycle_flops(cycle, length)
    if lm.halting is not None and cycle + 1 < schedule.n_cycles:
        total += lm.halting.cycle_flops(length)
    return total


def read_out_flops(lm: Network, schedule: Schedule, length: int) -> Flops:
    """FLOPs of what follows the cycles for one sequence: the recurrence's output, the coda and the LM head."""
    total = step_flops(lm, schedule.coda, length) + head_flops(lm, length)
    return total if lm.recurrence is None else total + lm.recurrence.output_flops(length)


def pass_flops(lm: Network, length: int, n_cycles: int | None = None) -> Flops:
    """FLOPs of one sequence at full depth, the LM head included."""
    schedule = lm.schedule_at(n_cycles)
    total = start_flops(lm, schedule, length) + read_out_flops(lm, schedule, length)
    return sum((cycle_flops(lm, schedule, cycle, length) for cycle in range(schedule.n_cycles)), total)


def training_flops(
    lm: Network,
    length: int,
    n_cycles: int | None = None,
    backward_cycles: int | None = None,
    every_exit: bool = False,
) -> int:
    """FLOPs of forward and backward for one sequence; backward_cycles: gradients flow through so many last cycles;
    every_exit: the loss reads what every exit point predicts, so that coda and LM head run at each.
    """
    schedule = lm.schedule_at(n_cycles)
    frozen = not all(parameter.requires_grad for parameter in lm.parameters())
    if frozen and every_exit:
        raise UserError("train.trained: a loss over every exit point needs 'all', nothing frozen")
    cut = backward_cycles is not None and backward_cycles < schedule.n_cycles
    if frozen or (cut and lm.routes):
        return _partial_training_flops(lm, length, n_cycles, backward_cycles)

    def whole_but(cycles: int, number: int | None) -> int:
        left_out = (cycle_flops(lm, lm.schedule_at(number), cycle, length) for cycle in range(cycles))
        return pass_flops(lm, length, number).training - sum(flops.training - flops.forward for flops in left_out)

    if cut and backward_cycles is not None:
        # What comes before the cycles is cut too, or is not, whatever their number.
        first = _partial_training_flops(lm, length, backward_cycles + 1, backward_cycles)
        return first + whole_but(schedule.n_cycles - backward_cycles, n_cycles) - whole_but(1, backward_cycles + 1)
    total = whole_but(0, n_cycles)
    return total + (schedule.n_cycles - 1) * read_out_flops(lm, schedule, length).training if every_exit else total


def _partial_training_flops(lm: Network, length: int, n_cycles: int | None, backward_cycles: int | None) -> int:
    """FLOPs of forward and backward for one sequence where parameters are frozen, or cycles have no gradient.

    What that saves depends on which gradients have to pass on the way to a trained parameter. Autograd knows, so the
    pass is run on tensors without storage and its products are counted.
    """
    learns = tuple(parameter.requires_grad for parameter in lm.parameters())
    made = lm.variant, lm.model_shape, lm.vocab_size, lm.n_positions, lm.built_cycles
    return _measured_training_flops(made, learns, length, n_cycles, backward_cycles)


@lru_cache(maxsize=64)
def _measured_training_flops(made: tuple[Any, ...], learns: tuple[bool, ...], length: int, *cycles: int | None) -> int:
    with FakeTensorMode(), torch.device("cpu"):
        model = Network(*made)
        for parameter, wanted in zip(model.parameters(), learns, strict=True):
            parameter.requires_grad_(wanted)
        n_cycles, backward = cycles
        return measured_flops(model, 1, length, training=True, n_cycles=n_cycles, backward_cycles=backward)


def exit_flops(
    lm: Network,
    length: int,
    reading: bool = False,
    predicting: bool = False,
    n_cycles: int | None = None,
) -> tuple[float, ...]:
    """Forward FLOPs per token of a sequence that leaves after cycle 1, 2, ...: prelude, those cycles, coda and LM head.

    reading: the zero attention is read to decide at every exit point, hence in every cycle but the last; predicting:
    coda and LM head run at every exit point, those it leaves by included, to decide.
    """
    schedule = lm.schedule_at(n_cycles)
    output = read_out_flops(lm, schedule, length)
    done = start_flops(lm, schedule, length) + output
    totals = []
    for cycle in range(schedule.n_cycles):
        done += cycle_flops(lm, schedule, cycle, length, reading and cycle + 1 < schedule.n_cycles)
        if predicting and cycle:
            done += output
        totals.append(done.forward / length)
    return tuple(totals)


def token_exit_flops(
    lm: Network,
    left: Sequence[int],
    reading: bool = False,
    predicting: bool = False,
    n_cycles: int | None = None,
) -> int:
    """Forward FLOPs of one sequence whose tokens leave after the cycles left [T], each 1, 2, ...: a token that has left
    costs its keys and values at every step that a later token still takes; what happens between the cycles, the coda
    and the LM head run for all tokens.

    reading: the zero attention is read to decide; predicting: the coda runs for all tokens and the LM head for those
    that have not left at every exit point, to decide, and once more at the end, when all states are known.
    """
    schedule, length = lm.schedule_at(n_cycles), len(left)
    output = read_out_flops(lm, schedule, length)
    total = start_flops(lm, schedule, length) + output
    for cycle in range(max(left)):
        inside = [place for place, number in enumerate(left) if number > cycle]
        early, frozen = cycle + 1 < schedule.n_cycles, inside[-1] + 1 - len(inside)
        total += cycle_flops(lm, schedule, cycle, length, reading and early, len(inside), frozen)
        if predicting and early:
            total += output - head_flops(lm, length - len(inside))
    return total.forward


def additions(lm: Network, length: int) -> dict[str, Addition]:
    """What each added part costs, found by taking them off one after the other, the gate first: it may need the zero
    tokens, never the other way round. The entries add up to the whole difference from the plain schedule.
    """
    found = {}
    stripped = copy.copy(lm)  # shallow: the parameters stay shared, only the parts are taken off
    for name in reversed(PARTS):
        part = getattr(stripped, name)
        if part is None:
            continue
        before = pass_flops(stripped, length)
        stripped._modules = {**stripped._modules, name: None}
        saved = before - pass_flops(stripped, length)
        found[part.label] = Addition(count(part.parameters()), saved.forward / length)
    return found


def count(parameters: Iterable[Tensor]) -> int:
    """Number of scalars in the given parameters, each tensor once."""
    return sum(tensor.numel() for tensor in {id(tensor): tensor for tensor in parameters}.values())


def non_embedding(lm: Network) -> int:
    """Parameters without the first layer, position embeddings and the LM head: what parameter-matching compares."""
    outside = [lm.tokens, lm.lm_head, *([lm.positions] if lm.positions is not None else [])]
    return count(lm.parameters()) - count(parameter for part in outside for parameter in part.parameters())


def cache_bytes(lm: Network, length: int) -> int:
    """Bytes that the KV cache keeps of a sequence of ``length`` tokens, in float32: of a step with a window, the tokens
    that the next one will see.
    """
    model, schedule = lm.model_shape, lm.schedule
    near = windows(lm.adapter, schedule)
    tokens = sum(
        min(length, near[depth] - 1) if depth in near else length
        for depth, holds in enumerate(filled(model, schedule))
        if holds
    )
    return 4 * (tokens * 2 * model.kv_heads * model.head_dim + length * sum(lm.variant.remembered(schedule)))


def activation_bytes(variant: Variant, model: ModelConfig, vocab_size: int, length: int) -> int:
    """Bytes that autograd keeps for the backward pass of one sequence, found by running the model on fake tensors."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with FakeTensorMode():
        lm = telling(Network(variant, model, vocab_size, length))
        weights = {parameter.untyped_storage()._cdata for parameter in lm.parameters()}
        inputs, targets = blank(model.form, 1, length)
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = cross_entropy(lm(inputs).logits.flatten(0, -2), targets.flatten())
        del loss
    return sum(size for storage, size in kept.items() if storage not in weights)


def measured_flops(lm: Network, batch: int, length: int, training: bool = False, **inputs: Any) -> int:
    """FLOPs that PyTorch's own counter sees when the model runs on ``batch`` sequences, with the loss's backward if
    ``training``. The CPU's fused attention is counted by the formula PyTorch registers for the other devices.
    """
    sequences, targets = blank(lm.model_shape.form, batch, length, lm.device)

    def run() -> None:
        logits = lm(sequences, **inputs).logits
        if training:
            cross_entropy(logits.flatten(0, -2), targets.flatten()).backward()

    return counted_flops(run, lm.model_shape.flops)


def _parts(lm: Network) -> list[Part]:
    return [part for part in (getattr(lm, name) for name in PARTS) if part is not None]
