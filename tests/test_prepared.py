"""Prepared data: the same as made data, mapped, shared, and made again where they are damaged."""

from __future__ import annotations

import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from bench.config import Cell
from bench.data.batches import Batches, arrays, views
from bench.data.prepared import cell_data, load_prepared, prepare, save
from bench.data.task import Metric, TaskData, get_task, make_data, task_data
from bench.errors import CellError
from bench.processes import worker_context
from bench.run.going import run_cell
from bench.store.store import Store
from bench.study.plan import make_plan
from bench.study.schema import Study

ROOT = Path(__file__).parents[1]
TASKS: dict[str, dict[str, Any]] = {
    "recall": {"length": 16, "n_train": 40, "n_valid": 5, "n_test": 5, "test_lengths": [24]},
    "text": {"files": [str(ROOT / "README.md")], "length": 32, "tokenizer": "bpe", "bpe_vocab_size": 300},
}


def cell(task: str = "recall", seed: int = 0) -> Cell:
    raw = {
        "name": "tiny",
        "question": "?",
        "variants": ["htc"],
        "tasks": [{"name": task, "options": TASKS[task]}],
        "seeds": [seed],
        "model": {"n_blocks": 4, "d_model": 8, "n_heads": 2, "n_cycles": 2},
        "train": {"steps": 4, "batch_size": 4, "eval_sequences": 4, "device": "cpu"},
    }
    (planned,) = make_plan(Study.model_validate(raw), "", None).cells
    return planned.cell


@pytest.mark.parametrize("task", TASKS)
def test_what_is_read_is_what_was_made(tmp_path: Path, task: str) -> None:
    made = get_task(task, TASKS[task]).build()
    save(made, tmp_path / made.fingerprint, tmp_path)
    read = load_prepared(tmp_path / made.fingerprint)
    assert read is not None and list(tmp_path.iterdir()) == [tmp_path / made.fingerprint]
    shutil.rmtree(tmp_path / made.fingerprint)  # a cell that has begun needs it no more
    for name in ("vocab_size", "length", "max_length", "fingerprint", "metric", "bytes_per_token"):
        assert getattr(read, name) == getattr(made, name)
    assert read.splits.keys() == made.splits.keys()
    for name, split in made.splits.items():
        assert read.splits[name].to_dict() == split.to_dict() and read.splits[name].features == split.features
    ids = arrays(made.test)[0][0].tolist()
    assert read.tokenizer().decode(ids) == made.tokenizer().decode(ids)


def test_training_reads_the_file_itself(tmp_path: Path) -> None:
    made = get_task("recall", {"length": 64, "n_train": 20_000, "n_valid": 5, "n_test": 5}).build()
    save(made, tmp_path / made.fingerprint, tmp_path)
    before = pa.total_allocated_bytes()
    read = load_prepared(tmp_path / made.fingerprint)
    assert read is not None
    mapped, whole = Batches(read.train, 8, 0), Batches(made.train, 8, 0)
    size = mapped.ids.nbytes + mapped.targets.nbytes
    assert size == 2 * 20_000 * 64 * 2
    assert pa.total_allocated_bytes() - before < size / 100 and not mapped.ids.flags.owndata
    for step in (0, 2499, 2500):
        for one, other in zip(mapped.batch(step), whole.batch(step), strict=True):
            assert one.dtype == np.int64 and one.flags.writeable
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("vocab_size", "kind"), [(32_768, np.int16), (32_769, np.int32)])
def test_tokens_take_two_bytes_where_they_fit(vocab_size: int, kind: type) -> None:
    ids = np.array([[0, vocab_size - 1]])
    one = (ids, np.array([[-100, vocab_size - 1]]))
    data = make_data({"train": one, "valid": one, "test": one}, vocab_size, Metric("accuracy", True, {}))
    assert [column.dtype for column in views(data.train)] == [kind, kind]
    np.testing.assert_array_equal(arrays(data.train), one)
    with pytest.raises(ValueError, match=rf"'train' has the token {vocab_size - 1} \(allowed: 0 to {vocab_size - 2}\)"):
        make_data({"train": one, "valid": one, "test": one}, vocab_size - 1, Metric("accuracy", True, {}))


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
        patch.setattr("bench.data.task.task_data", lambda *_: pytest.fail("the data are made again"))
        shutil.rmtree(store.folder(planned.id))
        assert run_cell(planned, store).metrics == first.metrics
    assert (folder / "train.arrow").stat().st_mtime_ns == stamp
    for name in ("train.arrow", "data.json", "24.arrow", "tokenizer/tokenizer.json"):
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)
        assert load_prepared(folder) is None, name
        shutil.rmtree(store.folder(planned.id))
        assert run_cell(planned, store).metrics == first.metrics
        assert load_prepared(folder) is not None


def test_data_other_than_planned_are_refused_and_not_stored(tmp_path: Path) -> None:
    other = cell().model_copy(update={"fingerprint": "0" * 64})
    with pytest.raises(CellError, match=r"the data have changed: fingerprint .*, planned 000000000000"):
        cell_data(other, Store(tmp_path))
    assert not list(tmp_path.iterdir())


def test_what_another_process_has_stored_meanwhile_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files may be mapped already: they must stay."""
    store, first, second = Store(tmp_path), cell(), cell(seed=1)
    folder = store.data(first.fingerprint)

    def slow(name: str, options: dict[str, Any]) -> TaskData:
        monkeypatch.undo()
        cell_data(first, store)
        return task_data(name, options)

    monkeypatch.setattr("bench.data.task.task_data", slow)
    assert cell_data(second, store).fingerprint == first.fingerprint
    kept = (folder / "train.arrow").stat().st_ino
    cell_data(second, store)
    assert (folder / "train.arrow").stat().st_ino == kept
    with pytest.raises(OSError, match="not empty"):
        save(task_data(first.task, first.task_options), folder, store.folder(second.id))
    assert not list(store.folder(second.id).iterdir()) and (folder / "train.arrow").stat().st_ino == kept


def test_processes_that_begin_together_leave_one_whole_copy(tmp_path: Path) -> None:
    store, cells = Store(tmp_path), [cell(seed=seed) for seed in range(4)]
    folder = store.data(cells[0].fingerprint)
    for damaged in (False, True):
        if damaged:
            (folder / "tokenizer" / "tokenizer.json").unlink()
        with ProcessPoolExecutor(4, worker_context()) as pool:
            found = list(pool.map(_fingerprint, cells, [store] * 4))
        assert found == [cells[0].fingerprint] * 4 and load_prepared(folder) is not None
        assert [path for path in tmp_path.rglob("*") if path.name.startswith(".")] == []


def _fingerprint(one: Cell, store: Store) -> str:
    return cell_data(one, store).fingerprint


def test_a_study_prepares_its_data_before_its_cells_begin(tmp_path: Path) -> None:
    store = Store(tmp_path)
    prepare([cell(), cell("text"), cell(seed=1)], store)
    assert {path.name for path in (tmp_path / "data").iterdir()} == {cell().fingerprint, cell("text").fingerprint}
    prepare([cell().model_copy(update={"fingerprint": "0" * 64})], store)  # its cells say why there are none
    assert load_prepared(store.data("0" * 64)) is None


def test_a_disk_that_refuses_the_data_is_told(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("in the way")
    with pytest.raises(OSError, match="data"):
        cell_data(cell(), Store(tmp_path))
