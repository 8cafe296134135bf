"""What a cell needs of a machine at least, known before its model is made: it is refused where that is not there.

Everything here is less than what is really taken (of small models by far): what would run is never refused. The memory
of a GPU is not asked for, since that would open it in a process that only plans: a model that it cannot hold becomes a
failed cell.
"""

from __future__ import annotations

from typing import Literal

from bench.config import DEPTHS, EvalConfig, ModelConfig, TrainConfig
from bench.data.task import TaskData
from bench.evaluate.evaluation import EVAL_BATCH
from bench.limits import check_memory, machine_memory
from bench.model.costs import count, meta_model
from bench.model.freezing import freeze
from bench.model.network import Network
from bench.model.tried import check_parts
from bench.model.variant import Variant

PROCESS = 100 << 20  # bytes of a further process of a cell: Python with torch
WEIGHT = 4  # bytes of a parameter
OPTIMIZER = {"adamw": 12, "muon": 8}  # of its gradient and of the optimizer's means at least
STATE, LOGIT, TOKEN = 2, 4, 16  # bytes of a number of a state (bfloat16) and of the logits; of an input and its target
NUMBER = 4  # bytes of a number of a vector


def check_room(
    name: str,
    variant: Variant,
    model: ModelConfig,
    train: TrainConfig,
    evaluation: EvalConfig,
    data: TaskData,
    kind: Literal["cpu", "cuda"],
) -> None:
    """Raises UserError if this machine cannot hold what a cell makes, its model would be too deep to be tested, or a
    part of it from outside leaves a parameter unset.

    Args:
        name: of the cell, for the message.
        variant: that is trained.
        model: its shape.
        train: how it is trained.
        evaluation: how it is tested.
        data: of its task.
        kind: of the device that it runs on.
    """
    if variant.cycled:
        most = evaluation.max_cycles or 2 * model.n_cycles
        variant.schedule(model.model_copy(update={"n_cycles": most}))
    lm, length = meta_model(variant, model, data.vocab_size, data.max_length), data.length
    freeze(lm, train.trained)
    params, batch = count(lm.parameters()), train.batch_size // train.accumulation
    form, places = model.form, model.form.places(length)
    needed = PROCESS * (train.processes - 1) + train.batch_size * length * (
        TOKEN if form.features is None else NUMBER * form.features
    )
    if kind == "cuda":
        needed += WEIGHT * params  # it is made on the host
    else:
        learned = count(parameter for parameter in lm.parameters() if parameter.requires_grad)
        copies = train.processes if train.sharding == "none" else 1
        training = batch * (STATE * model.d_model * _kept(lm, train, length) + LOGIT * places * data.vocab_size)
        testing = min(EVAL_BATCH, len(data.test)) * LOGIT * places * data.vocab_size
        needed += copies * (WEIGHT * params + OPTIMIZER[train.optimizer] * learned) + max(training, testing)
    tokens = f"{batch:,} x {length:,} tokens, {data.vocab_size:,} different ones,"
    check_memory(
        needed,
        machine_memory(),
        f"{name}: {params:,} parameters and batches of {tokens}",
        "a smaller model, batch_size, length or vocabulary, fewer processes, more accumulation",
    )
    check_parts(lm)  # which takes the memory of the parts


def _kept(lm: Network, train: TrainConfig, length: int) -> int:
    """States that autograd keeps of a sequence at least: one of every token for each step that a gradient passes."""
    if train.trained != "all":
        return 0
    schedule, cut = lm.schedule, train.backward_cycles
    if any(getattr(train, field) != off for field, off in DEPTHS.items()):
        cut = 1  # at least
    first = 0 if cut is None else max(0, schedule.n_cycles - cut)
    total = length * (len(schedule.coda) + (len(schedule.prelude) if cut is None else 0))
    for number, steps in enumerate(schedule.cycles[first:], first):
        tokens = length if lm.recurrence is None else lm.recurrence.tokens(number, length)
        total += tokens * (1 if train.activation_checkpointing else len(steps))
    return total
