"""Names that stand for a variant with a shape and a training of its own: what a row of a study, or of ``profile``,
means by them unless it says otherwise.

They hold no code, so that a study is read without torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Named:
    """What a name stands for.

    Attributes:
        about: what ``cyclebench list`` says of it.
        variant: the variant's name.
        model, train: fields that differ from the study's.
    """

    about: str
    variant: str
    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)


NAMED = {
    # Ouro / LoopLM (arXiv 2510.25741; its norms as in the published checkpoints' modeling_ouro.py): the whole stack is
    # looped 4 times, with norms before and after each branch, a gate at every exit point and the loss expected under
    # it minus an entropy (bench.model.losses). The weight of the entropy is the suite's default. Its second stage of
    # training, of the gate alone, is left out: its text could not be confirmed.
    "ouro": Named(
        "Ouro: Basic Cycling of 4 cycles with sandwich norms and a gate at every exit point.",
        "bc",
        {"n_cycles": 4, "norm": "sandwich", "halting": "gate"},
        {"halting_loss": "gate_cdf"},
    ),
    # What is published as LoopFormer (arXiv 2602.11451) is trained with a second pass.
    "loopformer": Named(
        "LoopFormer, trained with a second pass of fewer cycles.", "loopformer", {}, {"shortcut_loss": 0.1}
    ),
}


def spelled_out(entry: dict[str, Any]) -> dict[str, Any]:
    """A row with the name replaced by what it stands for, under the row's label or that name; others as they are."""
    named = NAMED.get(str(entry.get("name")))
    given = {name: entry.get(name) or {} for name in ("model", "train")}
    if named is None or not all(isinstance(fields, dict) for fields in given.values()):
        return entry
    own = {"model": {**named.model, **given["model"]}, "train": {**named.train, **given["train"]}}
    return {**entry, "name": named.variant, "label": entry.get("label") or entry["name"], **own}
