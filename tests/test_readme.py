"""The documents' example is a complete variant: put into a file, it is everywhere, and it keeps the contract."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "howto" / "variant.md").read_text()


def example() -> str:
    found = re.search(r"<!-- example.*?-->\n```python.*?\n(.*?)```", PAGE, re.DOTALL)
    assert found
    return found[1]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages with the example added as one file."""
    root = tmp_path_factory.mktemp("house")
    for package in ("cyclebench", "bench", "variants", "studies", "reports", "tests"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__", "published"))
    (root / "variants" / "htc_embedded.py").write_text(example())
    return root


def test_it_is_under_thirty_lines() -> None:
    assert len([line for line in example().splitlines() if line.strip()]) < 30


COMMANDS = """
import pytest

from bench.cli import app

if __name__ == "__main__":
    for line in ("list", "profile htc htc_embedded", "run mine.yaml --formats png,svg"):
        print(f"# {line}", flush=True)
        app(line.split(), standalone_mode=False)
    print("# pytest", flush=True)
    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-o", "pythonpath=tests ."]
    raise SystemExit(pytest.main([*options, "tests/test_contract.py", "-k", "htc_embedded"]))
"""


@pytest.fixture(scope="module")
def told(house: Path, no_runs: Path) -> list[str]:
    """What each of the commands says in the copy, the contract's tests last: one process, as its imports take long."""
    study = {
        "name": "mine",
        "question": "Does it help?",
        "reference": "htc",
        "model": {"d_model": 16, "n_heads": 2, "n_blocks": 3, "n_cycles": 2},
        "train": {"steps": 3, "batch_size": 4},
        "tasks": [{"name": "p_hop", "options": {"hops": 1, "length": 12, "n_train": 50, "n_valid": 10, "n_test": 20}}],
        "variants": ["htc", {"name": "htc_embedded", "match": "params"}],
        "seeds": 1,
    }
    (house / "mine.yaml").write_text(json.dumps(study))
    (house / "commands.py").write_text(COMMANDS)
    shutil.copy(no_runs, house / "mlflow.db")
    found = subprocess.run([sys.executable, "commands.py"], cwd=house, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    return re.split("^# .*$", found.stdout, flags=re.MULTILINE)[1:]


@pytest.mark.long
def test_it_is_listed_profiled_run_in_a_study_and_plotted(house: Path, told: list[str]) -> None:
    listed, profiled, run, _ = told
    assert "htc_embedded" in listed and "of which adapter: parameters" in profiled and "htc_embedded" in run
    folder = house / "runs/reports/mine"
    assert "| htc_embedded | accuracy |" in (folder / "report.md").read_text()
    plots = {path.stem: path.read_text() for path in folder.glob("*.svg")}
    assert {"accuracy_vs_flops_p_hop", "accuracy_vs_params_p_hop", "learning_curves_p_hop", "cycles_p_hop"} <= set(
        plots
    )
    for name, plot in plots.items():
        texts = re.findall("<!-- (.*?) -->", plot)  # Matplotlib's comment beside a text that it writes as outlines
        for variant in ("htc", "htc_embedded"):
            assert variant in texts, (name, variant)


@pytest.mark.long
def test_it_keeps_the_contract(told: list[str]) -> None:
    passed = re.search(r"(\d+) passed", told[-1])
    assert passed and int(passed[1]) > 20
