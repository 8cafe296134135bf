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
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench.processes import me
from bench.run.executors import local
from bench.run.lease import Lease, LeaseLostError, LeaseWatch, read_lease
from bench.run.runner import Running, run_study
from bench.store.store import Store
from bench.study.load import study_from
from bench.study.plan import make_plan

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


STUDY = {
    "name": "many",
    "question": "Does each cell run once?",
    "model": {"d_model": 8, "n_heads": 2, "n_blocks": 1},
    "train": {"steps": 1, "batch_size": 2, "eval_sequences": 2},
    "tasks": [{"name": "p_hop", "options": {"hops": 1, "length": 12, "n_train": 4, "n_valid": 2, "n_test": 2}}],
    "variants": ["vanilla"],
    "seeds": N_CELLS,
}


def _study(root: Path) -> None:
    """A study in a process of its own; its workers are forks, as this process has only imported torch."""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the process lives
    local.worker_context = lambda: multiprocessing.get_context("fork")
    made = make_plan(study_from(STUDY, [], "many"), "", None)
    # Each cell by itself: a death in a pack takes every cell of it with it, and this counts what each death takes.
    run_study(made, Store(root), Running(jobs=N_WORKERS // 2, beat=0.5, expiry=5.0, pack=1), lambda *_: None)


def _workers(study: BaseProcess) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(study.pid).children()]
    except psutil.Error:
        return []


def test_processes_share_a_study_while_workers_and_studies_are_killed(tmp_path: Path) -> None:
    """Two studies at once on one store; workers and whole studies are killed at random. The default is small; the full
    test is ``CYCLEBENCH_LEASE_CELLS=200 CYCLEBENCH_LEASE_WORKERS=8``.
    """

    def start() -> BaseProcess:
        study = local.worker_context().Process(target=_study, args=(tmp_path,))
        study.start()
        return study

    store, chance, kills, ended = Store(tmp_path), random.Random(0), 0, 0  # ended: workers that die by it, at most
    studies = [start() for _ in range(2)]
    finished = lambda: len(list(tmp_path.glob("*/result.json")))  # noqa: E731
    try:
        seen = 0
        while any(study.is_alive() for study in studies):
            time.sleep(0.05)
            if finished() < seen + max(2, N_CELLS // 16) or kills >= 12:
                continue
            seen, kills = finished(), kills + 1
            number = chance.randrange(len(studies))
            workers = _workers(studies[number])
            if kills % 4 == 3 or not workers:
                studies[number].kill()
                studies[number].join()
                studies[number], ended = start(), ended + N_WORKERS // 2
            else:
                os.kill(chance.choice(workers), signal.SIGKILL)
                ended += 1
    finally:
        for study in studies:
            study.kill()
            study.join()
    assert kills >= 2
    folders = [path.parent for path in tmp_path.glob("*/log.txt")]
    assert len(folders) == N_CELLS == finished()
    begun = 0
    for folder in folders:
        assert store.record(folder.name) is not None
        text = (folder / "log.txt").read_text()
        assert len(re.findall("INFO done", text)) <= 1, text  # none if it was killed between its result and its log
        assert not list(folder.glob("lease.*")) or "INFO done" not in text
        turns = re.findall(r"INFO (begins|done).*", text)
        assert turns[0] == "begins"
        begun += turns.count("begins")
    assert begun <= N_CELLS + ended, "a cell began again without anybody's death"
