"""Text tasks: real text, split without overlap, scored in bits per byte."""

from __future__ import annotations

import json
from collections import Counter
from math import log2
from pathlib import Path

import numpy as np
import pytest

from bench.data.batches import Batches, arrays
from bench.data.kjv import TEST, VALID, books
from bench.data.task import TaskData, get_task, sequences_as_values
from bench.errors import UserError


@pytest.fixture(scope="module")
def kjv() -> TaskData:
    return get_task("kjv", {}).build()


def text(data: TaskData, split: str) -> str:
    ids, _ = arrays(getattr(data, split))
    return bytes(ids.ravel().tolist()).decode(errors="replace")


def test_kjv_is_split_by_whole_books(kjv: TaskData) -> None:
    assert not set(VALID) & set(TEST)
    every = books()
    assert len(every) == 66 and {*VALID, *TEST} <= set(every)
    assert next(iter(every)) == "GENESIS" and every["GENESIS"].startswith("In the beginning God created")
    assert "For God so loved the world" in text(kjv, "test") and "For God so loved the world" not in text(kjv, "train")
    for held_out in (VALID, TEST):
        share = sum(len(every[name]) for name in held_out) / sum(map(len, every.values()))
        assert 0.03 < share < 0.07


def test_no_window_is_in_two_splits(kjv: TaskData) -> None:
    train, valid, test = (sequences_as_values(arrays(split)[0]) for split in (kjv.train, kjv.valid, kjv.test))
    assert not np.isin(train, valid).any() and not np.isin(train, test).any() and not np.isin(valid, test).any()


def test_targets_are_the_next_tokens(kjv: TaskData) -> None:
    ids, targets = arrays(kjv.valid)
    np.testing.assert_array_equal(ids[:, 1:], targets[:, :-1])
    np.testing.assert_array_equal(ids[1:51, 0], targets[:50, -1])


def test_unigram_level_is_the_cross_entropy_of_byte_frequencies(kjv: TaskData) -> None:
    train, test = arrays(kjv.train)[1].ravel().tolist(), arrays(kjv.test)[1].ravel().tolist()
    counts = Counter(train)
    bits = -sum(log2((counts[byte] + 1) / (len(train) + 256)) for byte in test) / len(test)
    assert kjv.metric.levels["unigram"] == pytest.approx(bits)
    assert kjv.bytes_per_token == {"train": 1.0, "valid": 1.0, "test": 1.0}


@pytest.mark.long
def test_bpe_is_trained_on_train_and_loses_nothing() -> None:
    data = get_task("kjv", {"tokenizer": "bpe", "bpe_vocab_size": 512, "n_train": 50}).build()
    assert data.vocab_size == 512 and data.bytes_per_token is not None
    assert 2.0 < data.bytes_per_token["test"] < 3.0
    assert data.metric.levels["unigram"] < get_task("kjv", {}).build().metric.levels["unigram"]
    assert len(data.train) == 50


@pytest.mark.long
def test_pretrained_tokenizer_from_a_folder(tmp_path: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["the quick brown fox " * 50], vocab_size=280)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer).save_pretrained(tmp_path)
    data = get_task("kjv", {"tokenizer": f"pretrained:{tmp_path}", "n_train": 20}).build()
    assert data.vocab_size == bpe.get_vocab_size()
    with pytest.raises(UserError, match="cannot load the pretrained name or folder 'no/such'"):
        get_task("kjv", {"tokenizer": "pretrained:no/such"}).build()


def test_local_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"line {i} says {i * i}\n" for i in range(2000)))
    by_place = get_task("text", {"files": [f"{tmp_path}/*.txt"], "length": 32}).build()
    assert "line 1990 says" in text(by_place, "test") and "line 3 says" in text(by_place, "train")
    (tmp_path / "b.txt").write_text("another file altogether, with other words in it. " * 40)
    given = {"train": [f"{tmp_path}/a.txt"], "valid": [f"{tmp_path}/b.txt"], "test": [f"{tmp_path}/b.txt"]}
    with pytest.raises(UserError, match=r"options.test: '.*b.txt' says the same as '.*b.txt' of valid"):
        get_task("text", {**given, "length": 32}).build()
    (tmp_path / "c.txt").write_text((tmp_path / "b.txt").read_text() + "And then some more.")
    with pytest.raises(UserError, match="'valid' holds nothing that the other splits do not"):
        get_task("text", {**given, "test": [f"{tmp_path}/c.txt"], "length": 32}).build()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"\xff\xfe\x00binary", "as UTF-8 text"), (b"short", "needs more text")],
)
def test_bad_files_are_one_clear_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        get_task("text", {"files": [f"{tmp_path}/x.txt"]}).build()
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no file matches"):
        get_task("text", {"files": [f"{tmp_path}/y.txt"]}).build()
    with pytest.raises(UserError, match="either files, or all of"):
        get_task("text", {"train": ["a"], "test": ["b"]})


@pytest.fixture
def local_copy(tmp_path: Path) -> str:
    """A data set as one finds it on the hub: a folder of JSON lines, a file for each split."""
    for split, start in (("train", 0), ("test", 5000)):
        lines = [
            json.dumps({"text": f"document {i} about {i % 7} things and {i * 31 % 997} others"})
            for i in range(start, start + 300)
        ]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    return str(tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_data_set_from_a_local_copy(local_copy: str, streaming: bool) -> None:
    data = get_task("hub", {"dataset": local_copy, "length": 32, "streaming": streaming}).build()
    assert "document 5001 about" in text(data, "test")
    assert "document 299 " in text(data, "valid") and "document 299 " not in text(data, "train")
    few = get_task("hub", {"dataset": local_copy, "length": 16, "streaming": streaming, "max_documents": 60}).build()
    assert len(few.train) < len(data.train)


def test_hub_errors_are_one_clear_line(local_copy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    Path("damaged.jsonl").write_text("no JSON")
    for options, message in (
        ({"dataset": local_copy, "text_column": "txt"}, "text_column 'txt'; did you mean 'text'"),
        ({"dataset": "nobody/nothing"}, "cannot load 'nobody/nothing'"),
        ({"dataset": "empty.jsonl"}, "hub.options.dataset: 'empty.jsonl' is empty"),
        ({"dataset": "damaged.jsonl"}, "cannot load 'damaged.jsonl': JSON parse error: Invalid value"),
    ):
        with pytest.raises(UserError, match=message) as error:
            get_task("hub", options).build()
        assert "\n" not in str(error.value)


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown task 'kvj'; did you mean 'kjv'"):
        get_task("kvj", {})


def test_batches_are_a_function_of_seed_and_step(kjv: TaskData) -> None:
    first, second = Batches(kjv.valid, 7, 3), Batches(kjv.valid, 7, 3)
    far = [second.batch(step) for step in (600, 0, 250)]  # any order
    for step, (ids, targets) in zip((600, 0, 250), far, strict=True):
        np.testing.assert_array_equal(first.batch(step)[0], ids)
        np.testing.assert_array_equal(ids[:, 1:], targets[:, :-1])
    assert not np.array_equal(first.batch(0)[0], Batches(kjv.valid, 7, 4).batch(0)[0])


def test_an_epoch_shows_every_sequence_once(kjv: TaskData) -> None:
    ids, _ = arrays(kjv.valid)
    batches = Batches(kjv.valid, 10, 0)
    seen = np.concatenate([batches.batch(step)[0] for step in range(-(-2 * len(ids) // 10))])[: 2 * len(ids)]
    for epoch in (seen[: len(ids)], seen[len(ids) :]):
        np.testing.assert_array_equal(np.sort(sequences_as_values(epoch)), np.sort(sequences_as_values(ids)))
    assert not np.array_equal(seen[: len(ids)], seen[len(ids) :])


def test_a_batch_may_be_larger_than_the_split() -> None:
    data = get_task("p_hop", {"n_train": 5, "n_valid": 1, "n_test": 1}).build()
    ids, _ = Batches(data.train, 12, 0).batch(0)
    assert ids.shape == (12, 64) and len(np.unique(sequences_as_values(ids))) == 5
