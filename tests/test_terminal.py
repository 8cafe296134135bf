"""What commands write on a terminal of 80 columns, and as JSON; ids by their first letters; a run that is only told."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from commands import cyclebench
from records import MANIFEST, RESULTS
from stored import plan, stored

from bench.api import load_results
from bench.cli import screen as screen_module
from bench.cli import tables_of
from bench.cli.cells import FEWEST, whole_id, whole_path
from bench.cli.screen import show, starting
from bench.errors import UserError
from bench.run.ahead import ahead
from bench.store.records import ExecutionRow
from bench.store.store import Store
from reports.execution import why_it_costs
from reports.table import costs, summary_rows
from reports.verdicts import differences

NARROW = 80


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen_module, "PIPE", NARROW)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("terminal")
    stored(root / "runs", plan())
    return root


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("rows", [summary_rows, differences, costs])
def test_tables_fit_80_columns(rows: Any, capsys: pytest.CaptureFixture[str]) -> None:
    table = rows(MANIFEST, RESULTS)
    show("a title", table, spare=("parameters", "training FLOPs", "tokens/s", "depth"))
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= NARROW and "…" not in said
    for row in table:
        assert row["variant"] in said
    shown = "".join(said.split())
    gone = {name.strip(" .\n") for name in said.partition("want of room:")[2].split(",")}
    for name in table[0]:
        assert name in gone or "".join(name.split()) in shown, name


@pytest.mark.usefixtures("narrow")
def test_what_is_too_wide_without_spare_columns_is_stacked(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{f"column {number}": f"{number}" * 12 for number in range(8)}]
    show("wide", rows)
    said = capsys.readouterr().out
    assert all(len(line) <= NARROW for line in said.splitlines())
    assert [line.split() for line in said.splitlines()[2:10]] == [["column", f"{n}", f"{n}" * 12] for n in range(8)]
    show("a word", [{"id": "f" * 300, "text": "in words that are broken into several lines where it is narrow"}])
    assert capsys.readouterr().out.count("f") >= 300, "nothing is cut off"
    show("nothing", [])
    assert capsys.readouterr().out == ""


def test_json_for_other_programs(runs: Path) -> None:
    listed = json.loads(cyclebench(runs, "status", "--json").stdout)
    assert [row["name"] for row in listed] == ["stored"]
    of_one = json.loads(cyclebench(runs, "status", "stored", "--json").stdout)
    assert of_one["done"] == of_one["cells"] > 0 and of_one["failed"] == []
    keys = json.loads(cyclebench(runs, "list", "--keys", "--json").stdout)["Keys of a study"]
    by_key = {row["key"]: row for row in keys}
    assert by_key["model.family"]["allowed"] == "gpt2, llama" and by_key["train.steps"]["default"] == "1000"
    assert by_key["train.grad_clip"]["allowed"] == "number above 0 to 1e+30 or none"
    assert all(row["what it is"] for row in keys), "every key says what it is"
    named = json.loads(cyclebench(runs, "list", "--json").stdout)
    assert {"htc", "ztt"} <= {row["name"] for row in named["Variants"]}
    costs = json.loads(cyclebench(runs, "profile", "htc", "ztt", "--json").stdout)
    assert costs["htc"]["parameter depth / effective depth"] == "4 / 8"
    tables = json.loads(json.dumps(tables_of(load_results("stored", runs / "runs"))))
    assert [row["variant"] for row in tables["results"]] == ["htc", "ztt"] and tables["costs"] and tables["differences"]


def test_an_id_is_told_by_its_first_letters(runs: Path) -> None:
    store = Store(runs / "runs")
    manifest = store.manifest("stored")
    assert manifest is not None
    id = manifest.cells[0].id
    assert whole_id(store, id[:10]) == whole_id(store, id) == id
    for wrong in (id[: FEWEST - 1], "zzzz", "*", "0" * 64, ""):
        with pytest.raises(UserError, match="the first letters of one cell's id"):
            whole_id(store, wrong)
    folder = runs / "runs"
    assert whole_path(str(folder / id[:10] / "model")) == str(folder / id / "model")
    assert whole_path("smollm2") == "smollm2" and whole_path(str(folder / "zzzz")) == str(folder / "zzzz")
    shown = cyclebench(runs, "show", id[:10])
    assert shown.returncode == 0 and id in shown.stdout and f"stored: {manifest.cells[0].name}" in shown.stdout
    assert "train.steps" in shown.stdout and "test_accuracy" in shown.stdout
    missing = cyclebench(runs, "show", "abcd" * 4)
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1 and "ID: " in missing.stderr


@pytest.mark.parametrize("damaged", [False, True])
def test_a_cell_without_a_result_is_shown(tmp_path: Path, damaged: bool) -> None:
    store, planned = Store(tmp_path / "runs"), plan().cells[0]
    store.write_cell("f" * 64, planned.cell)
    if damaged:
        (store.folder("f" * 64) / "cell.json").write_text("{")
    shown = cyclebench(tmp_path, "show", "ffff")
    assert shown.returncode == 0 and "no result yet" in shown.stdout and "digest" not in shown.stdout
    assert ("train.steps" in shown.stdout) != damaged


@pytest.mark.long
def test_a_dry_run_tells_and_runs_nothing(runs: Path, tmp_path: Path) -> None:
    made = plan(["seeds=3"])
    found = ahead(made.study, Store(runs / "runs"))
    assert sum(part.cells for part in found.parts) == len(made.cells)
    assert sum(part.done for part in found.parts) == len(plan().cells) > 0
    assert found.flops == sum(part.left * part.flops for part in found.parts) > 0 and found.seconds is not None
    told = cyclebench(tmp_path, "run", "quick", "--dry-run", "--set", "seeds=1", fresh=True)
    assert told.returncode == 0 and "10 cells to run" in told.stdout and "is not known before" in told.stdout
    assert not (tmp_path / "runs").exists() and not (tmp_path / "mlflow.db").exists()


def test_negative_savings_are_explained() -> None:
    row = {"rule": "confidence", "threshold": 0.5, "loss": 1.0, "accuracy": 0.5, "mean_cycles": 1.5}
    row |= {"flops_per_token": 1e6, "time_saved_quartiles": [0.0, 0.1], "rounds": 5}
    saving = ExecutionRow.model_validate({**row, "flops_saved": 0.2, "time_saved": 0.1})
    slower = ExecutionRow.model_validate({**row, "flops_saved": 0.2, "time_saved": -0.3})
    dearer = ExecutionRow.model_validate({**row, "flops_saved": -0.1, "time_saved": -0.3})
    assert why_it_costs([saving]) == ""
    assert why_it_costs([saving, slower]).startswith("Negative: in 1 of 2 rows") and "LM head" not in why_it_costs(
        [slower]
    )
    assert "In 1 of them it also took more FLOPs" in why_it_costs([slower, dearer])


@pytest.mark.long
@pytest.mark.parametrize("command", ["execute none", "costs quick", "convert none --variant htc --out x"])
def test_something_is_on_the_screen_soon(command: str, tmp_path: Path) -> None:
    main, side = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "COLUMNS": str(NARROW)}
    arguments = [sys.executable, "-m", "cyclebench", *command.split()]
    process = subprocess.Popen(arguments, cwd=tmp_path, env=environment, stdout=side, stderr=side)
    os.close(side)
    first = b""
    while b" ..." not in first and b"error" not in first:  # a part of a line may come alone
        first += os.read(main, 1000)
    process.kill()
    process.wait()
    os.close(main)
    assert b"\n" not in first.partition(b" ...")[0], "said before what takes long is loaded"


class Terminal(io.StringIO):
    """What takes lines as a terminal does."""

    def isatty(self) -> bool:
        return True


def test_a_line_counts_seconds_until_something_else_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(screen_module, "TICK", 0.01)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, terminal)
    for ending in (lambda: print("a result"), lambda: print("an error", file=sys.stderr)):
        terminal.seek(0)
        terminal.truncate()
        starting("loading")
        waited = time.monotonic() + 10
        while "\r" not in terminal.getvalue() and time.monotonic() < waited:
            time.sleep(0.01)
        ending()
        assert sys.stdout is terminal and sys.stderr is terminal
        shown = terminal.getvalue()
        time.sleep(0.05)
        assert terminal.getvalue() == shown
        line, text, end = shown.split("\n")
        assert line.startswith("loading ...\rloading ... 0 s") and text in ("a result", "an error") and end == ""
    starting("one")
    starting("two")
    print("end")
    assert terminal.getvalue().endswith("one ...\ntwo ...\nend\n"), "one ends the other"


def test_elsewhere_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    starting("loading")
    assert capsys.readouterr() == ("", "")
