"""The example notebook, executed as it is: a variant defined in a cell reaches the worker processes."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "docs" / "first_study.ipynb"


@pytest.mark.long
def test_the_example_notebook_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = {
        cell.source.split("\n")[-1]: cell.outputs
        for cell in notebook.cells
        if cell.cell_type == "code" and cell.outputs
    }
    text = {source: str(outputs) for source, outputs in shown.items()}
    assert "<Results of 'zigzag': 4 done>" in text["results"]
    assert "image/png" in text['results.figure("accuracy_vs_flops")']
    assert "inconclusive" in text["results.verdicts()"]
    assert (tmp_path / "runs" / "reports" / "zigzag" / "report.html").is_file()
