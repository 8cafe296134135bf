"""Workers on one PostgreSQL server, a real one, started for the test."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from test_sweep import budget_job, job, stored

from bench.processes import worker_context
from bench.sweep import budgets, thresholds
from bench.sweep.storage import BATCH, counts, open_storage

WORKERS, TRIALS, TRIED = 2, 120, 4


def _binaries() -> Path | None:
    """The folder of the server's programs: on the path, or where Debian puts them."""
    found = shutil.which("initdb")
    if found:
        return Path(found).parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return versions[-1].parent if versions else None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an empty database. The server listens on a socket in its own folder, and on no port."""
    binaries = _binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL server here (Debian: apt-get install postgresql)")
    # Of a short path (a socket's may have 107 characters), open to the server's own user: it refuses to run as root.
    folder = Path(subprocess.check_output(["mktemp", "-d", "/tmp/pgXXXXXX"], text=True).strip())
    become: list[str] = []
    if os.getuid() == 0:
        if shutil.which("runuser") is None or subprocess.run(["id", "postgres"], capture_output=True).returncode:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        shutil.chown(folder, "postgres")
        become = ["runuser", "-u", "postgres", "--"]
    data = str(folder / "data")

    def call(*command: str) -> None:
        done = subprocess.run([*become, *command], capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr

    try:
        call(str(binaries / "initdb"), "-D", data, "-U", "suite", "--auth=trust", "--no-sync")
        options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"
        call(str(binaries / "pg_ctl"), "-D", data, "-w", "-o", options, "-l", str(folder / "log"), "start")
        try:
            yield f"postgresql+psycopg://suite@/postgres?host={folder}"
        finally:
            call(str(binaries / "pg_ctl"), "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.long
def test_commands_that_begin_at_once_make_the_tables_once(server: str) -> None:
    with ProcessPoolExecutor(3, worker_context()) as pool:
        assert list(pool.map(tables_of, [server] * 3)) == [True] * 3


def tables_of(url: str) -> bool:
    return open_storage(url).get_current_version() == open_storage(url).get_head_version()


@pytest.mark.long
def test_workers_share_the_trials_of_one_search(server: str, tmp_path: Path) -> None:
    stored(tmp_path)
    shared = job(tmp_path, trials=TRIALS, url=server)
    thresholds.search(replace(shared, spec=shared.spec.model_copy(update={"trials": 5})))  # makes the tables
    with ProcessPoolExecutor(WORKERS, worker_context()) as pool:
        rows = list(pool.map(thresholds.search, [replace(shared, worker=number) for number in range(WORKERS)]))
    study = optuna.load_study(study_name="s", storage=server)
    assert all(trial.state == optuna.trial.TrialState.COMPLETE for trial in study.get_trials())
    params = [tuple(trial.params.values()) for trial in study.get_trials()]
    assert TRIALS <= len(params) <= TRIALS + WORKERS * BATCH and max(row.trials for row in rows) == len(params)
    assert len(set(params)) > 0.8 * len(params), "workers ask for trials of their own"
    assert thresholds.search(shared).trials == len(params)


@pytest.mark.long
def test_budget_workers_share_the_trials_to_the_last(server: str, tmp_path: Path) -> None:
    shared = replace(budget_job(tmp_path, TRIED), url=server)
    budgets.opened(shared)
    with ProcessPoolExecutor(WORKERS, worker_context()) as pool:
        list(pool.map(budget_worker, [shared] * WORKERS))
    study = optuna.load_study(study_name="b", storage=server)
    assert sum(counts(trial) for trial in study.get_trials()) == TRIED, "not one too many"
    assert budgets.row(shared).trials == TRIED


def budget_worker(shared: budgets.BudgetJob) -> None:
    budgets.run_trials(shared, lambda *_: None)
