"""Studies through worker processes: stored, skipped, contained, repeatable, reported."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from agree import runs_of
from commands import cyclebench
from mlflow import MlflowClient

from bench import api
from bench.cli import app, main
from bench.errors import UserError
from bench.evaluate.trace import Trace
from bench.model.language_model import CycleForCausalLM
from bench.run.cells import Job
from bench.run.executors import Event
from bench.run.executors.local import LocalExecutor
from bench.run.going import run_cell
from bench.run.runner import Running, run_study
from bench.run.told import replaced
from bench.store.records import Outcome, Record
from bench.store.store import Store
from bench.store.tracking import SEARCH
from bench.study.load import study_from
from bench.study.plan import Planned, make_plan
from bench.train.checkpoints import Every

RAW: dict[str, Any] = {
    "name": "tiny",
    "question": "Does it run?",
    "reference": "htc",
    "model": {"d_model": 16, "n_heads": 2, "n_blocks": 3, "n_cycles": 2},
    "train": {"steps": 6, "batch_size": 4, "eval_sequences": 8},
    "tasks": [{"name": "p_hop", "options": {"hops": 1, "length": 12, "n_train": 50, "n_valid": 10, "n_test": 20}}],
    "variants": [{"name": "vanilla", "match": "depth"}, "htc", "ztt"],
    "seeds": 2,
}


def plan(**changes: Any) -> Any:
    return make_plan(study_from(json.loads(json.dumps({**RAW, **changes})), [], "tiny"), "cyclebench run tiny", None)


def numbers(record: Record) -> dict[str, Any]:
    """What must repeat: everything but times."""
    told = record.dump()
    history = [{k: v for k, v in entry.items() if k != "seconds"} for entry in told["history"]]
    return {key: told[key] for key in ("metrics", "costs", "additions", "exits", "zero_attention")} | {
        "history": history
    }


def run(store: Store, made: Any, jobs: int = 2) -> tuple[dict[str, Any], list[str]]:
    seen: list[str] = []

    def note(record: Outcome, planned: Planned) -> None:
        seen.append(record.id)

    return run_study(made, store, Running(jobs), note), seen


def test_a_study_is_run_stored_and_not_run_again(tmp_path: Path) -> None:
    store, made = Store(tmp_path), plan()
    results, seen = run(store, made)
    assert len(results) == 6 and sorted(seen) == sorted(results)
    for planned in made.cells:
        record, folder = results[planned.cell.id], store.folder(planned.cell.id)
        assert record.status == "done" and record == store.record(planned.cell.id)
        trace = Trace.from_bytes((folder / "trace.npz").read_bytes())
        assert trace.leaving(trace.n_cycles)["loss"] == pytest.approx(record.metrics["test_loss"])
        assert CycleForCausalLM.from_pretrained(folder / "model").config.variant == planned.cell.variant
        assert (record.exits is None) == (planned.cell.variant == "vanilla")
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    again, seen = run(store, made)
    assert again == results and seen == []
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}


def test_one_process_or_two_or_none_give_the_same_numbers(tmp_path: Path) -> None:
    made = plan(seeds=[0])
    alone, _ = run(Store(tmp_path / "one"), made, jobs=1)
    together, _ = run(Store(tmp_path / "two"), made, jobs=2)
    here = {p.cell.id: run_cell(p.cell, Store(tmp_path / "none")) for p in made.cells}
    for id in alone:
        assert numbers(alone[id]) == numbers(together[id]) == numbers(here[id])


def test_paired_seeds_see_the_same_batches(tmp_path: Path) -> None:
    """BC with one cycle and the plain stack are the same model: with the same seed the same numbers to the last."""
    made = plan(variants=["vanilla", {"name": "bc", "model": {"n_cycles": 1}}], seeds=[3], reference=None)
    results, _ = run(Store(tmp_path), made)
    vanilla, bc = (results[planned.cell.id] for planned in made.cells)
    assert vanilla.metrics == bc.metrics and vanilla.id != bc.id


def test_a_failing_cell_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    wide = {"name": "htc", "label": "bad", "train": {"lr": 10.0, "grad_clip": 1e30, "weight_decay": 1e30}}
    made = plan(variants=[wide, "htc"], seeds=[0])
    store = Store(tmp_path)
    results, _ = run(store, made)
    bad, good = (results[planned.cell.id] for planned in made.cells)
    assert good.status == "done" and bad.status == "failed"
    assert "loss is nan" in bad.reason
    assert not store.done(bad.id)


def test_changed_data_are_noticed(tmp_path: Path) -> None:
    cell = plan(variants=["htc"], seeds=[0]).cells[0].cell.model_copy(update={"fingerprint": "0" * 64})
    made = plan(variants=["htc"], seeds=[0])
    made = type(made)(made.study, (Planned("htc", "p_hop", cell),), made.manifest)
    results, _ = run(Store(tmp_path), made)
    assert "the data have changed" in results[cell.id].reason


class Seen(str):
    """A label that becomes, in the worker that it is sent to, the GPUs which that one may see."""

    def __reduce__(self) -> Any:
        return os.getenv, ("CUDA_VISIBLE_DEVICES",)


def test_each_worker_sees_gpus_of_its_own(tmp_path: Path) -> None:
    cells = [planned.cell.model_copy(update={"fingerprint": "0" * 64}) for planned in plan(variants=["htc"]).cells]
    told: list[Event] = []
    with LocalExecutor(2, gpus=4, each=2) as executor:
        for cell in cells:
            executor.submit([Job(cell, Seen(), tmp_path, Every(), 1)])
        while sum(event.kind == "end" for event in told) < 2:
            told += executor.poll()
            assert "died" not in [event.kind for event in told]
    seen = {event.id: event.arguments[0] for event in told if event.kind == "start"}
    assert seen == {cells[0].id: "0,1", cells[1].id: "2,3"}


def test_ids_tell_cells_apart_and_ignore_what_means_nothing() -> None:
    first = plan()
    assert [p.cell.id for p in first.cells] == [p.cell.id for p in plan(question="another", name="other").cells]
    assert len({p.cell.id for p in first.cells}) == 6
    assert not {p.cell.id for p in first.cells} & {p.cell.id for p in plan(train={**RAW["train"], "lr": 2e-3}).cells}
    cycles = [
        plan(variants=["vanilla"], reference=None, model={**RAW["model"], "n_cycles": n}).cells[0].cell.id
        for n in (2, 3)
    ]
    assert cycles[0] == cycles[1]


def started(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command from its very start."""
    command = [sys.executable, "-m", "cyclebench", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


SWEEP = {
    "thresholds": {"trials": 20, "rules": ["confidence"], "per_cycle": True},
    "budgets": {"trials": 1, "ranges": {"train.lr": [1e-3], "options.lookup": ["cycle"]}},
}


@pytest.mark.long
def test_the_command_from_study_to_report_and_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(json.dumps({**RAW, "sweep": SWEEP}))
    first = cyclebench(tmp_path, "run", "tiny.yaml", "--set", "seeds=1")
    assert first.returncode == 0, first.stderr
    for text in (
        "vanilla: matched in depth: n_blocks 3 -> 4",
        "accuracy",
        "runs/reports/tiny/report.html",
        "mlflow ui",
    ):
        assert text in first.stdout
    assert "[3/3]" in first.stderr
    (tmp_path / "runs/reports/tiny/report.html").unlink()
    monkeypatch.chdir(tmp_path)
    status, _, told = ended(["run", "tiny.yaml", "--set", "seeds=1"], monkeypatch, capsys)
    assert "3 of 3 cells are done already; nothing to run" in told and not status
    assert (tmp_path / "runs/reports/tiny/report.html").stat().st_size > 10000
    (tmp_path / "runs/reports/tiny/report.html").unlink()
    app(["report", "tiny.yaml"], standalone_mode=False)
    assert (tmp_path / "runs/reports/tiny/report.html").stat().st_size > 10000
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = runs_of(client)
    assert len(runs) == 4 and {run.info.status for run in runs} == {"FINISHED"}
    app(["sweep", "tiny.yaml", "--jobs", "1"], standalone_mode=False)
    app(["report", "tiny.yaml", "--publish"], standalone_mode=False)
    names = {path.name for path in (tmp_path / "reports/published/tiny").iterdir()}
    assert {"sweep.md", "sweep_thresholds.csv", "sweep_budgets_p_hop.png", "study.json", "report.md"} <= names
    assert not [name for name in names if name.endswith(("svg", "html", "tex"))]
    swept = json.loads(Path("runs/sweeps/tiny.json").read_text())
    assert {(row["variant"], row["rule"], row["trials"]) for row in swept["thresholds"]} == {
        ("htc", "confidence", 20),
        ("ztt", "confidence", 20),
    }
    assert {row["variant"]: row["front"][0]["params"] for row in swept["budgets"]} == {
        "htc": {"train.lr": 1e-3},  # and not vanilla, which is matched
        "ztt": {"train.lr": 1e-3, "options.lookup": "cycle"},
    }
    searches = client.search_runs([runs[0].info.experiment_id], f"tags.`{SEARCH}` LIKE '%'")
    assert len(searches) == 4 and {run.info.status for run in searches} == {"FINISHED"}
    for run in searches:
        assert run.data.metrics["trials"] == (20 if run.data.tags.get("rule") else 1)
        assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["search.json"]
    assert "confidence" in Path("runs/reports/tiny/sweep.md").read_text()


def ended(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Exit status, standard output and standard error of a command in this process."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(sys, "argv", ["cyclebench", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    return exit_.value.code, *capsys.readouterr()


@pytest.mark.long
def test_the_command_that_is_told_retries_what_failed_of_the_same_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {"name": "htc", "label": "bad", "train": {"lr": 10.0, "grad_clip": 1e30, "weight_decay": 1e30}}
    (tmp_path / "tiny.yaml").write_text(json.dumps({**RAW, "reference": None, "variants": [bad, "htc"]}))
    monkeypatch.chdir(tmp_path)
    given = ["run", "tiny.yaml", "--set", "question=Does it?", "--set", "seeds=[3]", "--jobs", "1", "--runs", "my runs"]
    status, _, told = ended([*given, "--tracking-uri", "http://127.0.0.1:9"], monkeypatch, capsys)
    again = told.strip().rpartition("to run those again: ")[2]
    assert status == 1 and "1 of 2 cells failed" in told and "--set 'question=Does it?' --set 'seeds=[3]'" in again

    def stamps(name: str) -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in Path("my runs").glob(f"*/{name}")}

    done, failed, cells = stamps("result.json"), stamps("failure.json"), set(Path("my runs").iterdir())
    status, _, told = ended(shlex.split(again)[1:], monkeypatch, capsys)
    assert status == 1 and told.strip().endswith(f"to run those again: {again}")
    assert stamps("result.json") == done and set(Path("my runs").iterdir()) == cells
    assert len(done) == len(failed) == 1
    assert all(stamps("failure.json")[path] > stamp for path, stamp in failed.items())
    quiet = [*given, "--tracking-uri", "http://127.0.0.1:9"]
    status, shown, told = ended(quiet, monkeypatch, capsys)
    assert status == 1 and "1 of 2 cells are done already, 1 have failed; nothing to run" in told
    assert "mlflow:    http://127.0.0.1:9" in shown
    status, shown, _ = ended([*given, "--dry-run"], monkeypatch, capsys)
    assert not status and "nothing to run" in shown and "1 cell failed of themselves" in shown
    status, shown, _ = ended(["status", *given[1:4], "--runs", "my runs"], monkeypatch, capsys)
    first = shlex.join(["cyclebench", *given])
    assert not status and f"`{first}`, all of them by `{first} --retry failed`" in shown
    (name,) = (store := Store(Path("my runs"))).studies()
    store.write_manifest(name, store.manifest(name).but(command="cyclebench.run"))  # type: ignore[union-attr]
    _, shown, _ = ended(["status", name, "--runs", "my runs"], monkeypatch, capsys)
    assert "`cyclebench.run(STUDY)`, all of them by `cyclebench.run(STUDY, retry=True)`" in " ".join(shown.split())


@pytest.mark.long
def test_a_result_that_is_damaged_within_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its ends look whole, so that it is taken for done until the report reads it."""
    (tmp_path / "tiny.yaml").write_text(json.dumps({**RAW, "reference": None, "variants": ["htc"]}))
    monkeypatch.chdir(tmp_path)
    command = ["run", "tiny.yaml", "--jobs", "1", "--tracking-uri", "http://127.0.0.1:9"]
    assert not ended(command, monkeypatch, capsys)[0]
    damaged, other = Path("runs").glob("*/result.json")
    first, kept = Record.model_validate_json(damaged.read_bytes()), other.stat().st_mtime_ns
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 200] = bytes(200)
    damaged.write_bytes(content)
    assert not ended(command, monkeypatch, capsys)[0]
    assert (
        numbers(Record.model_validate_json(damaged.read_bytes())) == numbers(first) and other.stat().st_mtime_ns == kept
    )
    assert damaged.with_name("result.json.corrupt").read_bytes() == content


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "quik"], "unknown study 'quik'; did you mean 'quick'"),
        (
            ["run", "quick", "--set", "variants=[zt]", "--set", "reference=zt", "--set", "hypotheses=[]"],
            "did you mean 'ztt'",
        ),
        (["run", "quick", "--set", "tasks=[phop]"], "unknown task 'phop'; did you mean 'p_hop'"),
        (["run", "quick", "--set", "variants.ztt.options.gatin=none"], "'gatin'; did you mean 'gating'"),
        (["run", "quick", "--set", "variants.ztt.options.gating=non"], "gating"),
        (
            ["run", "quick", "--set", "variants.ztt.options={gating: attention, zero_tokens: 0}"],
            "zero_tokens of at least 1",
        ),
        (["run", "quick", "--set", "variants.htc.model.n_blocks=2"], "2 leaves no block to cycle"),
        (["run", "quick", "--set", "train.device=cuda"], "'cuda' is not available"),
        (["report", "quick"], "has not been run"),
        (["profile", "htcc"], "unknown variant 'htcc'; did you mean 'htc'"),
        (["profile"], "Missing argument"),
        (["run", "quick", "--job", "2"], "No such option"),
        (["rnu"], "No such command"),
        (["run", "quick", "--jobs", "0"], "--jobs"),
        (["run", "quick", "--hang", "0"], "--hang: 0.0 (allowed: a number of minutes above 0)"),
        (["sweep", "quick", "--hang", "nan"], "--hang: nan (allowed: a number of minutes above 0)"),
        (["execute", "quick", "--threshold", "nan"], "--threshold: nan is no number"),
        (["generate", "x", "--prompt", "a", "--exit", "kl", "--threshold", "NaN"], "--threshold: nan is no number"),
        (["generate", "x", "--prompt", "a", "--temperature", "nan"], "Invalid value for '--temperature'"),
        (["generate", "x", "--prompt", "a", "--temperature", "inf"], "--temperature: inf (allowed: a finite number)"),
        (["power", "quick", "--effect", "inf"], "--effect: inf (allowed: a finite number)"),
        (["sweep", "quick", "--max-flops", "nan"], "Invalid value for '--max-flops'"),
        (["show", "../.."], "ID: '../..' is no cell in runs"),
        (["compare", "nowhere::quick", "quick"], "STUDY: 'nowhere', before ::, is no folder"),
        (["status", "quick", "--runs", "x y"], "(run: cyclebench run quick --runs 'x y')"),
        (["findings", "--out", "."], "--out: '.' is a folder (allowed: the file of the page)"),
        (
            ["run", "quick", "--out", __file__],
            f"--out: {__file__!r} is no folder (allowed: a folder, there or to be made)",
        ),
        (["sweep", "thresholds", "--out", f"{__file__}/x"], f"--out: {f'{__file__}/x'!r}: {__file__!r} is no folder"),
        (["costs", "quick", "--out", __file__], f"--out: {__file__!r} is no folder"),
        (["execute", "quick", "--rule", "confidence", "--threshold", "inf"], "--threshold: inf lets all leave or none"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, told = ended(arguments, monkeypatch, capsys)
    assert status == 2 and message in told and len(told.strip().splitlines()) == 1, told
    assert not list(tmp_path.iterdir())


def test_a_mistake_ends_a_process_with_one_line_and_status_2(tmp_path: Path) -> None:
    found = started(tmp_path, "run", "quik")
    assert found.returncode == 2 and not found.stdout
    assert len(found.stderr.splitlines()) == 1 and found.stderr.startswith("error: unknown study 'quik'")


OWN = '''
import cyclebench

@cyclebench.register_variant("own_cycling")
class Own(cyclebench.variant_class("htc")):
    """Head-Tail Cycling by another name."""
'''


def test_commands_that_read_no_study_take_a_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    assert "by another name" in cyclebench(tmp_path, "list", "--import", "own.py").stdout
    found = cyclebench(tmp_path, "profile", "own_cycling", "--import", "own.py")
    assert found.returncode == 0 and "0 1 2 1 2 1 2 3" in found.stdout, found.stderr
    missing = cyclebench(tmp_path, "generate", "nowhere", "--prompt", "1", "--import", "other.py")
    assert missing.returncode == 2 and "--import: 'other.py' is not a file" in missing.stderr, missing.stderr


def test_list_and_profile_show_every_variant(tmp_path: Path) -> None:
    shown = cyclebench(tmp_path, "list").stdout
    for name in ("vanilla", "bc", "htc", "ztt", "p_hop", "kjv", "text", "hub", "quick", "sharing", "gating=attention"):
        assert name in shown
    assert "et al. 2022" in " ".join(shown.split())  # which ends no sentence
    arguments = ("profile", "htc", "ztt", "vanilla", "--set", "model.d_model=64", "--set", "reference=htc")
    found = cyclebench(tmp_path, *arguments, "--set", "variants.vanilla.match=flops")
    assert found.returncode == 0, found.stderr
    assert "of which zero tokens: parameters" in found.stdout and "n_blocks 4 -> 8" in found.stdout


def test_a_study_that_was_another_when_it_was_run_is_told(tmp_path: Path) -> None:
    store, first = Store(tmp_path), plan(seeds=[0, 1])
    assert list(replaced(first.study, first.manifest, store)) == []
    run(store, first)
    more, longer = plan(seeds=[0, 1, 2]), plan(seeds=[0], train={**RAW["train"], "steps": 7})
    assert list(replaced(first.study, first.manifest, store)) == list(replaced(more.study, more.manifest, store)) == []
    (line,) = replaced(longer.study, longer.manifest, store)
    assert line.startswith("tiny: the study has changed since its last run, whose report is replaced: train.steps=7 (")
    assert line.endswith(f"; {len(first.cells)} finished cells of it stay, of no study (another name keeps both)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checkpoint_every": 0}, "--checkpoint-every: 0 (allowed: seconds as 90s"),
        ({"hang": "x"}, "--hang: 'x' (allowed: a number of minutes above 0)"),
        ({"jobs": True}, "jobs: True (allowed: a whole number from 1 on, or none)"),
        ({"out": __file__}, f"--out: {__file__!r} is no folder"),
        ({"formats": "png"}, "formats: 'png' is one text"),
    ],
)
def test_mistakes_of_a_script_are_one_line(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        api.run(RAW, runs=tmp_path, tracking_uri=f"sqlite:///{tmp_path}/m.db", **arguments)
    assert not list(tmp_path.iterdir())
