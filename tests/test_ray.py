"""A study on a real Ray cluster of several nodes on this machine, one of which is killed while its cells run."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from test_orphans import MISCHIEF, entry
from test_runner import numbers, plan

from bench.plugins import import_files
from bench.run.runner import Running, run_study
from bench.store.store import Store
from bench.train.checkpoints import Every

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'cyclebench[ray]'")


@pytest.mark.long
def test_a_study_survives_the_loss_of_a_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray.cluster_utils import Cluster

    root = str(Path(__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", root)
    monkeypatch.setattr("bench.run.progress.HEARTBEAT", 0.0)
    made = plan(train={"steps": 40, "batch_size": 4, "eval_sequences": 8}, variants=["htc"], reference=None)
    over = threading.Event()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        doomed = cluster.add_node(num_cpus=1)
        store = Store(tmp_path / "ray")
        killed: list[bool] = []

        def kill() -> None:
            """When both cells have got somewhere, one of them on the doomed node."""
            while not over.is_set():
                if len(list(store.root.glob("*/checkpoints/0*"))) >= 2 and len(list(store.root.glob("*/lease.1"))) == 2:
                    cluster.remove_node(doomed, allow_graceful=False)
                    killed.append(True)
                    return
                time.sleep(0.005)

        killer = threading.Thread(target=kill)
        killer.start()
        how = Running(every=Every(None, 1), executor="ray", address=cluster.address, beat=0.5, expiry=5.0)
        seen: list[str] = []
        results = run_study(made, store, how, lambda record, planned: seen.append(record.id))
        over.set()
        killer.join()
    finally:
        over.set()
        ray.shutdown()
        cluster.shutdown()
    assert killed and {record.status for record in results.values()} == {"done"} and len(results) == 2
    assert sorted(seen) == sorted(results)
    assert re.search(r"^htc p_hop seed \d: step \d+/40, loss", capsys.readouterr().err, re.M), "progress, meanwhile"
    logs = [(store.folder(id) / "log.txt").read_text() for id in results]
    assert sum(text.count("INFO begins") for text in logs) == 3, "the cell of the lost node, and no other, began again"
    here = run_study(made, Store(tmp_path / "here"), Running(jobs=1), lambda *_: None)
    for id, record in results.items():
        assert numbers(record) == numbers(here[id])


@pytest.mark.torture
@pytest.mark.long
def test_a_task_without_a_sign_of_life_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.setattr("bench.run.runner.DEATHS", 1)
    (tmp_path / "mischief.py").write_text(MISCHIEF)
    import_files([tmp_path / "mischief.py"], "--import")
    made = plan(variants=[entry("hang"), "htc"], reference=None, seeds=[0])
    found = run_study(made, Store(tmp_path / "ray"), Running(jobs=1, executor="ray", hang=15.0), _nothing)
    hung, other = (found[planned.cell.id] for planned in made.cells)
    assert hung.status == "failed" and hung.reason == "no sign of life for 0.25 minutes (--hang), 1 times"
    assert other.status == "done"


def test_a_cluster_that_does_not_answer_is_told_in_one_line(tmp_path: Path) -> None:
    from bench.errors import UserError

    with pytest.raises(UserError, match=r"--address: '127.0.0.1:1' does not answer"):
        run_study(plan(seeds=[0]), Store(tmp_path), Running(executor="ray", address="127.0.0.1:1"), _nothing)


def _nothing(*_: Any) -> None:
    pass
