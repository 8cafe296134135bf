"""What holds on a CPU holds on a GPU: each test is of both, and of the CPU alone where there is no GPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timed_sections
import torch
from settings import make, tokens
from test_resume import KilledAt, KilledError
from torch.nn.attention import flex_attention

from bench.config import TrainConfig
from bench.data.task import TaskData, get_task
from bench.exits.execute import execute
from bench.exits.generation import EarlyExit
from bench.model import attention_kernels, zero_value
from bench.model.variant import variants
from bench.perf import forms, waits
from bench.processes import worker_context
from bench.train.checkpoints import Checkpoints, Every
from bench.train.device import repeatable
from bench.train.loop import Training, gradients, train

CONFIG = TrainConfig(steps=6, batch_size=4, accumulation=2, eval_sequences=8, eval_every=3, precision="float32")
everywhere = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])


@pytest.fixture(scope="module")
def data() -> TaskData:
    return get_task("p_hop", {"length": 12, "n_train": 50, "n_valid": 10, "n_test": 10}).build()


def on(device: str, name: str = "ztt", **changes: Any) -> Any:
    return make(name, {}, **changes).to(device)  # type: ignore[arg-type]


@everywhere
def test_forked_workers_can_use_the_device(device: str) -> None:
    process = worker_context().Process(target=timed_sections.touch, args=(device,))
    process.start()
    process.join(120)
    assert process.exitcode == 0


@everywhere
def test_every_form_of_attention_has_the_formulas_gradients(device: str) -> None:
    precision, allowed = ("bfloat16", 0.02) if device == "cuda" else ("float32", 1e-5)
    rows = forms.rows(torch.device(device), 1, 2, 2, 40, precision)  # type: ignore[arg-type]
    assert [row["form"] for row in rows] == list(forms.FORMS)
    for row in rows:
        assert "note" not in row or (device, row["form"]) == ("cpu", "flex_attention, p0 read"), row
        assert row.get("gradient_error", 0) < allowed, row


def test_what_a_gpu_alone_can_run_is_right_as_far_as_a_cpu_can_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """flex_attention in its plain form, which is asked for nothing here but its right gradients."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    plain = partial(forms.flex, kernel=flex_attention.flex_attention)
    monkeypatch.setattr(forms, "FORMS", {"no zero token": forms.without, "flex": plain})
    _, row = forms.rows(torch.device("cpu"), 1, 2, 2, 40)
    assert row["gradient_error"] < 1e-5


@pytest.mark.parametrize("kernel", [attention_kernels.CUDNN, attention_kernels.FLASH, attention_kernels.EFFICIENT])
def test_kernels_of_a_gpu_fit_together(kernel: attention_kernels.Kernel) -> None:
    """On tensors without numbers."""
    query, key, value = (torch.empty(2, 3, 40, 64, device="meta", dtype=torch.bfloat16) for _ in range(3))
    inputs = [tensor.requires_grad_() for tensor in (query, key, value, torch.empty(2, 3, 40, device="meta"))]
    out, mass = zero_value.ZeroValueAttention.apply(*inputs, kernel)
    assert (out.shape, mass.shape) == (query.shape, (2, 3, 40))
    gradients = torch.autograd.grad(out.sum() + mass.sum(), inputs)
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in inputs]


@everywhere
def test_a_step_never_waits(device: str) -> None:
    names = variants.names() if device == "cuda" else ["ztt"]
    rows = [row for name in names for row in waits.rows(torch.device(device), name)]
    assert {row["mode"] for row in rows} == {"alone", "stacked"}
    assert all(("note" in row) == (device == "cpu") and not row.get("waits") for row in rows), rows


@everywhere
def test_a_stack_computes_what_each_model_computes_alone(device: str, data: TaskData) -> None:
    found = []
    for stacked in (True, False):
        runs = [Training(on(device), data, CONFIG, seed, stacked=stacked) for seed in range(3)]
        losses = gradients(runs) if stacked else torch.cat([gradients([run]) for run in runs])
        found.append([losses, *(p.grad for run in runs for p in run.lm.parameters())])
    for together, alone in zip(*found, strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-5)


@everywhere
@pytest.mark.parametrize("graphs", [False, True])
def test_training_goes_on_to_the_same_bits(device: str, graphs: bool, data: TaskData, tmp_path: Path) -> None:
    if graphs and device == "cpu":
        pytest.skip("recordings are of a GPU")
    config = CONFIG.model_copy(update={"cuda_graphs": graphs, "precision": "bfloat16"})

    def trained(checkpoints: Checkpoints | None) -> Any:
        lm = on(device, dropout=0.1)
        with repeatable(0, 1):
            history = train(lm, data, config, 0, checkpoints=checkpoints)
        return [entry["train_loss"] for entry in history], lm.state_dict()

    killed = KilledAt(tmp_path, "a", Every(None, 1))
    killed.moment = 4
    with pytest.raises(KilledError):
        trained(killed)
    whole, again = trained(None), trained(Checkpoints(tmp_path, "a", Every(None, 1)))
    assert whole[0] == again[0]
    assert all(torch.equal(value, again[1][name]) for name, value in whole[1].items())


@everywhere
@pytest.mark.parametrize("granularity", ["sequence", "token"])
def test_exits_are_those_of_the_cpu_in_double_precision(device: str, granularity: Any) -> None:
    ids, targets = tokens(8).numpy(), tokens(8, seed=1).numpy()
    exact = on("cpu").double()
    threshold = 0.5
    expected = execute(exact, ids, targets, "zero_attention", threshold, granularity=granularity)
    found = execute(on(device).double(), ids, targets, "zero_attention", threshold, granularity=granularity)
    assert (found.cycle == expected.cycle).all()
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-9 if device == "cpu" else 1e-5)  # in float32


@everywhere
@pytest.mark.parametrize("kv", ["recompute", "propagate", "share_last"])
def test_generation_with_exits_is_that_of_the_cpu(device: str, kv: Any) -> None:
    found = []
    for where in ("cpu", device):
        lm = on(where).double()
        lm.exits = EarlyExit("latent_diff", 0.6, kv)
        found.append(lm.generate(tokens(4, 6).to(where), max_new_tokens=5, do_sample=False, pad_token_id=0).cpu())
    assert torch.equal(*found)
