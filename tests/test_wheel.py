"""What is installed by a wheel: it runs from any folder and carries no published results."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.long
def test_the_wheel_runs_from_any_folder(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(ROOT)], check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("cyclebench-*.whl")
    assert wheel.stat().st_size < 1_000_000
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert not [name for name in names if name.startswith(("reports/published", "tests"))]
    assert {"studies/quick.yaml", "reports/templates/report.html", "cyclebench/py.typed", "variants/ztt.py"} <= names
    code = "import sys, bench, cyclebench; from bench.cli import main; print(bench.__file__, flush=True); "
    code += "sys.argv = ['cyclebench', 'list']; main()"
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "elsewhere",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert Path(first) == tmp_path / "site" / "bench" / "__init__.py"
    assert "from_scratch" in " ".join(rest) and "ztt" in " ".join(rest)
