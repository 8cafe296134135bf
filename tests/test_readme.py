"""The README's example is a complete variant: put into a file, it is everywhere, and it keeps the contract."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bench.errors import UserError
from bench.study.catalogue import variant_table, with_table
from bench.study.load import study_from

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def example() -> str:
    found = re.search(r"<!-- example.*?-->\n```python\n(.*?)```", README, re.DOTALL)
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
def told(house: Path) -> list[str]:
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
    found = subprocess.run([sys.executable, "commands.py"], cwd=house, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    return re.split("^# .*$", found.stdout, flags=re.MULTILINE)[1:]


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


def test_it_keeps_the_contract(told: list[str]) -> None:
    passed = re.search(r"(\d+) passed", told[-1])
    assert passed and int(passed[1]) > 20


def test_the_studies_shown_are_valid() -> None:
    found = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    compared, tuned = (study_from(yaml.safe_load(text), [], "README") for text in found)
    assert len(compared.variants) == 4 and len(compared.seeds) == 8
    assert tuned.init == "smollm2" and tuned.variants[0].name == "ztt"


def test_every_path_it_names_exists() -> None:
    for path in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / path).exists(), path


def test_its_table_of_variants_is_what_is_registered() -> None:
    """``python -m bench.study.catalogue README.md`` makes it so."""
    assert with_table(README) == README
    rows = dict(line.strip("| ").split(" | ")[:2] for line in variant_table()[2:])
    assert rows["ztt"] == "0 1 2 1 2 3" and rows["vanilla"] == "0 1 2 3" and rows["ouro"].startswith("bc with")
    with pytest.raises(UserError, match="must stand in it"):
        with_table("no marks")
