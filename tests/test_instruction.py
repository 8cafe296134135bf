"""Instruction data: prompts are given, responses alone are trained and scored."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from settings import shape
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bench.config import IGNORED, TrainConfig
from bench.data.batches import arrays
from bench.data.task import TaskData, get_task
from bench.data.tokenizers import text_tokenizer
from bench.errors import UserError
from bench.evaluate.evaluation import evaluate
from bench.model.language_model import CycleForCausalLM, build_model
from bench.model.variant import get_variant
from bench.train.loop import Training, gradients

Row = dict[str, Any]
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
)
FORGETFUL = PLAIN.replace("{{ m['content'] }}", "{% if loop.last %}{{ m['content'] }}{% endif %}")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(folder: Path, **of: list[Row]) -> str:
    for name, given in of.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    return str(folder)


def sums(count: int, start: int = 0) -> list[Row]:
    return [{"prompt": f"{n}+{n + 1}=", "response": f"{2 * n + 1}."} for n in range(start, start + count)]


def chats(count: int, start: int = 0) -> list[Row]:
    return [
        {
            "messages": [
                {"role": "system", "content": "Add."},
                {"role": "user", "content": f"What is {n} + 1?"},
                {"role": "assistant", "content": f"It is {n + 1}."},
                {"role": "user", "content": "And one more?"},
                {"role": "assistant", "content": f"Then {n + 2}."},
            ]
        }
        for n in range(start, start + count)
    ]


def chat_model(folder: Path, template: str | None) -> str:
    """A byte-level BPE with the special tokens of a chat."""
    _, _, made = text_tokenizer("bpe", 300, [str(row) for row in chats(30)])
    model = made()
    model.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    model.chat_template = template
    model.save_pretrained(folder)
    return f"pretrained:{folder}"


def build(**options: Any) -> TaskData:
    return get_task("instruction", {"length": 32, **options}).build()


def scored_text(data: TaskData, split: str, row: int) -> list[str]:
    """What of a row is scored, each run of targets by itself."""
    targets, decode = arrays(data.splits[split])[1][row], data.tokenizer().decode
    runs = np.split(targets, np.flatnonzero(np.diff((targets != IGNORED).astype(int))) + 1)
    return [decode(run.tolist(), skip_special_tokens=False) for run in runs if run[0] != IGNORED]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_prompt_is_given_and_its_response_scored_with_its_end(tmp_path: Path, tokenizer: str) -> None:
    data = build(dataset=write(tmp_path, train=sums(80), test=sums(9, 500)), tokenizer=tokenizer, bpe_vocab_size=290)
    model = data.tokenizer()
    (ids, targets), first = arrays(data.test), sums(1, 500)[0]
    assert scored_text(data, "test", 0) == [first["response"] + model.eos_token]
    whole = [*model(first["prompt"])["input_ids"], *model(first["response"])["input_ids"], model.eos_token_id]
    assert ids[0].tolist() == (whole[:-1] + [model.eos_token_id] * 32)[:32]
    start = len(model(first["prompt"])["input_ids"]) - 1
    assert targets[0, start : len(whole) - 1].tolist() == whole[start + 1 :]
    assert data.metric.name == "bits_per_byte" and data.bytes_per_token is not None
    said = sum(len(row["response"]) for row in sums(9, 500))
    assert data.bytes_per_token["test"] == pytest.approx(said / (targets != IGNORED).sum())
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 76, "valid": 4, "test": 9}


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
def test_a_chat_is_what_the_template_writes(tmp_path: Path, template: str) -> None:
    tokenizer = chat_model(tmp_path / "model", template)
    (tmp_path / "data").mkdir()
    where = write(tmp_path / "data", train=chats(40), test=chats(5, 70))
    data = build(dataset=where, tokenizer=tokenizer, messages_column="messages", length=256)
    assert scored_text(data, "test", 0) == ["It is 71.<|im_end|>\n", "Then 72.<|im_end|>\n"]
    model = AutoTokenizer.from_pretrained(tmp_path / "model")
    whole = model.apply_chat_template(chats(1, 70)[0]["messages"], tokenize=True, return_dict=False)
    ids, _ = arrays(data.test)
    assert ids[0, : len(whole) - 1].tolist() == whole[:-1]
    assert set(ids[0, len(whole) - 1 :].tolist()) == {model.eos_token_id}
    assert data.tokenizer().chat_template == template


def test_what_cannot_be_used_is_left_out_and_told(tmp_path: Path) -> None:
    holes = [{"prompt": None, "response": "a"}, {"prompt": "a", "response": None}, {"prompt": "", "response": "b"}]
    long = {"prompt": "a" * 20, "response": "b" * 13}  # one token more than fits
    fits = {"prompt": "a" * 20, "response": "b" * 12}
    data = build(dataset=write(tmp_path, train=[*sums(80), *holes, long, fits], test=[*sums(9, 500), sums(1)[0]]))
    assert data.notes == (
        "1 rows of train left out: no text in column 'prompt'",
        "1 rows of train left out: no text in column 'response'",
        "1 rows of train left out: an empty prompt",
        "1 rows of valid left out: more than 32 + 1 tokens (options.length)",
        "1 of 78 sequences of train left out: valid or test has them too",
        "1 of 10 prompts in test stand in train too",
    )
    (ids, targets) = arrays(data.valid)
    row = int(np.flatnonzero(ids[:, 0] == ord("a"))[0])
    assert ids[row].tolist() == [*b"a" * 20, *b"b" * 12] and targets[row].tolist() == [-100] * 19 + [*b"b" * 12, 0]


def test_long_responses_in_two_splits_are_counted_and_short_ones_are_not(tmp_path: Path) -> None:
    short = [{"prompt": f"Is {n} odd?", "response": "yes" if n % 2 else "no"} for n in range(400)]
    data = build(dataset=write(tmp_path, train=short[:300], test=short[300:]), length=64)
    assert data.notes == ()
    long = {"prompt": "Say it.", "response": "".join(f"{n} " for n in range(90))}
    (tmp_path / "more").mkdir()
    where = write(tmp_path / "more", train=[long, *short[:300]], test=[*short[300:], {**long, "prompt": "Again."}])
    (told,) = build(dataset=where, length=300).notes
    assert told.startswith(f"{len(long['response']) - 99} of ") and "in test stand in train too" in told


CHATS_LEFT_OUT: list[tuple[Any, str]] = [
    (None, "no messages in column 'messages'"),
    ([{"role": "user", "content": "a"}], "no answer of an assistant in column 'messages'"),
    ([{"role": "assistant", "content": "a"}], "no answer of an assistant in column 'messages'"),
    ([{"role": "user", "content": None}], "a message without role or content in column 'messages'"),
]


def test_chats_that_cannot_be_used_are_left_out_and_told(tmp_path: Path) -> None:
    tokenizer = chat_model(tmp_path / "model", PLAIN)
    (tmp_path / "data").mkdir()
    given = [*chats(40), *({"messages": wrong} for wrong, _ in CHATS_LEFT_OUT)]
    where = write(tmp_path / "data", train=given)
    data = build(dataset=where, tokenizer=tokenizer, messages_column="messages", length=256)
    left_out = " ".join(data.notes)
    assert all(f"rows of train left out: {why}" in left_out for _, why in CHATS_LEFT_OUT)
    assert f"2 rows of train left out: {CHATS_LEFT_OUT[1][1]}" in data.notes


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"prompt": "a", "response": 5}], {}, "split 'train', row 0, column 'response' holds 5"),
        (
            [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": 5}, {"prompt": "a", "response": "c"}],
            {},
            "split 'train', row 1, column 'response' holds 5 ",
        ),
        ([{"prompt": {"a": "b"}, "response": "x"}], {}, "row 0, column 'prompt' holds {'a': 'b'}"),
        (sums(9), {"response_column": "answer"}, "instruction.options.response_column 'answer'"),
        (
            sums(90),
            {"length": 3},
            "no row of split 'train' can be used: 82 rows of train left out: more than 3 + 1 tok",
        ),
        (sums(9), {"messages_column": "prompt"}, "row 0, column 'prompt' holds '0+1=' (allowed: a list of"),
        ([{"chat": "text"}], {"messages_column": "chat"}, "row 0, column 'chat' holds 'text' (allowed: a list of"),
        ([{"chat": ["text"]}], {"messages_column": "chat"}, "row 0, column 'chat' holds 'text' (allowed: a list of"),
        (
            [{"chat": [{"role": "user", "content": 3}]}],
            {"messages_column": "chat"},
            "row 0, column 'chat' holds {'role': 'user', 'content': 3} (allowed: a list of",
        ),
        ([{"chat": [{"from": "user"}]}] * 9, {"messages_column": "chat"}, "has no chat template"),
        (
            [{"prompt": "a", "response": None}] * 9,
            {},
            "no row of split 'train' can be used: 9 rows of train left out: no text in column 'response'",
        ),
    ],
)
def test_what_is_no_instruction_is_refused(tmp_path: Path, rows: list[Row], options: Row, message: str) -> None:
    with pytest.raises(UserError) as error:
        build(dataset=write(tmp_path, train=rows), **options)
    told = str(error.value)
    assert message in told and "\n" not in told and "instruction.options." in told


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (FORGETFUL, "row 0, column 'messages' holds .*it writes a message in another way where others follow"),
        ("{{ raise_exception('no system here') }}", "row 0, .*chat template takes: no system here"),
        (None, "has no chat template, which messages_column needs"),
    ],
)
def test_a_template_that_does_not_fit_is_told(tmp_path: Path, template: str | None, message: str) -> None:
    tokenizer = chat_model(tmp_path / "model", template)
    (tmp_path / "data").mkdir()
    where = write(tmp_path / "data", train=chats(40))
    with pytest.raises(UserError, match=message) as error:
        build(dataset=where, tokenizer=tokenizer, messages_column="messages", length=256)
    assert "\n" not in str(error.value)


def test_a_tokeniser_without_an_end_is_told(tmp_path: Path) -> None:
    _, _, made = text_tokenizer("bytes", 300, [])
    PreTrainedTokenizerFast(tokenizer_object=made().backend_tokenizer).save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    where = write(tmp_path / "data", train=sums(40))
    with pytest.raises(UserError, match="has no token for the end of a text"):
        build(dataset=where, tokenizer=f"pretrained:{tmp_path / 'model'}")


def model_of(data: TaskData) -> CycleForCausalLM:
    variant = get_variant("htc")
    lm = build_model(variant, shape(variant, "llama"), data.vocab_size, data.length)
    lm.reset_parameters(0)
    return lm


def test_training_and_scores_are_of_the_responses_alone(tmp_path: Path) -> None:
    """The gradient is that of a Hugging Face model given labels of -100 on the prompts; what a prompt's tokens or the
    padding would have to foretell changes nothing.
    """
    data = build(dataset=write(tmp_path, train=sums(80), test=sums(9, 500)))
    lm = model_of(data)
    run = Training(lm, data, TrainConfig(steps=2, batch_size=8, eval_every=2), 0)
    loss = gradients([run])[0]
    got = {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}
    ids, targets = run.batches.batch(0)
    lm.zero_grad()
    labels = np.concatenate([np.full((8, 1), IGNORED), targets], 1)
    out = lm(torch.from_numpy(np.concatenate([ids, ids[:, -1:]], 1)), labels=torch.from_numpy(labels))
    out.loss.backward()
    assert loss.item() == pytest.approx(out.loss.item(), rel=1e-5)
    for name, parameter in lm.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-6)

    ids, targets = arrays(data.test)
    scores = evaluate(lm, ids, targets).leaving(1)
    logits = lm.eval()(torch.from_numpy(ids)).logits
    losses = []
    for row, given in enumerate(sums(9, 500)):
        n, said = len(given["prompt"]), [*given["response"].encode(), 0]
        for place, token in enumerate(said):
            losses.append(cross_entropy(logits[row, n - 1 + place], torch.tensor(token)).item())
    assert scores["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    counts = np.bincount(arrays(data.train)[1][arrays(data.train)[1] >= 0], minlength=256) + 1
    bits = [
        -math.log2(counts[token] / counts.sum()) for row in sums(9, 500) for token in [*row["response"].encode(), 0]
    ]
    assert data.bytes_per_token is not None
    assert data.metric.levels["unigram"] == pytest.approx(np.mean(bits) / data.bytes_per_token["test"])
