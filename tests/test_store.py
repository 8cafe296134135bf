import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from bench.errors import UserError
from bench.store import Store, atomic_write

RECORD = {"status": "done", "id": "a", "metrics": {}, "value": [1.5, None]}


def test_round_trip_and_results_win_over_failures(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    assert store.record("a") is None and not store.done("a") and store.manifest("s") is None
    store.write_failure("a", {"status": "failed", "reason": "why"})
    assert not store.done("a") and store.results(["a", "b"]) == {"a": {"status": "failed", "reason": "why"}}
    store.write_result("a", RECORD)
    assert store.done("a") and store.record("a") == RECORD
    assert not (store.folder("a") / "failure.json").exists()
    store.write_manifest("s", {"cells": []})
    assert store.manifest("s") == {"cells": []}


def test_results_are_never_overwritten(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_result("a", RECORD)
    with pytest.raises(UserError, match="not overwritten"):
        store.write_result("a", {**RECORD, "value": 2})
    assert store.record("a") == RECORD


@pytest.mark.parametrize("content", [b"", b'{"status": "do', b"[1]", b"\xff\xfe"])
def test_a_damaged_result_is_set_aside_and_run_again(tmp_path: Path, content: bytes) -> None:
    store = Store(tmp_path)
    store.folder("a").mkdir()
    (store.folder("a") / "result.json").write_bytes(content)
    assert not store.done("a")
    assert (store.folder("a") / "result.json.corrupt").read_bytes() == content
    store.write_result("a", RECORD)
    assert store.done("a")


def test_numbers_that_json_has_not_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        Store(tmp_path).write_result("a", {"value": float("nan")})
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
