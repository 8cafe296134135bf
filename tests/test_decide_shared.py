"""Deciding studies as commands: killed, gone on with by two processes at once, told by status and report; pilots."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import Command, cyclebench

from bench.store.manifest import Manifest
from bench.store.store import Store

RAW: dict[str, Any] = {
    "name": "small",
    "question": "Is it so?",
    "reference": "htc",
    "model": {"d_model": 16, "n_heads": 2, "n_blocks": 3, "n_cycles": 2},
    "train": {"steps": 6, "batch_size": 4, "eval_sequences": 8},
    "tasks": [{"name": "p_hop", "options": {"hops": 1, "length": 12, "n_train": 50, "n_valid": 10, "n_test": 20}}],
    "variants": ["htc", "ztt"],
    "hypotheses": [{"claim": "zero tokens help", "better": "ztt", "than": "htc"}],
    "decide": {"looks": [6, 8]},
}

RUN = ("run", "small.yaml", "--jobs", "1", "--pack", "1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(RAW))
    return tmp_path


def manifest_of(folder: Path) -> Manifest:
    manifest = Store(folder / "runs").manifest("small")
    assert manifest is not None
    return manifest


@pytest.mark.long
def test_killed_and_gone_on_with_by_two_processes_it_decides_once(folder: Path) -> None:
    first = Command(folder, *RUN, figures=False)
    while len(list(folder.glob("runs/*/result.json"))) < 3 and first.process.is_alive():
        time.sleep(0.05)
    first.kill()
    begun = manifest_of(folder)
    assert len(begun.cells) == 12 and [row.open for row in begun.decisions] == [True]
    told = cyclebench(folder, "status", "small.yaml")
    assert told.returncode == 0, told.stderr
    assert "next look, at 6 pairs: " in told.stdout and "expected until all is decided: " in told.stdout
    told = cyclebench(folder, "report", "small.yaml", figures=False)
    assert told.returncode == 0, told.stderr
    assert "| open |" in (folder / "runs/reports/small/report.md").read_text()

    both = [Command(folder, *RUN, figures=False) for _ in range(2)]
    ended = [command.ended() for command in both]
    assert [each.returncode for each in ended] == [0, 0], [each.stderr for each in ended]
    sentences = [{line for line in each.stdout.splitlines() if line.startswith("zero tokens help: ")} for each in ended]
    manifest = manifest_of(folder)
    (row,) = manifest.decisions
    assert len(sentences[0]) == 1 and sentences[0] == sentences[1] and row.verdict in next(iter(sentences[0]))
    assert not row.open and row.pairs in (6, 8) and len(manifest.cells) == 2 * row.pairs
    results = {path.parent.name for path in folder.glob("runs/*/result.json")}
    assert results == {cell.id for cell in manifest.cells}
    logs = [(folder / "runs" / id / "log.txt").read_text() for id in results]
    assert [log.count("done in") for log in logs] == [1] * len(logs), "no cell was finished twice"

    again = cyclebench(folder, *RUN, figures=False)
    assert again.returncode == 0 and manifest_of(folder) == manifest
    told = cyclebench(folder, "status", "small.yaml")
    assert row.verdict in told.stdout and "next look," not in told.stdout


@pytest.mark.long
def test_a_claim_on_exits_is_decided_by_what_the_store_holds(tmp_path: Path) -> None:
    claim = {"claim": "it can be known", "better": "ztt", "than": "ztt", "metric": "exits@oracle"}
    raw = {**RAW, "hypotheses": [claim | {"than_metric": "exits@random"}]}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(raw))
    ended = cyclebench(tmp_path, *RUN, figures=False)
    assert ended.returncode == 0, ended.stderr
    (row,) = manifest_of(tmp_path).decisions
    assert not row.open and row.pairs in (6, 8)
    told = cyclebench(tmp_path, "status", "small.yaml")
    assert row.verdict in told.stdout and "next look," not in told.stdout


@pytest.mark.long
def test_pilot_seeds_run_and_give_no_verdict(folder: Path) -> None:
    refused = cyclebench(folder, "run", "small.yaml", "--set", "seeds=[1,10001]")
    assert refused.returncode == 2 and "for a pilot seeds from" in refused.stderr and refused.stderr.count("\n") == 1
    pilot = cyclebench(folder, "run", "small.yaml", "--set", "seeds=[10000,10001]", figures=False)
    assert pilot.returncode == 0, pilot.stderr
    assert "pilot: seeds from 10000 on (10000, ...) enter no verdict" in pilot.stdout
    (path,) = folder.glob("runs/reports/small+*/report.md")
    report = path.read_text()
    assert "no verdict is given" in report and "| pilot |" in report
    assert not any(word in report for word in ("supported |", "refuted |", "inconclusive |"))
