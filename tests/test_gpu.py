"""The script for a GPU, tried on a CPU: its clock, what a kill leaves behind, its goals, two of its sections."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import timed_sections
import torch
from timed_sections import section

from bench.perf import gpu, gpu_sections, timing, training
from bench.perf.clock import RESERVE, Section, run_sections
from bench.processes import worker_context
from bench.study.load import load_study
from reports.performance import table


def took(sections: list[Section], seconds: float) -> tuple[dict[str, Any], float]:
    """Rows and last states by section, and how long all of it took."""
    found: dict[str, Any] = {each.name: ([], []) for each in sections}

    def take(name: str, row: Any, state: str) -> None:
        found[name][row is None].append(state if row is None else row)

    start = time.monotonic()
    run_sections(sections, "here", start + RESERVE + seconds, take)
    return found, time.monotonic() - start


@pytest.mark.torture
@pytest.mark.long
def test_a_section_that_is_slow_dies_or_fails_costs_no_more_than_its_share() -> None:
    sections = [
        section("wrong", timed_sections.wrong),
        section("dying", timed_sections.dying),
        section("slow", timed_sections.slow, share=0.03),
        section("quick", timed_sections.quick),
        section("long", timed_sections.quick, least=600),
    ]
    found, seconds = took(sections, 300)  # 4 of them are the slow one's
    assert found["wrong"] == ([{"value": 4}], ["running", "failed: ValueError: of two"])
    assert found["dying"] == ([{"value": 3}], ["running", "failed: its process ended with status 7"])
    assert found["quick"] == ([{"value": "here"}, {"value": 2.0}], ["running", "done"])
    (row,), states = found["slow"]
    assert states[0] == "running" and states[1].startswith("cut off after ") and not psutil.pid_exists(row["pid"])
    assert found["long"][0] == [] and found["long"][1][0].startswith("skipped: ")
    assert seconds < 250


@pytest.mark.long
def test_without_time_everything_is_skipped() -> None:
    found, _ = took([section("a", timed_sections.slow), section("b", timed_sections.slow)], -60)
    assert found["a"] == found["b"] == ([], ["skipped: 0 s are left for it, it needs 0 s"])


def test_a_kill_leaves_what_was_measured(tmp_path: Path) -> None:
    process = worker_context().Process(target=timed_sections.begin, args=(tmp_path,))
    process.start()
    path, pid = tmp_path / "gpu.json", None
    until = time.monotonic() + 60
    while pid is None and time.monotonic() < until:
        time.sleep(0.05)
        rows = json.loads(path.read_text())["sections"]["slow"]["rows"] if path.exists() else []
        pid = rows[0]["pid"] if rows else None
    process.kill()
    process.join()
    assert pid is not None
    result = json.loads(path.read_text())
    assert [(each["state"], len(each["rows"])) for each in result["sections"].values()] == [("done", 2), ("running", 1)]
    assert {row["verdict"] for row in result["goals"]} == {"not measured"}
    text = (tmp_path / "gpu.md").read_text()
    for each in result["sections"].values():
        columns, rows = table(each)
        assert all(f"| {' | '.join(line)} |" in text for line in (columns, *rows))
    while psutil.pid_exists(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not psutil.pid_exists(pid), "what it has started ends with it"


def test_goals_stand_beside_the_figures() -> None:
    row = {"model": training.GPT2, "mode": "eager", "ratio": 1.1}
    assert gpu.with_goal("training", row) == row | {"goal": "at least 1.15", "verdict": "missed"}
    assert gpu.with_goal("compiled", row | {"mode": "compiled"})["verdict"] == "met"
    for other in (row | {"model": training.X}, {"model": training.GPT2, "mode": "eager", "note": "not here"}):
        assert gpu.with_goal("training", other) == other
    assert gpu.with_goal("waits", {"waits": 0})["verdict"] == "met"
    assert gpu.with_goal("waits", {"waits": 1})["verdict"] == "missed"
    found = {"packing": {"rows": [gpu.with_goal("packing", {"seeds": n, "ratio": r}) for n, r in STACKED]}}
    told = {row["goal"]: row for row in gpu.standing(found)}
    assert len(told) == len(gpu.GOALS)
    packed = told.pop("8 seeds in one stack over 8 runs, time")
    assert packed["verdict"] == "missed (1 of 2 met)" and packed["worst"] == 0.31
    assert {row["verdict"] for row in told.values()} == {"not measured"}


STACKED = [(8, 0.29), (8, 0.31), (16, 0.9)]


def ran(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    gpu.main()


@pytest.mark.long
def test_two_sections_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: time.time())
    chosen = ["--only", "waits", "--only", "exits", "--out", str(tmp_path), "--revision", "abc"]
    ran(monkeypatch, "--device", "cpu", "--size", "tiny", "--minutes", "2", *chosen)
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: each["state"] for name, each in result["sections"].items()} == {"waits": "done", "exits": "done"}
    assert [row["variant"] for row in result["sections"]["waits"]["rows"]] == ["vanilla"] * 2 + ["ztt"] * 2
    assert [row["batch"] for row in result["sections"]["exits"]["rows"]] == [1, 2]
    assert result["environment"]["git"] == "abc" and result["environment"]["torch"] == torch.__version__
    assert "goal" not in result["sections"]["exits"]["rows"][0], "goals are a GPU's"
    assert "revision" not in result and "--size tiny" in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "trainings"], "error: unknown section: 'trainings'; did you mean 'training'?"),
        (["--minutes", "0"], "error: argument --minutes: '0' (allowed: a number above 0)"),
        (["--size", "huge"], "error: argument --size: invalid choice: 'huge'"),
        (["--device", "cuda"], "error: train.device: 'cuda' is not available"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        ran(monkeypatch, *arguments)
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and told.startswith(said) and told.count("\n") == 1


def test_the_preset_is_what_the_script_says_of_it() -> None:
    study = load_study(gpu_sections.STUDY, preset=gpu_sections.PRESET)
    assert study.model.d_model == 256 and study.model.n_blocks == 8 and study.train.stacked is True
    assert {entry.label for entry in study.variants} >= {"htc", "ztt", "bc"} and len(study.seeds) == 8
    for size in gpu_sections.SIZES.values():
        load_study(gpu_sections.STUDY, size.study, gpu_sections.PRESET)
    assert len({each.name for each in gpu_sections.sections(gpu_sections.SIZES["full"])}) == 9


def test_a_cpu_tells_no_memory() -> None:
    assert timing.peak(lambda: pytest.fail("not run"), torch.device("cpu")) == {}
