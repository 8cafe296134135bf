"""Prepared data: the same as made data, mapped, shared, and made again where they are damaged."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from bench.cells import run_cell
from bench.config import Cell
from bench.data import TaskData, get_task
from bench.data.batches import Batches, arrays, views
from bench.data.prepared import cell_data, load, save
from bench.errors import CellError
from bench.plan import make_plan
from bench.store import Store
from bench.study import Study

TASKS: dict[str, dict[str, Any]] = {
    "recall": {"length": 16, "n_train": 40, "n_valid": 5, "n_test": 5, "test_lengths": [24]},
    "kjv": {"length": 32, "tokenizer": "bpe", "bpe_vocab_size": 300, "n_train": 40, "n_valid": 5, "n_test": 5},
}


def splits(data: TaskData) -> dict[str, Any]:
    return {"train": data.train, "valid": data.valid, "test": data.test, **data.tests}


def cell(task: str = "recall") -> Cell:
    raw = {
        "name": "tiny",
        "question": "?",
        "variants": ["htc"],
        "tasks": [{"name": task, "options": TASKS[task]}],
        "seeds": [0],
        "model": {"n_blocks": 4, "d_model": 8, "n_heads": 2, "n_cycles": 2},
        "train": {"steps": 4, "batch_size": 4, "eval_sequences": 4, "device": "cpu"},
    }
    (planned,) = make_plan(Study.model_validate(raw), "", None).cells
    return planned.cell


@pytest.mark.parametrize("task", TASKS)
def test_what_is_read_is_what_was_made(tmp_path: Path, task: str) -> None:
    made = get_task(task, TASKS[task]).build()
    save(made, tmp_path / "data", tmp_path)
    read = load(tmp_path / "data")
    assert read is not None and list(tmp_path.iterdir()) == [tmp_path / "data"]
    for name in ("vocab_size", "length", "max_length", "fingerprint", "metric", "bytes_per_token"):
        assert getattr(read, name) == getattr(made, name)
    assert splits(read).keys() == splits(made).keys()
    for name, split in splits(made).items():
        assert splits(read)[name].to_dict() == split.to_dict() and splits(read)[name].features == split.features
    ids = arrays(made.test)[0][0].tolist()
    assert read.tokenizer().decode(ids) == made.tokenizer().decode(ids)


def test_training_reads_the_file_itself(tmp_path: Path) -> None:
    made = get_task("recall", {"length": 64, "n_train": 20_000, "n_valid": 5, "n_test": 5}).build()
    save(made, tmp_path / "data", tmp_path)
    before = pa.total_allocated_bytes()
    read = load(tmp_path / "data")
    assert read is not None
    mapped, whole = Batches(read.train, 8, 0), Batches(made.train, 8, 0)
    size = mapped.ids.nbytes + mapped.targets.nbytes
    assert size == 2 * 20_000 * 64 * 2
    assert pa.total_allocated_bytes() - before < size / 100 and not mapped.ids.flags.owndata
    for step in (0, 2499, 2500):
        for one, other in zip(mapped.batch(step), whole.batch(step), strict=True):
            assert one.dtype == np.int64 and one.flags.writeable
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("vocab_size", "kind"), [(32_767, np.int16), (32_768, np.int32)])
def test_tokens_take_as_few_bytes_as_hold_them(vocab_size: int, kind: type) -> None:
    from bench.data.task import Metric, make_data

    ids = np.array([[0, vocab_size - 1]])
    one = (ids, np.array([[-100, vocab_size - 1]]))
    data = make_data({"train": one, "valid": one, "test": one}, vocab_size, Metric("accuracy", True, {}))
    assert [column.dtype for column in views(data.train)] == [kind, kind]
    np.testing.assert_array_equal(arrays(data.train), one)


def test_a_cell_prepares_its_data_once_and_mends_what_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, planned = Store(tmp_path), cell()
    first = run_cell(planned, store)
    folder = store.data(planned.fingerprint)
    assert sorted(path.name for path in folder.iterdir()) == [
        *("24.arrow", "data.json", "test.arrow", "tokenizer", "train.arrow", "valid.arrow")
    ]
    stamp = (folder / "train.arrow").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr("bench.plan.task_data", lambda *_: pytest.fail("the data are made again"))
        shutil.rmtree(store.folder(planned.id))
        assert run_cell(planned, store)["metrics"] == first["metrics"]
    assert (folder / "train.arrow").stat().st_mtime_ns == stamp
    for name, cut in (("train.arrow", 100), ("data.json", 10), ("24.arrow", 0)):
        with (folder / name).open("r+b") as file:
            file.truncate(cut)
        assert load(folder) is None
        shutil.rmtree(store.folder(planned.id))
        assert run_cell(planned, store)["metrics"] == first["metrics"]
        assert load(folder) is not None


def test_data_other_than_planned_are_refused_and_not_stored(tmp_path: Path) -> None:
    other = cell().model_copy(update={"fingerprint": "0" * 64})
    with pytest.raises(CellError, match=r"the data have changed: fingerprint .*, planned 000000000000"):
        cell_data(other, Store(tmp_path))
    assert not list(tmp_path.iterdir())


def test_what_another_process_has_stored_meanwhile_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, planned = Store(tmp_path), cell()
    folder, remove = store.data(planned.fingerprint), shutil.rmtree

    def late(path: Path, **options: Any) -> None:
        if path == folder:
            (folder / "of another").mkdir(parents=True)
        else:
            remove(path, **options)

    monkeypatch.setattr("bench.store.shutil.rmtree", late)
    assert cell_data(planned, store).fingerprint == planned.fingerprint
    assert list(folder.iterdir()) == [folder / "of another"] and not list(store.folder(planned.id).iterdir())


def test_a_disk_that_refuses_the_data_is_told(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("in the way")
    with pytest.raises(OSError, match="data"):
        cell_data(cell(), Store(tmp_path))
