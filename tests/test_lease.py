"""Leases: one holder at a time, whoever dies, and each cell of a shared study run once."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
from records import FAILED, RESULTS

from bench.processes import me
from bench.run import going
from bench.run.cells import Job, run_job
from bench.run.executors import local
from bench.run.lease import Lease, LeaseLostError, LeaseWatch, read_lease
from bench.run.runner import Running, run_study
from bench.store.files import atomic_write, whole_file, whole_folder
from bench.store.store import Store
from bench.store.versions import TRACES
from bench.study.load import study_from
from bench.study.plan import make_plan
from bench.train.checkpoints import Every

FAILURE, RECORD = RESULTS[FAILED], next(record for record in RESULTS.values() if record.status == "done")
N_CELLS = int(os.environ.get("CYCLEBENCH_LEASE_CELLS", "6"))
N_WORKERS = int(os.environ.get("CYCLEBENCH_LEASE_WORKERS", "4"))  # of two studies together


def test_a_cell_is_held_by_one_and_given_back(tmp_path: Path) -> None:
    watch = LeaseWatch()
    assert watch.free(tmp_path) == 1
    lease = Lease.take(tmp_path, 1)
    assert lease is not None and Lease.take(tmp_path, 1) is None
    with lease:
        lease.note(step=3)
        assert watch.free(tmp_path) is None
        held = read_lease(tmp_path)
        assert held is not None and held["owner"]["pid"] == os.getpid()
    assert watch.free(tmp_path) == 2 and read_lease(tmp_path) is None
    assert Lease.take(tmp_path, 1) is None, "a number that has been given is never given again"
    second = Lease.take(tmp_path, 2)
    assert second is not None
    (tmp_path / "result.json").write_text("{}")
    with second:
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def _die_holding(folder: Path) -> None:
    assert Lease.take(folder, 1) is not None
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_lease_of_a_dead_process_of_this_machine_is_free_at_once(tmp_path: Path) -> None:
    process = local.worker_context().Process(target=_die_holding, args=(tmp_path,))
    process.start()
    process.join()
    assert (tmp_path / "lease.1").exists()
    assert LeaseWatch(expiry=1e9).free(tmp_path) == 2


def test_a_process_that_took_over_a_dead_ones_number_is_not_mistaken_for_it(tmp_path: Path) -> None:
    owner = {**me(), "born": 12345.0}
    (tmp_path / "lease.1").write_text(json.dumps({"owner": owner, "since": 0.0, "released": False}))
    assert LeaseWatch(expiry=1e9).free(tmp_path) == 2


@pytest.mark.parametrize("content", ["other machine", "", "[]", '{"owner": 3'])
def test_the_lease_of_another_machine_expires_by_the_watch_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "lease.1"
    if content == "other machine":
        content = json.dumps({"owner": {**me(), "machine": "another"}, "since": 0.0, "released": False})
    path.write_text(content)
    os.utime(path, (1.0, 1.0))  # a clock that is decades off
    watch = LeaseWatch(expiry=0.2)
    assert watch.free(tmp_path) is None
    time.sleep(0.3)
    os.utime(path, (2.0, 2.0))  # renewed
    assert watch.free(tmp_path) is None
    time.sleep(0.3)
    assert watch.free(tmp_path) == 2


def test_a_holder_renews_and_learns_that_it_was_superseded(tmp_path: Path) -> None:
    lease = Lease.take(tmp_path, 1, beat=0.02)
    assert lease is not None
    with lease:
        lease.note(step=7)
        until = time.monotonic() + 20
        while (read_lease(tmp_path) or {}).get("step") != 7 and time.monotonic() < until:
            time.sleep(0.01)
        assert (read_lease(tmp_path) or {})["step"] == 7
        lease.check()
        (tmp_path / "lease.2").write_text("{}")
        while not lease._lost and time.monotonic() < until:
            time.sleep(0.01)
        with pytest.raises(LeaseLostError):
            lease.check()


def test_of_many_that_try_one_gets_it(tmp_path: Path) -> None:
    for turn in range(20):
        folder, got = tmp_path / str(turn), []
        start = threading.Barrier(8)

        def take(folder: Path = folder, got: list[Any] = got, start: threading.Barrier = start) -> None:
            start.wait()
            got.append(Lease.take(folder, 1))

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(lease is not None for lease in got) == 1


def test_what_a_former_holder_goes_on_to_write_never_appears(tmp_path: Path) -> None:
    store, folder = Store(tmp_path), tmp_path / "a"
    first = Lease.take(folder, 1)
    assert first is not None and first.room.is_dir()
    with whole_file(folder / "begun", first.room) as begun:
        begun.write_text("of the first")
        atomic_write(folder / "before", b"whole", first.room)
    assert {path.name for path in folder.iterdir()} == {"lease.1", first.room.name, "begun", "before"}
    with pytest.raises(FileNotFoundError), whole_file(folder / "late", first.room) as late:
        late.write_text("of the first")
        second = Lease.take(folder, 2)
    assert second is not None
    for write in (
        lambda: store.write_failure("a", FAILURE, first.room),
        lambda: store.write_result("a", RECORD, first.room),
        lambda: atomic_write(folder / "trace.npz", b"", first.room),
        lambda: whole_folder(folder / "model", first.room).__enter__(),
    ):
        with pytest.raises(FileNotFoundError):
            write()
    with pytest.raises(LeaseLostError):
        first.check()
    store.write_result("a", RECORD, second.room)
    with first, second:
        pass
    assert {path.name for path in folder.iterdir()} == {"result.json", "begun", "before"}


def _nothing(*_: Any) -> None:
    pass


@pytest.mark.parametrize("moment", ["cell_data", "examine", "save_checkpoint", "atomic_write", "left_by", "fails"])
def test_who_was_stopped_and_goes_on_leaves_what_another_has_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The holder is stopped at some moment until another has taken the cell over, swept and finished it."""
    cell = make_plan(study_from(STUDY, [], "many"), "", None).cells[0].cell
    store, name = Store(tmp_path), "examine" if moment == "fails" else moment
    real, others = getattr(going, name), list[Any]()

    def stopped(*arguments: Any) -> Any:
        monkeypatch.undo()
        others.append(run_job(Job(cell, "another", tmp_path, Every(), 2), _nothing))
        if moment == "fails":
            raise ZeroDivisionError
        return real(*arguments)

    monkeypatch.setattr(going, name, stopped)
    assert run_job(Job(cell, "first", tmp_path, Every(None, 1), 1), _nothing) is None
    assert [record.status for record in others] == ["done"]
    assert store.record(cell.id) == others[0] and store.sound(cell.id, weights=True)
    left = {path.name for path in store.folder(cell.id).iterdir()}
    assert left == {*TRACES, "cell.json", "log.txt", "model", "result.json", "usage.json"}


STUDY: dict[str, Any] = {
    "name": "many",
    "question": "Does each cell run once?",
    "model": {"d_model": 8, "n_heads": 2, "n_blocks": 1},
    "train": {"steps": 1, "batch_size": 2, "eval_sequences": 2},
    "tasks": [{"name": "p_hop", "options": {"hops": 1, "length": 12, "n_train": 4, "n_valid": 2, "n_test": 2}}],
    "variants": ["vanilla"],
    "seeds": N_CELLS,
}
BEAT, EXPIRY = 0.3, 3.0


def _study(root: Path) -> None:
    """A study in a process of its own; its workers are forks, as this process has only imported torch."""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the process lives
    local.worker_context = lambda: multiprocessing.get_context("fork")
    made = make_plan(study_from(STUDY, [], "many"), "", None)
    # Each cell by itself: a death in a pack takes every cell of it with it, and this counts what each death takes.
    run_study(made, Store(root), Running(jobs=N_WORKERS // 2, beat=BEAT, expiry=EXPIRY, pack=1), lambda *_: None)


def _workers(study: BaseProcess) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(study.pid).children()]
    except psutil.Error:
        return []


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _told(record: Any) -> tuple[Any, ...]:
    """What must be the same to the bit: numbers, and by their digests traces and models."""
    history = [{key: value for key, value in entry.dump().items() if key != "seconds"} for entry in record.history]
    return record.metrics, record.valid_metrics, history, record.files


@pytest.mark.long
def test_processes_share_a_study_while_workers_and_studies_are_killed_and_stopped(tmp_path: Path) -> None:
    """Two studies at once on one store; workers and whole studies are killed at random, and workers are stopped until
    others have taken their cells over. The default is small; the full test is
    ``CYCLEBENCH_LEASE_CELLS=200 CYCLEBENCH_LEASE_WORKERS=8``.
    """

    def start() -> BaseProcess:
        study = local.worker_context().Process(target=_study, args=(shared,))
        study.start()
        return study

    shared = tmp_path / "shared"
    store, chance, turns, ended = Store(shared), random.Random(0), 0, 0  # ended: workers that lose a cell, at most
    studies = [start() for _ in range(2)]
    stopped: list[tuple[float, int]] = []  # until when, and which worker
    finished = lambda: len(list(shared.glob("*/result.json")))  # noqa: E731
    try:
        seen = 0
        while any(study.is_alive() for study in studies):
            time.sleep(0.05)
            for until, pid in [each for each in stopped if each[0] < time.monotonic()]:
                _signal(pid, signal.SIGCONT)
                stopped.remove((until, pid))
            if finished() < seen + max(1, N_CELLS // 32):
                continue
            seen, turns = finished(), turns + 1
            number = chance.randrange(len(studies))
            workers = sorted(set(_workers(studies[number])) - {pid for _, pid in stopped})
            if turns % 8 == 7:
                studies[number].kill()
                studies[number].join()
                studies[number], ended = start(), ended + N_WORKERS // 2
            elif workers:
                pid, ended = chance.choice(workers), ended + 1
                if turns % 2:
                    _signal(pid, signal.SIGSTOP)
                    stopped.append((time.monotonic() + EXPIRY * chance.uniform(1.5, 2.5), pid))
                else:
                    _signal(pid, signal.SIGKILL)
    finally:
        for _, pid in stopped:
            _signal(pid, signal.SIGCONT)
        for study in studies:
            study.kill()
            study.join()
    assert turns >= 3
    folders = [path.parent for path in shared.glob("*/log.txt")]
    assert len(folders) == N_CELLS == finished()
    begun = 0
    for folder in folders:
        text = (folder / "log.txt").read_text()
        assert len(re.findall("INFO done", text)) <= 1, text  # none if it was killed between its result and its log
        assert "failed" not in text and not (folder / "failure.json").exists(), text
        found = re.findall(r"INFO (begins|done).*", text)
        assert found[0] == "begins"
        begun += found.count("begins")
    assert begun <= N_CELLS + ended, "a cell began again without anybody's fault"
    made = make_plan(study_from(STUDY, [], "many"), "", None)
    run_study(made, store, Running(1), lambda *_: pytest.fail("a cell was run"))
    here = run_study(made, Store(tmp_path / "here"), Running(1, pack=1), lambda *_: None)
    for id, record in here.items():
        assert _told(store.record(id)) == _told(record) and store.sound(id, weights=True)
        assert [path.name for path in store.folder(id).iterdir() if path.name.startswith((".", "lease"))] == []
