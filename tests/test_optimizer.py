"""Muon beside AdamW: which parameters are whose, its step stated here on its own, and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from settings import make, tokens

from bench.config import TrainConfig, parse
from bench.data.task import get_task
from bench.errors import UserError
from bench.model.language_model import build_model
from bench.model.variant import get_variant
from bench.train.checkpoints import Checkpoints, Every
from bench.train.device import repeatable
from bench.train.loop import train
from bench.train.optimizer import Together, make_optimizer

CONFIG = TrainConfig(steps=4, batch_size=4, eval_sequences=4, optimizer="muon", lr=0.01, stacked=False)


def test_muon_has_the_matrices_of_blocks_and_nothing_else() -> None:
    lm = make("relaxed", {}, "llama", norm="sandwich")
    optimizer = make_optimizer(lm, CONFIG)
    assert isinstance(optimizer, Together)
    names = {id(p): name for name, p in lm.named_parameters()}
    muon, *adamw = [{names[id(p)] for p in group["params"]} for group in optimizer.param_groups]
    assert muon == {name for name, p in lm.named_parameters() if name.startswith("blocks.") and p.dim() == 2}
    assert muon.isdisjoint(adamw[0] | adamw[1]) and muon | adamw[0] | adamw[1] == set(names.values())
    assert "adapter.a.qkv" in adamw[1] and "tokens.weight" in adamw[1]


def test_a_step_of_muon_is_the_orthogonalised_momentum() -> None:
    """U V^T of the gradient's singular vectors, as large as a step of AdamW, beside the decay. Five iterations leave
    singular values between 0.7 and 1.2.
    """
    lm, x = make("bc", {}), tokens()
    lm(x, labels=x).loss.backward()
    matrix = lm.blocks[1].mlp.up.weight
    before, gradient = matrix.detach().clone(), matrix.grad.clone()
    make_optimizer(lm, CONFIG).step()
    update = (before * (1 - CONFIG.lr * CONFIG.weight_decay) - matrix.detach()) / CONFIG.lr
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    turned = left.T @ update @ right.T / (0.2 * max(matrix.shape) ** 0.5)
    assert turned.diag().min() > 0.6 and turned.diag().max() < 1.3
    assert (turned - turned.diag().diag()).abs().max() < 0.1


def test_it_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path: Path) -> None:
    data = get_task("p_hop", {"hops": 1, "length": 12, "n_train": 50, "n_valid": 10, "n_test": 20}).build()

    def run(config: TrainConfig, folder: Path) -> dict[str, torch.Tensor]:
        lm = build_model(get_variant("ztt"), make("ztt", {}).model_shape, data.vocab_size, data.length)
        lm.reset_parameters(0)
        with repeatable(0, 1):
            train(lm, data, config, 0, checkpoints=Checkpoints(folder, "a", Every(None, 2)))
        return lm.state_dict()

    whole = run(CONFIG, tmp_path / "whole")
    (tmp_path / "again").mkdir()
    (tmp_path / "whole" / "000000002.safetensors").rename(tmp_path / "again" / "000000002.safetensors")
    again = run(CONFIG, tmp_path / "again")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    other = run(CONFIG.model_copy(update={"optimizer": "adamw"}), tmp_path / "adamw")
    assert not torch.equal(whole["blocks.0.mlp.up.weight"], other["blocks.0.mlp.up.weight"])


@pytest.mark.parametrize("other", [{"trained": "additions"}, {"sharding": "full", "processes": 2}])
def test_where_muon_has_no_whole_matrices_it_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="optimizer = 'muon' needs"):
        parse(TrainConfig, {"optimizer": "muon", "batch_size": 4, **other}, "train")
