import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from records import FAILED, MANIFEST, RESULTS, planned

from bench.errors import UserError
from bench.run.cells import failure
from bench.run.status import status
from bench.store.digests import read_sealed, write_sealed
from bench.store.files import atomic_write
from bench.store.records import ExecutionRow, HarnessScores, Stored
from bench.store.store import Records, Store

CELL = MANIFEST.cells[0]
RECORD, FAILURE = RESULTS[CELL.id], RESULTS[FAILED]
# What a file of an earlier version has for certain, by name; a dict or a list where more is told of the part.
RESULT_SHAPE: dict[str, Any] = {
    **dict.fromkeys(("id", "metrics", "slices", "additions", "exits", "zero_attention", "environment"), object),
    **{"cell": {}, "costs": {}, "history": [], "cycles": [], "timing": {}},
}
FAILURE_SHAPE: dict[str, Any] = {"id": str, "cell": {}, "reason": str, "at": float, "environment": object}
MANIFEST_SHAPE: dict[str, Any] = {
    **dict.fromkeys(("study", "question", "reference", "command", "git", "config"), object),
    **{name: [] for name in ("seeds", "variants", "tasks", "cells")},
}


def test_round_trip_and_results_win_over_failures(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    assert store.record("a") is None and not store.done("a") and store.manifest("s") is None
    store.write_failure("a", FAILURE)
    assert not store.done("a") and store.results(["a", "b"]) == {"a": FAILURE}
    store.write_result("a", RECORD)
    assert store.done("a") and store.record("a") == RECORD
    assert not (store.folder("a") / "failure.json").exists()
    store.write_manifest("s", MANIFEST)
    assert store.manifest("s") == MANIFEST


def test_results_are_never_overwritten(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_result("a", RECORD)
    with pytest.raises(UserError, match="not overwritten"):
        store.write_result("a", RECORD.but(schedule="2"))
    assert store.record("a") == RECORD


def test_what_several_add_to_one_file_is_all_there(tmp_path: Path) -> None:
    """Scores of a cell, by processes that score at once; and the searches that had it trained."""
    store, id = Store(tmp_path), "a" * 64
    store.write_result(id, RECORD)
    scores = HarnessScores(of="", scores={"acc": 0.25}, flops_per_token=1.0, version="0")

    def add(writer: int) -> None:
        for number in range(25):
            store.write_harness(id, {f"{writer} {number}": scores})
            store.note_trained_for(id, f"{writer} {number}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(4)))
    told = {f"{writer} {number}" for writer in range(4) for number in range(25)}
    assert {*store.harness(id)} == told and all(store.trained_for(name) == [id] for name in told)


@pytest.mark.parametrize("content", [b"", b'{"status": "do', b"[1]", b"\xff\xfe"])
def test_a_damaged_result_is_set_aside_and_run_again(tmp_path: Path, content: bytes) -> None:
    store = Store(tmp_path)
    store.folder("a").mkdir()
    (store.folder("a") / "result.json").write_bytes(content)
    assert not store.done("a")
    assert (store.folder("a") / "result.json.corrupt").read_bytes() == content
    store.write_result("a", RECORD)
    assert store.done("a")


@pytest.mark.parametrize(
    ("whole", "shape", "name", "read"),
    [
        (RECORD, RESULT_SHAPE, "x/result.json", lambda store: store.record("x")),
        (FAILURE, FAILURE_SHAPE, "x/failure.json", lambda store: store.record("x")),
        (MANIFEST, MANIFEST_SHAPE, "studies/x.json", lambda store: store.manifest("x")),
    ],
)
def test_json_without_what_others_rely_on_is_set_aside(
    whole: Stored, shape: dict[str, Any], name: str, read: Callable[[Store], Any], tmp_path: Path
) -> None:
    path, store, told = tmp_path / name, Store(tmp_path), whole.dump()
    path.parent.mkdir()
    lacking = [{key: value for key, value in told.items() if key != lost} for lost in shape]
    inner = [
        {**told, key: broken} for key, part in shape.items() if isinstance(part, dict | list) for broken in (7, ["7"])
    ]
    for value in ({"status": "done", "metrics": {}}, *lacking, *inner):
        write_sealed(path, value)
        assert read(store) is None and not path.exists()
        assert read_sealed(path.with_name(f"{path.name}.corrupt")) == value
    write_sealed(path, {**told, "later": {"than": ["this"]}})
    found = read(store)
    assert found.dump() == {**told, "later": {"than": ["this"]}}, "what a newer version has added is kept"
    write_sealed(path, told)
    assert read(store) == whole
    path.write_text(json.dumps(told))
    assert read(store) is None and path.with_name(f"{path.name}.corrupt").exists(), "without its digest it is damaged"


@pytest.mark.parametrize("content", [b'"metrics": {}}', b'"metrics": \0\0 {}}'])
def test_a_result_that_is_damaged_within_is_not_done_once_it_was_read(tmp_path: Path, content: bytes) -> None:
    store = Store(tmp_path)
    store.write_result(CELL.id, RECORD)
    path = store.folder(CELL.id) / "result.json"
    path.write_bytes(path.read_bytes()[:200] + content)
    assert store.done(CELL.id), "finished cells are not read"
    found = status(store, MANIFEST.but(cells=[CELL]))
    assert (found.done, found.waiting) == (0, 1) and not store.done(CELL.id)
    with pytest.raises(UserError, match=r"result\.json could not be read .* the same command runs that cell again"):
        Records(store, [CELL.id], {})[CELL.id]
    with pytest.raises(KeyError):
        Records(store, [], {})[CELL.id]


def test_numbers_that_json_has_not_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        Store(tmp_path).write_result("a", RECORD.but(metrics={"test_loss": float("nan")}))
    assert not Store(tmp_path).done("a") and not list(tmp_path.iterdir())


def test_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="is a file"):
        Store(tmp_path / "runs")


def _write_forever(path: Path) -> None:
    number = 0
    while True:
        atomic_write(path, json.dumps([number] * 20000).encode())
        number += 1


def test_records_are_written_as_they_were_read(tmp_path: Path) -> None:
    """Whatever is not given stays away, whatever is given stays as it is, numbers without a fraction too."""
    store = Store(tmp_path)
    for value in (*RESULTS.values(), MANIFEST):
        kind, told = type(value), json.loads(json.dumps(value.dump()))
        assert json.dumps(kind.model_validate(told).dump()) == json.dumps(told) and kind.model_validate(told) == value
    row = {"rule": "kl", "granularity": "token", "threshold": 0.1, "loss": 1.0, "accuracy": 0.5, "mean_cycles": 1.5}
    row |= {"flops_per_token": 9.0, "flops_saved": 0.1, "time_saved": 0.05, "time_saved_quartiles": [0.0, 0.1]}
    store.write_result("a", RECORD)
    store.write_execution("a", "kl by token", [ExecutionRow.model_validate({**row, "rounds": 3})])
    store.write_execution("a", "kl by token", [ExecutionRow.model_validate({**row, "threshold": 0.2, "rounds": 3})])
    store.write_execution("a", "kl by token", [ExecutionRow.model_validate({**row, "rounds": 4})])
    store.write_execution("a", "kl", [])
    told = json.loads((store.folder("a") / "execution.json").read_text())
    assert told.pop("digest")
    first, second = {**row, "threshold": 0.2, "rounds": 3}, {**row, "rounds": 4}
    assert told == {"kl by token": [first, second], "kl": []}, "beside those of other thresholds"
    found = store.record("a")
    assert found is not None and found.status == "done" and found.execution["kl by token"][0].time_saved == 0.05


def test_records_import_nothing_heavy() -> None:
    code = "import sys, bench.store.store, bench.store.manifest; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "pandas", "datasets", "mlflow", "numpy"} & set(loaded)


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for round_ in range(4):
        writer = multiprocessing.get_context("fork").Process(target=_write_forever, args=(path,))
        writer.start()
        while not path.exists():
            time.sleep(0.001)
        time.sleep(0.02 + 0.013 * round_)
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        value = json.loads(path.read_bytes())
        assert len(value) == 20000 and len(set(value)) == 1


def _write_manifests(root: Path) -> None:
    while True:
        Store(root).write_manifest("s", MANIFEST)


def test_a_killed_manifest_write_leaves_nothing_for_good(tmp_path: Path) -> None:
    """Killed until something was left half written; the next write sweeps it, one at the same time does not."""
    left = lambda: list(tmp_path.glob("studies/.*"))  # noqa: E731
    for _ in range(500):
        writer = multiprocessing.get_context("fork").Process(target=_write_manifests, args=(tmp_path,))
        writer.start()
        while not (tmp_path / "studies").exists() or (writer.is_alive() and not left()):
            pass
        writer.kill()
        writer.join()
        if left():
            break
    assert left() and Store(tmp_path).manifest("s") in (MANIFEST, None)
    Store(tmp_path).write_manifest("s", MANIFEST)
    assert not left() and Store(tmp_path).manifest("s") == MANIFEST
    writers = [multiprocessing.get_context("fork").Process(target=_write_manifests, args=(tmp_path,)) for _ in range(3)]
    for writer in writers:
        writer.start()
    time.sleep(0.5)
    assert all(writer.is_alive() for writer in writers), "nobody sweeps what another is writing"
    for writer in writers:
        writer.kill()
        writer.join()


def test_a_reason_with_the_name_of_any_file_is_kept(tmp_path: Path) -> None:
    store, cell = Store(tmp_path), planned(CELL).cell
    store.write_failure(cell.id, failure(cell, "cannot read 'caf\udce9'", "environment", "line\n\udce9"))
    found = store.record(cell.id)
    assert found is not None and found.status == "failed" and found.reason == r"cannot read 'caf\udce9'"
