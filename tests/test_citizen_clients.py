"""Trainer, accelerate, PEFT, pipelines and lm-evaluation-harness use every registered variant as they use any model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from settings import DEFAULTS, VOCAB, halts, make, shape, tokens
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments, pipeline

from bench.config import IGNORED, TrainConfig
from bench.data.batches import arrays
from bench.data.task import TaskData, get_task
from bench.data.tokenizers import number_tokenizer, text_tokenizer
from bench.downstream.run import Meter
from bench.errors import InputError
from bench.exits.generation import EarlyExit
from bench.model.counter import flop_counter
from bench.model.language_model import CycleForCausalLM, build_model
from bench.model.variant import get_variant
from bench.train.loop import Training
from bench.train.loop import gradients as harness

NAMES = [name for name, _ in DEFAULTS]
# Of the others .ci/run tries that they too are models as any.
every = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("ztt", "mor") else pytest.mark.long) for name in NAMES]
)
BATCH, PARTS, WIDTH = 8, 4, 12
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def data() -> TaskData:
    """Eight sequences whose targets are their next tokens, but for the first few."""
    made = get_task("memorisation", {"vocabulary": VOCAB, "length": WIDTH, "n_train": BATCH, "n_valid": 4, "n_test": 4})
    built = made.build()
    ids, _ = arrays(built.train)
    targets = np.concatenate([ids[:, 1:], np.full((len(ids), 1), IGNORED)], 1)
    targets[:, :2] = IGNORED
    split = built.train.features
    train = Dataset.from_dict({"input_ids": ids.tolist(), "targets": targets.tolist()}, features=split)
    return replace(built, train=train)


def model(name: str, data: TaskData) -> tuple[CycleForCausalLM, TrainConfig]:
    """With a halting gate where the variant takes one, and how the suite trains it."""
    lm = make(name, {})
    train: dict[str, Any] = {"steps": 1, "batch_size": BATCH, "grad_clip": 1e9, "device": "cpu"}
    if lm.schedule.n_cycles > 1 and not halts(lm):
        lm, train = make(name, {}, halting="gate"), {**train, "halting_loss": "gate_cdf"}
    return lm.train(), TrainConfig(**train)


def theirs(lm: CycleForCausalLM, data: TaskData, parts: int, folder: Path, found: dict[str, Tensor]) -> Trainer:
    """A Trainer that takes one step on what the suite's first batch is; found: gets the gradients of that step."""

    class Catch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            torch.manual_seed(1)

        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            found.update({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})

    ids, targets = Training(make("vanilla", {}), data, TrainConfig(steps=1, batch_size=BATCH), 0).batches.batch(0)
    labels = np.concatenate([np.full((BATCH, 1), IGNORED), targets[:, :-1]], 1)
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()}).with_format("torch")
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=BATCH // parts,
        per_device_eval_batch_size=BATCH,
        gradient_accumulation_steps=parts,
        train_sampling_strategy="sequential",
        max_steps=1,
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    judged = {"compute_metrics": lambda told: {"shape": list(told.predictions.shape)}}
    return Trainer(lm, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[Catch()], **judged)


def ours(lm: CycleForCausalLM, config: TrainConfig, data: TaskData) -> dict[str, Tensor]:
    run = Training(lm, data, config, 0)
    torch.manual_seed(1)
    harness([run])
    found = {key: p.grad.clone() for key, p in lm.named_parameters()}
    lm.zero_grad()
    return found


@every
def test_trainer_trains_what_the_suite_trains(name: str, data: TaskData, tmp_path: Path) -> None:
    lm, config = model(name, data)
    expected, found = {}, {}
    expected = ours(lm, config.model_copy(update={"accumulation": PARTS}), data)
    whole = ours(lm, config, data)
    before = {key: p.clone() for key, p in lm.named_parameters()}
    trainer = theirs(lm, data, PARTS, tmp_path, found)
    trainer.train()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found, whole)  # the split of a batch changes nothing
    assert all(not torch.equal(before[key], p) for key, p in lm.named_parameters() if expected[key].any())
    told = trainer.evaluate()
    assert told["eval_shape"] == [BATCH, WIDTH, VOCAB]
    ids, labels = (torch.as_tensor(trainer.eval_dataset[:][key]) for key in ("input_ids", "labels"))
    assert told["eval_loss"] == pytest.approx(float(lm(ids, labels=labels).loss), rel=1e-5)


@every
def test_accelerate_trains_what_the_suite_trains(name: str, data: TaskData) -> None:
    lm, config = model(name, data)
    expected = ours(lm, config, data)
    ids, targets = Training(lm, data, config, 0).batches.batch(0)
    labels = np.concatenate([np.full((BATCH, 1), IGNORED), targets[:, :-1]], 1)
    rows = [{"input_ids": i, "labels": j} for i, j in zip(ids, labels, strict=True)]
    accelerator = Accelerator(cpu=True)
    prepared, optimizer, loader = accelerator.prepare(lm, torch.optim.SGD(lm.parameters()), DataLoader(rows, BATCH))
    for batch in loader:
        torch.manual_seed(1)
        accelerator.backward(prepared(**batch).loss)
    torch.testing.assert_close({key: p.grad for key, p in lm.named_parameters()}, expected)
    optimizer.step()


@every
def test_peft(name: str, tmp_path: Path) -> None:
    """An adapter trains, is saved, loaded and merged; what leaves early goes through it as well."""
    lm, ids = make(name, {}, "llama"), tokens()
    plain = lm(ids).logits
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["qkv", "attention.out", "up"], init_lora_weights=False
    )
    adapted = get_peft_model(lm, lora)
    adapted.train()
    adapted(ids, labels=ids).loss.backward()
    tuned = {key for key, p in adapted.named_parameters() if p.requires_grad}
    assert tuned and all("lora" in key for key in tuned)
    assert all(p.grad is not None and p.grad.any() for p in adapted.parameters() if p.requires_grad)
    adapted.eval()
    found = adapted(input_ids=ids).logits
    assert (found - plain).abs().max() > 1e-2
    texts = []
    for kv in ("propagate", "recompute"):
        lm.exits = EarlyExit("random", 0.5, kv)
        texts.append(adapted.generate(input_ids=ids, **GREEDY))
    lm.exits = None
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(name, {}, "llama"), tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, found)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, found, rtol=1e-3, atol=1e-4)
    for kv, text in zip(("propagate", "recompute"), texts, strict=True):
        merged.exits = EarlyExit("random", 0.5, kv)
        assert torch.equal(merged.generate(ids, **GREEDY), text)


def speaking(name: str) -> CycleForCausalLM:
    """A model of bytes."""
    variant = get_variant(name)
    lm = build_model(variant, shape(variant, "llama"), 256, 64)
    lm.reset_parameters(0)
    return lm.eval()


@every
def test_pipeline(name: str) -> None:
    lm, tokenizer = speaking(name), text_tokenizer("bytes", 0, []).made()
    lm.resize_token_embeddings(len(tokenizer))
    say = pipeline("text-generation", model=lm, tokenizer=tokenizer, device="cpu")
    prompts = ["In the beginning", "And"]
    told = [found[0]["generated_text"] for found in say(prompts, max_new_tokens=5, do_sample=False)]
    for prompt, text in zip(prompts, told, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        expected = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        assert text == tokenizer.decode(expected[0], skip_special_tokens=True)


@every
def test_generating_tasks_of_the_harness(name: str) -> None:
    """At more cycles than the model was built with, as ``eval --cycles`` runs them."""
    models = pytest.importorskip("lm_eval.models.huggingface", reason="the extra eval is not installed")
    from lm_eval.api.instance import Instance

    lm = make(name, {}, "llama").requires_grad_(False)  # as it is opened; gradients stand in the way of the counter
    tokenizer = number_tokenizer(VOCAB)
    client = models.HFLM(pretrained=lm, tokenizer=tokenizer, batch_size=2, max_length=40)
    asked = [Instance("generate_until", {}, (" 1 2 3", {"until": [], "max_gen_toks": 4}), number) for number in (0, 1)]
    n_cycles = 5 if lm.variant.cycled else 1
    with Meter(lm, n_cycles) as meter, flop_counter() as counter:
        told = client.generate_until(asked, disable_tqdm=True)
    ids = torch.tensor([[1, 2, 3]])
    expected = make(name, {}, "llama").generate(ids, n_cycles=n_cycles, use_cache=False, **GREEDY)[0, 3:]
    assert told == [" ".join(map(str, expected.tolist()))] * 2
    assert meter.flops == counter.get_total_flops() > 0 and meter.tokens >= 2 * 6


def test_what_has_another_form_is_one_line(tmp_path: Path) -> None:
    lm, ids = make("htc", {}, "gpt2"), tokens(2, 5)
    for given in ((2, 1, 5, 4), (2, 1, 4, 5), (3, 1, 5, 5), (2, 3, 5, 5)):
        with pytest.raises(InputError, match=r"^attention_mask: of shape .* .allowed: 2 or 1, 4 or 1, 5, 5.$"):
            lm(ids, attention_mask=torch.ones(given))
    with pytest.raises(InputError, match=r"^position_ids: -1 .allowed: 0 to "):
        lm(ids, position_ids=torch.arange(5)[None] - 1)
    lm.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"^shape: 5 .allowed: fields of a shape by name"):
        CycleForCausalLM.from_pretrained(tmp_path, shape=5)
