"""Text as it is found: copies among splits, marks and bytes that are no text, rows that lack something."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest

from bench.data import overlap, prepared
from bench.data.batches import arrays, views
from bench.data.columns import Column, batches, rows_of
from bench.data.prepared import cell_data, load_prepared
from bench.data.task import TaskData, get_task
from bench.errors import UserError
from bench.store.store import Store

WORDS = [f"{letter}{number}" for letter in "abcdefgh" for number in range(60)]


def prose(lines: int, seed: int) -> str:
    """Text that nobody else writes."""
    random = Random(seed)
    return "".join(" ".join(random.choices(WORDS, k=12)) + "\n" for _ in range(lines))


def build(task: str, **options: Any) -> TaskData:
    return get_task(task, {"length": 32, **options}).build()


def text(data: TaskData, split: str) -> str:
    return bytes(arrays(data.splits[split])[0].ravel().tolist()).decode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three texts of their own."""
    for seed, name in enumerate("abc"):
        (tmp_path / f"{name}.txt").write_text(prose(60, seed))
    return tmp_path


def splits(folder: Path, train: str = "a", valid: str = "b", test: str = "c") -> dict[str, list[str]]:
    return {"train": [f"{folder}/{train}.txt"], "valid": [f"{folder}/{valid}.txt"], "test": [f"{folder}/{test}.txt"]}


def other_ends(content: bytes) -> bytes:
    return b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n")


@pytest.mark.parametrize(
    ("train", "test"), [("*", "c"), ("copy", "c"), ("[a-z]", "c"), ("link", "c"), ("dressed", "c"), ("./c", "c")]
)
def test_a_text_is_in_one_split_whatever_its_file_is_called(folder: Path, train: str, test: str) -> None:
    if train in ("copy", "link", "dressed"):
        same = (folder / "c.txt").read_bytes()
        (folder / "copy.txt").write_bytes(same) if train == "copy" else None
        (folder / "dressed.txt").write_bytes(other_ends(same)) if train == "dressed" else None
        (folder / "link.txt").symlink_to(folder / "c.txt") if train == "link" else None
    with pytest.raises(UserError, match=r"^text.options.(valid|test): '.*' says the same as '.*' of train") as error:
        build("text", **splits(folder, train=train, test=test))
    assert "\n" not in str(error.value)


def test_files_cut_by_place_are_different_texts(folder: Path) -> None:
    with pytest.raises(UserError, match=r"^text.options.files: '.*/a.txt' says the same as '.*/a.txt' \(allowed"):
        build("text", files=[f"{folder}/a.txt", f"{folder}/a*.txt"])
    assert build("text", files=[f"{folder}/a.txt", f"{folder}/[b-c].txt"]).notes == ()


def test_a_text_twice_in_one_split_is_told(folder: Path) -> None:
    given = splits(folder)
    data = build("text", **{**given, "train": given["train"] * 2})
    assert data.notes == ("1 of 4 files of train say the same as one before",)
    assert len(data.train) > 1.9 * len(build("text", **given).train)


def test_passages_that_two_splits_have_in_common_are_counted(folder: Path) -> None:
    whole = (folder / "c.txt").read_text()
    passage = whole[500:900]  # 301 passages of 100 bytes
    (folder / "a.txt").write_text(prose(60, 0) + passage + prose(60, 9))
    data = build("text", **splits(folder))
    n = len(whole) - overlap.PASSAGE + 1
    assert data.notes == (f"301 of {n:,} passages of 100 bytes in test stand in train too ({301 / n:.2%})",)
    (folder / "a.txt").write_text(prose(60, 0) + passage[:99] + prose(60, 9))
    assert build("text", **splits(folder)).notes == ()
    (folder / "b.txt").write_text(prose(30, 5) + "-" + passage + prose(30, 6))
    told = " ".join(build("text", **splits(folder)).notes)
    assert "301 of " in told and "in test stand in valid too" in told and "stand in train too" not in told


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("chunk", [256, 1 << 17])
def test_passages_are_those_that_a_search_finds(chunk: int, sampled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "CHUNK", chunk)
    if sampled:
        monkeypatch.setattr(overlap, "KEPT", 1 << 11)
    test = prose(300, 1)
    pieces = [test[start : start + 150] for start in range(0, len(test) - 150, 1500)]
    documents = {"train": [prose(20, 90 + at) + piece for at, piece in enumerate(pieces)], "valid": [prose(9, 3)]}
    documents["test"] = [test[:777], test[777:]]  # joined as they are
    train = "".join(documents["train"])
    starts = range(len(test) - overlap.PASSAGE + 1)
    share = np.mean([test[start : start + overlap.PASSAGE] in train for start in starts])
    (told,) = overlap.shared_passages(documents, {name: len("".join(texts)) for name, texts in documents.items()})
    found, total = (int(word.replace(",", "")) for word in (told.split()[0], told.split()[2]))
    if sampled:
        assert "in a sample of one in 8)" in told and found / total == pytest.approx(share, rel=0.3)
    else:
        assert total == len(starts) and found == round(share * total)


def test_windows_that_another_split_has_are_left_out_and_told(folder: Path) -> None:
    (folder / "a.txt").write_text((folder / "c.txt").read_text()[: 32 * 5] + prose(60, 0))
    data = build("text", **splits(folder))
    assert f"5 of {len(data.train) + 5} sequences of train left out: valid or test has them too" in data.notes


def test_what_is_the_name_of_a_file_is_no_pattern(folder: Path) -> None:
    (folder / "a[1].txt").write_text(prose(60, 7))
    (folder / "a1.txt").write_text(prose(60, 8))
    named = build("text", **splits(folder, train="a[1]"))
    assert text(named, "train") in prose(60, 7)
    (folder / "a[1].txt").unlink()
    (folder / "d[1]").mkdir()
    (folder / "d1").mkdir()
    (folder / "d[1]" / "x.txt").write_text(prose(60, 17))
    (folder / "d1" / "x.txt").write_text(prose(60, 18))
    assert text(build("text", **splits(folder, train="d[1]/[x-z]")), "train") in prose(60, 17)
    shutil.rmtree(folder / "d[1]")
    assert text(build("text", **splits(folder, train="d[1]/*")), "train") in prose(60, 18)
    assert text(build("text", **splits(folder, train="a[1]")), "train") in prose(60, 8)


def test_marks_and_line_ends(folder: Path) -> None:
    plain = build("text", **splits(folder))
    assert plain.notes == ()
    path = folder / "a.txt"
    path.write_bytes(other_ends(path.read_bytes()))
    dressed = build("text", **splits(folder))
    assert dressed.fingerprint == plain.fingerprint
    assert dressed.notes == (
        "1 of 3 files begin with a byte-order mark, which is left out",
        "1 of 3 files have line ends with a carriage return, read as \\n",
    )
    path.write_bytes(path.read_bytes().replace(b"\r\n", b"\r").removeprefix(b"\xef\xbb\xbf"))
    assert build("text", **splits(folder)).fingerprint == plain.fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"some text \x00 and more", "has the character NUL at place 10: it is no text"),
        ("text".encode("utf-16"), "cannot read .* as UTF-8 text: .* position 0"),
        (b"caf\xe9 " * 50, "cannot read .* as UTF-8 text: .* position 3"),
        (b"\xef\xbb\xbf \r\n", "is empty"),
    ],
)
def test_what_is_no_text_is_refused(folder: Path, content: bytes, message: str) -> None:
    (folder / "b.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"^text.options.valid: .*{message}") as error:
        build("text", **splits(folder))
    assert "\n" not in str(error.value)


Row = dict[str, Any]


def rows(count: int, seed: int = 0) -> list[Row]:
    return [{"text": prose(2, seed * 1000 + number)} for number in range(count)]


def jsonl(folder: Path, **of: list[Row]) -> str:
    for name, given in of.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    return str(folder)


both = pytest.mark.parametrize("streaming", [False, True])


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of ``datasets`` of a test's own."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", path)
    return path


@both
def test_null_is_no_word(tmp_path: Path, streaming: bool) -> None:
    given = rows(300)
    plain = build("hub", dataset=jsonl(tmp_path, train=given, test=rows(40, 1)), streaming=streaming)
    with_holes = [*given[:7], {"text": None}, *given[7:], {"text": None}, {"text": "one\0two"}]
    holed = build("hub", dataset=jsonl(tmp_path, train=with_holes), streaming=streaming)
    assert "None" not in text(holed, "train") + text(holed, "valid") + text(holed, "test")
    assert holed.fingerprint == plain.fingerprint
    assert holed.notes == (
        "2 rows of train left out: no text in column 'text'",
        "1 rows of train left out: the character NUL in column 'text'",
    )


@both
@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"a": 1}, r"\{'a': 1\}"),
        (3, "3"),
        (2.5, "2.5"),
        (True, "True"),
        (["x"] * 40, r"\['x', 'x', .*\.\.\."),
    ],
)
def test_what_is_no_text_is_refused_with_row_and_column(
    tmp_path: Path, streaming: bool, value: Any, shown: str
) -> None:
    given = [{"text": "fine", "other": None}] * 3 + [{"text": "fine", "other": value}] * 40
    place = rf"^hub.options.dataset: .*, split 'train', row 3, column 'other' holds {shown} \(allowed: text, or null"
    with pytest.raises(UserError, match=place) as error:
        build("hub", dataset=jsonl(tmp_path, train=given), text_column="other", streaming=streaming)
    assert "\n" not in str(error.value)


@both
def test_rows_of_many_kinds_in_one_column(tmp_path: Path, streaming: bool) -> None:
    """Whatever ``datasets`` makes of them, no number becomes a word."""
    with pytest.raises(UserError, match=r"^hub.options.dataset: ") as error:
        build("hub", dataset=jsonl(tmp_path, train=[*rows(30), {"text": 5}, {"text": {"a": 1}}]), streaming=streaming)
    assert "\n" not in str(error.value)


def broken_utf8(path: Path) -> None:
    offsets = pa.py_buffer(np.array([0, 3, 6], np.int32).tobytes())
    bad = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"abc\xff\xfez")])
    table = pa.table({"text": bad})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


@both
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("x.arrow", broken_utf8),
        ("x.jsonl", lambda path: path.write_bytes(b'{"text": "caf\xe9"}\n')),
        ("x.jsonl", lambda path: path.write_text('{"text": "whole"}\n{"text": "cut of')),
        ("x.parquet", lambda path: path.write_bytes(b"no parquet at all")),
    ],
)
def test_files_that_are_damaged_are_one_clear_line(
    tmp_path: Path, streaming: bool, name: str, write: Callable[[Path], Any]
) -> None:
    write(tmp_path / name)
    with pytest.raises(UserError, match=r"^hub.options.dataset: ") as error:
        build("hub", dataset=str(tmp_path / name), streaming=streaming)
    assert "\n" not in str(error.value)


@both
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_local_files_are_data_sets(tmp_path: Path, streaming: bool, kind: str) -> None:
    table, path = pa.Table.from_pylist(rows(200)), tmp_path / f"x.{kind}"
    if kind == "jsonl":
        jsonl(tmp_path, x=rows(200))
    elif kind == "parquet":
        datasets.Dataset(table).to_parquet(path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    data = build("hub", dataset=str(path), streaming=streaming)
    assert text(data, "train")[:20] == prose(2, 0)[:20]
    assert data.fingerprint == build("hub", dataset=jsonl(tmp_path, train=rows(200))).fingerprint


@both
def test_what_save_to_disk_has_written_is_a_data_set(tmp_path: Path, streaming: bool) -> None:
    whole = datasets.Dataset.from_list(rows(200))
    whole.save_to_disk(tmp_path / "whole")
    data = build("hub", dataset=str(tmp_path / "whole"), streaming=streaming)
    assert data.fingerprint == build("hub", dataset=jsonl(tmp_path, train=rows(200))).fingerprint
    bounds = {"train": (0, 120), "dev": (120, 160), "test": (160, 200)}
    parts = {name: whole.select(range(*bound)) for name, bound in bounds.items()}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "parts")
    data = build("hub", dataset=str(tmp_path / "parts"), streaming=streaming)
    assert text(data, "valid")[:20] == prose(2, 120)[:20] and text(data, "test")[:20] == prose(2, 160)[:20]
    with pytest.raises(UserError, match=r"hub.options.config: 'x' \(allowed: none, of what save_to_disk wrote\)"):
        build("hub", dataset=str(tmp_path / "whole"), streaming=streaming, config="x")


@both
def test_brackets_in_the_name_of_a_data_set_are_no_pattern(tmp_path: Path, streaming: bool) -> None:
    jsonl(tmp_path, **{"a1": rows(200, 1), "a[1]": rows(200)})
    data = build("hub", dataset=str(tmp_path / "a[1].jsonl"), streaming=streaming)
    assert text(data, "train")[:20] == prose(2, 0)[:20] != prose(2, 1)[:20]


STREAMED = [
    {},
    {"tokenizer": "bpe", "bpe_vocab_size": 300},
    {"n_train": 50, "n_valid": 7, "n_test": 9},
    {"max_documents": 100},
]


@pytest.mark.parametrize("options", STREAMED, ids=str)
def test_a_stream_gives_the_same_data_piece_by_piece(
    tmp_path: Path, options: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = rows(300)
    given[20] = given[299]  # a window of valid in train: rows are left out in both ways
    where = jsonl(tmp_path, train=given, test=[*rows(40, 1), given[3]])
    whole = build("hub", dataset=where, **options)
    for module in ("columns", "rows"):
        monkeypatch.setattr(f"bench.data.{module}.{'PIECE' if module == 'columns' else 'ROWS'}", 37)
    found = build("hub", dataset=where, streaming=True, **options)
    for name in ("vocab_size", "length", "fingerprint", "metric", "bytes_per_token", "notes"):
        assert getattr(found, name) == getattr(whole, name)
    for name, split in whole.splits.items():
        np.testing.assert_array_equal(views(found.splits[name]), views(split))
    ids = arrays(whole.test)[0][0].tolist()
    assert found.tokenizer().decode(ids) == whole.tokenizer().decode(ids)


def test_a_stream_is_tokenised_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = jsonl(tmp_path, train=rows(300))
    first = build("hub", dataset=where, streaming=True)
    kept = cache / "cyclebench" / first.fingerprint
    assert first.folder == kept and not views(first.train)[0].flags.owndata
    assert {path.name for path in kept.parent.iterdir() if path.is_dir()} == {kept.name}, "nothing is left behind"

    def again(*_: Any) -> None:
        raise AssertionError("tokenised again")

    with monkeypatch.context() as patch:
        patch.setattr("bench.data.hub.text_data", again)
        assert build("hub", dataset=where, streaming=True).fingerprint == first.fingerprint
        for changed in ({"length": 16}, {"max_documents": 20}):
            with pytest.raises(AssertionError, match="tokenised again"):
                build("hub", dataset=where, streaming=True, **changed)
    jsonl(tmp_path, train=rows(300, 5))
    os.utime(tmp_path / "train.jsonl", (1, 1))
    other = build("hub", dataset=where, streaming=True)
    assert other.fingerprint != first.fingerprint, "the files have changed"
    (kept.parent / other.fingerprint / "train.arrow").write_bytes(b"damaged")
    assert build("hub", dataset=where, streaming=True).fingerprint == other.fingerprint
    assert load_prepared(kept.parent / other.fingerprint) is not None
    shutil.rmtree(cache)
    assert build("hub", dataset=where, streaming=True).fingerprint == other.fingerprint


def test_a_store_has_the_same_files_as_the_cache(tmp_path: Path) -> None:
    from test_prepared import TASKS, cell

    where = jsonl(tmp_path, train=rows(300))
    TASKS["hub"] = {"dataset": where, "length": 32, "streaming": True}
    try:
        one, store = cell("hub"), Store(tmp_path / "runs")
    finally:
        del TASKS["hub"]
    found = cell_data(one, store)
    kept = prepared.task_data(one.task, one.task_options).folder
    assert kept is not None and found.folder == store.data(one.fingerprint) != kept
    assert os.path.samefile(kept / "train.arrow", found.folder / "train.arrow")
    shutil.rmtree(found.folder)
    shutil.rmtree(kept)  # what is mapped stays
    assert cell_data(one, store).fingerprint == one.fingerprint


@pytest.mark.parametrize("room", [False, True])
def test_columns(tmp_path: Path, room: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    column, empty = (Column(np.int16, tmp_path if room else None) for _ in range(2))
    for start in range(0, 60, 12):
        column.add(np.arange(start, start + 12))
    found = column.whole()
    assert found.dtype == np.int16 and found.tolist() == list(range(60)) and not len(empty.whole())
    table, wanted = found.reshape(20, 3), np.arange(20) % 3 > 0
    assert rows_of(table, wanted | True) is table is rows_of(table, wanted | True, 20)
    monkeypatch.setattr("bench.data.columns.PIECE", 12)
    for keep in (None, 1, 5, 12, 13, 40):
        expected = table[wanted]
        if keep is not None and keep < len(expected):
            expected = expected[np.arange(keep) * len(expected) // keep]
        np.testing.assert_array_equal(rows_of(table, wanted, keep, tmp_path if room else None), expected)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert [list(batch) for batch in batches(["a" * (1 << 19), "b" * (1 << 19), "c"])] == [
        ["a" * (1 << 19), "b" * (1 << 19)],
        ["c"],
    ]
