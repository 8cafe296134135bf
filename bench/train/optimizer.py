"""What takes the steps: AdamW, or Muon for the matrices of blocks beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from bench.config import TrainConfig
from bench.model.blocks import Block

if TYPE_CHECKING:
    from bench.model.language_model import CycleModel


def make_optimizer(lm: CycleModel, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW that decays the matrices of linear layers only, those of learned gates and routers among them. Norms,
    biases, embeddings, the head, zero tokens and gates of one number have a meaning at zero that decay would pull them
    to.

    With ``config.optimizer`` = ``muon`` the matrices of the blocks are Muon's (Jordan et al. 2024; torch's own), whose
    updates are scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so that one learning rate serves
    both and is tuned as for AdamW. Choices: the matrix of queries, keys and values is orthogonalised as one; what a
    variant adds stays AdamW's.
    """
    embeddings = {id(lm.tokens.weight), id(lm.lm_head.weight)}
    decayed = {id(module.weight) for module in lm.modules() if isinstance(module, nn.Linear)} - embeddings
    trained = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    muon = config.optimizer == "muon"
    blocks = cast(list[Block], lm.blocks)
    orthogonal = [m.weight for block in blocks for m in block.modules() if isinstance(m, nn.Linear)] if muon else []
    others = [p for p in trained if id(p) not in {id(matrix) for matrix in orthogonal}]
    groups = [
        {"params": [p for p in others if id(p) in decayed], "weight_decay": config.weight_decay},
        {"params": [p for p in others if id(p) not in decayed], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)
    if not muon:
        return adamw
    made = torch.optim.Muon(orthogonal, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
    return Together([made, adamw])


class Together(torch.optim.Optimizer):
    """Several optimizers of different parameters as one: their groups and their states in a row."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        """parts: in the order of their groups."""
        self.parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of each."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of all parameters."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """As of one optimizer: parameters are numbered over all groups."""
        state: dict[int, dict[str, Tensor]] = {}
        groups: list[dict[str, Any]] = []
        for part, first in self._numbered():
            told = part.state_dict()
            state |= {first + number: values for number, values in told["state"].items()}
            groups += [{**group, "params": [first + at for at in group["params"]]} for group in told["param_groups"]]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what ``state_dict`` gave."""
        groups = iter(state_dict["param_groups"])
        for part, first in self._numbered():
            own = [next(groups) for _ in part.param_groups]
            own = [{**group, "params": [at - first for at in group["params"]]} for group in own]
            numbers = {at for group in own for at in group["params"]}
            state = {at - first: values for at, values in state_dict["state"].items() if at - first in numbers}
            part.load_state_dict({"state": state, "param_groups": own})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def _numbered(self) -> list[tuple[torch.optim.Optimizer, int]]:
        """The parts with the number of the first parameter of each."""
        sizes = [sum(len(group["params"]) for group in part.param_groups) for part in self.parts]
        return [(part, sum(sizes[:place])) for place, part in enumerate(self.parts)]
