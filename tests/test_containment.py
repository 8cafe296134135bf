"""What goes wrong in one cell, or around it, stays there, is told, and can be tried again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command
from test_runner import RAW, numbers, plan

from bench.cli import runs as commands
from bench.run import cells
from bench.run.cells import Job, run_job
from bench.run.executors.local import LocalExecutor
from bench.run.lease import Lease
from bench.run.runner import DEATHS, Running, run_study
from bench.run.usage import Usage
from bench.store.store import Store
from bench.train.checkpoints import Every

ONE = plan(variants=["htc"], seeds=[0], reference=None)


def nothing(*_: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (MemoryError(), "environment", "out of memory: MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "environment", "out of memory: OutOfMemoryError: CUDA"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), "environment", "out of memory: RuntimeError"),
        (OSError(28, "No space left on device"), "environment", "the disk refuses to be written: OSError"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "environment", "the disk refuses"),
        (ZeroDivisionError("a bug"), "cell", "ZeroDivisionError: a bug"),
        (FileNotFoundError(2, "No such file"), "cell", "FileNotFoundError"),
    ],
)
def test_failures_are_told_apart(
    error: Exception, kind: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr("bench.run.going.Going", fail)
    store, cell = Store(tmp_path), ONE.cells[0].cell
    record = run_job(Job(cell, "htc", tmp_path, Every(), 1), nothing)
    assert record is not None and record == store.record(cell.id)
    assert record.kind == kind and record.reason.startswith(reason) and "\n" not in record.reason
    assert "Traceback" in record.traceback
    assert f"failed: {record.reason}" in (store.folder(cell.id) / "log.txt").read_text()


def test_what_failed_of_itself_is_run_again_only_when_asked_and_the_rest_always(tmp_path: Path) -> None:
    store, made = Store(tmp_path), plan(variants=["htc"], reference=None)
    own, around = (planned.cell for planned in made.cells)
    store.write_failure(own.id, cells.failure(own, "loss is nan", "cell"))
    store.write_failure(around.id, cells.failure(around, "killed", "environment"))
    first = run_study(made, store, Running(1), nothing)
    assert first[own.id].reason == "loss is nan" and first[around.id].status == "done"
    second = run_study(made, store, Running(1, retry=True), nothing)
    assert {record.status for record in second.values()} == {"done"}
    assert second[around.id] == first[around.id]


class Deadly(LocalExecutor):
    """Kills the worker of one cell whenever it has begun."""

    victim, deaths = "", 0

    def poll(self) -> Any:
        events = super().poll()
        for event in events:
            if event.id == self.victim and event.kind == "start":
                worker = next(worker for worker in self._workers if self.victim in worker.busy)
                os.kill(worker.process.pid or 0, signal.SIGKILL)
                Deadly.deaths += 1
        return events


@pytest.mark.long
def test_a_worker_that_is_killed_again_and_again_fails_its_cell_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan(variants=["htc"], reference=None, train={**RAW["train"], "steps": 300})
    victim, other = (planned.cell.id for planned in made.cells)
    monkeypatch.setattr(Deadly, "victim", victim)
    monkeypatch.setattr("bench.run.runner.LocalExecutor", Deadly)
    results = run_study(made, Store(tmp_path), Running(2), nothing)
    assert Deadly.deaths == DEATHS and results[other].status == "done"
    assert results[victim].kind == "environment"
    assert results[victim].reason == f"its process was killed by SIGKILL (out of memory?), {DEATHS} times"


def test_what_has_died_too_often_is_no_failure_where_another_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process has taken the cell over, finishes it, and no failure of it is stored."""
    made, store = plan(variants=["htc"], seeds=[0], reference=None), Store(tmp_path / "runs")
    cell = made.cells[0].cell
    done = run_job(Job(cell, "htc", tmp_path / "other", Every(), 1), nothing)
    assert done is not None and done.status == "done"
    held: list[Lease] = []

    class Taken(Deadly):
        def poll(self) -> Any:
            events = super().poll()
            if any(event.kind == "died" for event in events) and self.deaths == DEATHS and not held:
                held.append(Lease.take(store.folder(cell.id), DEATHS + 1))  # type: ignore[arg-type]

                def finish() -> None:
                    shutil.copytree(tmp_path / "other" / cell.id, store.folder(cell.id), dirs_exist_ok=True)
                    held[0].path.unlink()

                threading.Timer(1.5, finish).start()
            return events

    monkeypatch.setattr(Deadly, "deaths", 0)
    monkeypatch.setattr(Deadly, "victim", cell.id)
    monkeypatch.setattr("bench.run.runner.LocalExecutor", Taken)
    seen: list[Any] = []
    found = run_study(made, store, Running(1), lambda record, _: seen.append(record))
    assert held and found[cell.id] == done and seen == []
    assert not (store.folder(cell.id) / "failure.json").exists()


FULL = """
set -e
mount -t tmpfs -o size=4m none "$1"
cd "$1"
"$2" -c "$3" "$4"
"""


@pytest.mark.long
def test_a_full_disk_is_a_failure_of_the_environment(tmp_path: Path) -> None:
    """A real one: a small file system in a name space of its own."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a file system of his own (unshare -rm)")
    cell = ONE.cells[0].cell
    code = (
        "import json, sys; from pathlib import Path; from bench.run.cells import Job, run_job\n"
        "from bench.train.checkpoints import Every; from bench.config import Cell\n"
        "cell = Cell.model_validate_json(sys.argv[1])\n"
        "def fill(kind, arguments):\n"
        "    if kind == 'start':\n"
        "        with open('filler', 'wb', buffering=0) as file:\n"
        "            try:\n"
        "                while True: file.write(bytes(4096))\n"
        "            except OSError: pass\n"
        "job = Job(cell, 'htc', Path('runs'), Every(None, 2), 1)\n"
        "full = run_job(job, fill)\n"
        "Path('filler').unlink()\n"
        "again = run_job(Job(cell, 'htc', Path('runs'), Every(None, 2), 2, full.at), lambda *_: None)\n"
        "print(json.dumps([full.dump(), again.dump()]))"
    )
    found = subprocess.run(
        ["unshare", "-rm", "bash", "-c", FULL, "full", str(tmp_path), sys.executable, code, cell.model_dump_json()],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert found.returncode == 0, found.stderr
    full, again = json.loads(found.stdout.splitlines()[-1])
    assert full["kind"] == "environment" and "No space left on device" in full["reason"]
    assert again["status"] == "done"


@pytest.mark.long
def test_a_study_that_is_interrupted_gives_its_cells_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.yaml").write_text(json.dumps({**RAW, "train": {**RAW["train"], "steps": 100000}}))
    command = Command(tmp_path, "run", "tiny.yaml", "--jobs", "1", "--pack", "1", "--checkpoint-every", "5")
    while not list(tmp_path.glob("runs/*/checkpoints/0*")) and command.process.is_alive():
        time.sleep(0.02)
    commands.status(str(tmp_path / "tiny.yaml"), runs=tmp_path / "runs")
    shown = capsys.readouterr().out
    command.send(signal.SIGINT)
    status, _, told = command.ended()
    assert status == 130 and "interrupted: finished cells are kept" in told and "Traceback" not in told
    assert "tiny: 0 of 6 cells done, 1 running, 0 failed, 5 waiting" in shown
    assert "training FLOPs" in shown
    leases = [json.loads(path.read_text()) for path in tmp_path.glob("runs/*/lease.*")]
    assert len(leases) == 1 and leases[0]["released"]


def test_usage_is_sampled_and_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.run.usage.MOST", 8)
    with Usage(0.002) as usage:
        until = time.monotonic() + 30
        while usage.interval < 0.005 and time.monotonic() < until:
            time.sleep(0.005)
    assert usage.interval > 0.002 and 1 <= len(usage.samples) <= 9
    assert usage.samples[-1]["resident_bytes"] > 1e7
    times = [sample["seconds"] for sample in usage.samples]
    assert times == sorted(times) and not [t for t in threading.enumerate() if t.name == "usage"]


def test_the_numbers_of_a_cell_do_not_depend_on_how_it_is_run(tmp_path: Path) -> None:
    first = run_study(ONE, Store(tmp_path / "a"), Running(1, every=Every(None, 1)), nothing)
    second = run_study(ONE, Store(tmp_path / "b"), Running(1, every=Every(1e9)), nothing)
    (a,), (b,) = first.values(), second.values()
    assert numbers(a) == numbers(b)
