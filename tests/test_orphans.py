"""When a command is killed on the spot, nothing of it stays; what a cell does to its process stays in it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_runner import RAW, numbers, plan
from test_sweep_killed import trials

from bench.plugins import import_files
from bench.run.executors.local import SPOKEN, Unheard
from bench.run.runner import Running, run_study
from bench.store.digests import read_sealed
from bench.store.records import Failure, Record
from bench.store.store import Store
from bench.store.tracking import Tracker
from bench.study.load import study_from
from bench.sweep.run import run_sweep
from bench.sweep.storage import default_url

PATIENCE = 300.0  # seconds for something to come; nobody is judged by it


def until(condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


def running(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


def left_by_a_killed(folder: Path, arguments: list[str], ready: Callable[[psutil.Process], bool]) -> bool:
    """Kill a command when it is ready; whether any of the processes below it is still there in the end."""
    process = subprocess.Popen([sys.executable, *arguments], cwd=folder, stdout=-3, stderr=-3)
    left: list[psutil.Process] = []

    def begun() -> bool:
        with suppress(psutil.Error):
            if ready(psutil.Process(process.pid)):
                left[:] = below(psutil.Process(process.pid))
        return bool(left)

    try:
        assert until(begun)
    finally:
        process.kill()
        process.wait()
    return not until(lambda: not running(left), 10)


def below(process: psutil.Process) -> list[psutil.Process]:
    return process.children(recursive=True)


def serving(process: psutil.Process) -> bool:
    """Whether a fork server is below it."""
    return any("forkserver" in " ".join(each.cmdline()) for each in below(process))


WORKERS = """
import subprocess, time
from bench import processes

def work():
    processes.adopt()
    processes.follow_parent()
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    time.sleep(1000)

def start(number, preloaded):
    processes.PRELOADED[:] = preloaded
    for _ in range(number):
        processes.worker_context().Process(target=work, daemon=True).start()
    time.sleep(1000)
"""


def test_whatever_works_for_a_process_ends_soon_after_that_was_killed(tmp_path: Path) -> None:
    """Killed while its fork server is only starting, which takes seconds, and while its workers work."""
    (tmp_path / "workers.py").write_text(WORKERS)
    code = "import workers; workers.start({}, [*workers.processes.PRELOADED{}])"
    assert not left_by_a_killed(tmp_path, ["-c", code.format(1, "")], serving)
    sleeping = lambda process: sum("sleep" in each.cmdline() for each in below(process)) == 2  # noqa: E731
    assert not left_by_a_killed(tmp_path, ["-c", code.format(2, "[:2]")], sleeping)


@pytest.mark.long
def test_whatever_works_for_a_command_ends_soon_after_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(json.dumps({**RAW, "train": {**RAW["train"], "steps": 100000}}))
    command = ["-m", "cyclebench", "run", "tiny.yaml", "--jobs", "2", "--checkpoint-every", "5"]
    assert not left_by_a_killed(tmp_path, command, lambda _: len(list(tmp_path.glob("runs/*/checkpoints/0*"))) >= 2)


MISCHIEF = '''
import os, subprocess, sys, time
from pathlib import Path
from typing import Literal

import cyclebench


DONE = set()  # a model is built from several schedules


def mischief(how, place):
    if how in DONE:
        return
    DONE.add(how)
    if how == "hang":
        while True:
            time.sleep(1)
    if how in ("abort", "abort in planning"):
        print("it will not end well")
        os.abort()
    if how == "print":
        while True:
            print("x" * 1000)
    if how == "fork":
        os.fork()  # and both go on
    if how in ("strays", "strays and abort"):
        found = [subprocess.Popen(["sleep", "1000"], start_new_session=new, stdout=-3, stderr=-3) for new in (0, 1)]
        child = os.fork()
        if child == 0:
            while True:
                time.sleep(1)
        Path(place).write_text(" ".join(map(str, [child, *(each.pid for each in found)])))
        if how == "strays and abort":
            os.abort()


@cyclebench.register_variant("mischief")
class Mischief(cyclebench.Variant):
    """Harmless where it is planned."""

    class Options(cyclebench.Variant.Options):
        how: str = "none"
        place: str = ""

    def schedule(self, model):
        frame, names = sys._getframe(), set()
        while frame is not None:
            names.add(frame.f_code.co_name)
            frame = frame.f_back
        planned = "objective" in names and "initial_model" not in names  # in a trial of a sweep
        if "initial_model" in names or (planned and self.options.how == "abort in planning"):
            mischief(self.options.how, self.options.place)
        return cyclebench.build_schedule(list(range(model.n_blocks)))
'''


@pytest.fixture(scope="module", autouse=True)
def registered(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("mischief") / "mischief.py"
    path.write_text(MISCHIEF)
    import_files([path], "--import")


def entry(how: str, place: Path | None = None) -> dict[str, Any]:
    options = {"how": how, "place": str(place or "")}
    return {"name": "mischief", "label": how, "options": options, "train": {"stacked": False}}


@pytest.mark.long
def test_what_a_variant_does_to_its_process_harms_its_own_cell_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.run.runner.DEATHS", 1)
    kinds = ("none", "hang", "abort", "print", "fork", "strays", "strays and abort")
    entries = [entry(how, tmp_path / f"{how}.txt") for how in kinds]
    made = plan(variants=[*entries, "htc"], reference=None, seeds=[0])
    store = Store(tmp_path / "runs")
    found = run_study(made, store, Running(2, hang=6.0), lambda *_: None)
    records = {planned.variant: found[planned.cell.id] for planned in made.cells}
    failed = {how: record.reason for how, record in records.items() if isinstance(record, Failure)}
    assert failed == {
        "hang": "no sign of life for 0.1 minutes (--hang), 1 times",
        "abort": "its process was killed by SIGABRT, 1 times",
        "print": "no sign of life for 0.1 minutes (--hang), 1 times",
        "strays and abort": "its process was killed by SIGABRT, 1 times",
    }
    assert all(record.kind == "environment" for record in records.values() if isinstance(record, Failure))
    aborted, plain, forked = (records[how] for how in ("abort", "none", "fork"))
    assert isinstance(aborted, Failure) and "it will not end well" in (aborted.traceback or "")
    assert "Fatal Python error: Aborted" in (aborted.traceback or ""), "where it was"
    assert isinstance(plain, Record) and isinstance(forked, Record) and numbers(plain) == numbers(forked)
    logs = {how: (store.folder(record.id) / "log.txt").read_text() for how, record in records.items()}
    assert logs["fork"].count("INFO begins") == logs["fork"].count("INFO done") == 1
    assert "it will not end well" in logs["abort"]
    assert SPOKEN / 2 < len(logs["print"]) < SPOKEN + 2000 and "what else it prints is left out" in logs["print"]
    strays = [int(pid) for how in kinds[-2:] for pid in (tmp_path / f"{how}.txt").read_text().split()]
    assert len(strays) == 6
    alive = [psutil.Process(pid) for pid in strays if psutil.pid_exists(pid)]
    assert running(alive) == [], "what a cell leaves running is ended with it"


def test_printing_does_not_fail_when_nobody_listens_any_more() -> None:
    """Else a cell whose command was killed would have failed, of itself."""
    reader, writer = os.pipe()
    os.close(reader)
    with Unheard(writer, "w") as deaf:
        assert deaf.write(b"anything") == 8


def test_a_stray_of_a_finished_cell_ends_before_its_study(tmp_path: Path) -> None:
    """The worker that it came from is not used again: a library may have counted on it."""
    made = plan(variants=[entry("strays", tmp_path / "pids")], reference=None)
    seen: list[bool] = []

    def look(*_: Any) -> None:
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        seen.append(bool(running([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)])))

    found = run_study(made, Store(tmp_path / "runs"), Running(1, pack=1), look)
    assert [record.status for record in found.values()] == ["done", "done"] and seen == [False, False]
    logs = [path.read_text() for path in tmp_path.glob("runs/*/log.txt")]
    assert len({re.search(r"process (\d+)", log)[1] for log in logs}) == 2  # type: ignore[index]


@pytest.mark.long
def test_a_trial_that_dies_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.sweep.run.DEATHS", 2)
    kinds = ("abort", "abort in planning")
    budgets = {"trials": 1, "prune": False, "ranges": {"train.lr": [1e-3]}}
    raw = {**RAW, "variants": [*map(entry, kinds), "htc"], "reference": None, "sweep": {"budgets": budgets}}
    store, study = Store(tmp_path / "runs"), study_from(json.loads(json.dumps(raw)), [], "tiny")
    result = run_sweep(study, store, default_url(store.root), 2, Tracker("", store), "", None, hang=60.0)
    found = {row.variant: (row.trials, row.failed, len(row.cells)) for row in result.budgets}
    assert found == {"abort": (1, 1, 0), "abort in planning": (1, 1, 0), "htc": (1, 0, 1)}
    reasons = [trial.user_attrs["reason"] for trial in trials(tmp_path) if "reason" in trial.user_attrs]
    assert reasons == ["its process was killed by SIGABRT, 2 times"] * 2
    (failed,) = store.root.glob("*/failure.json")
    assert read_sealed(failed)["reason"] == reasons[0] and "it will not end well" in read_sealed(failed)["traceback"]
    assert "it will not end well" in failed.with_name("log.txt").read_text()
    again = run_sweep(study, store, default_url(store.root), 2, Tracker("", store), "", None, hang=60.0)
    assert again.budgets == result.budgets, "what has failed is not tried for ever"
