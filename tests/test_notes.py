"""What there is to know of a study's data and variants reaches whoever runs it and whoever reads the report."""

from __future__ import annotations

from pathlib import Path

import pytest
from records import MANIFEST, RESULTS
from test_real_data import prose

from bench.study.plan import LOOKS_AHEAD, make_plan
from bench.study.schema import Study
from bench.tables import markdown_text
from reports.page import write_report
from reports.table import of_test


def test_a_plan_tells_of_data_and_variants(tmp_path: Path) -> None:
    for seed, name in enumerate("abc"):
        (tmp_path / f"{name}.txt").write_text(prose(40, seed) + prose(4, 99))
    options = {
        "length": 32,
        "train": [f"{tmp_path}/a.txt"],
        "valid": [f"{tmp_path}/b.txt"],
        "test": [f"{tmp_path}/c.txt"],
    }
    raw = {
        "name": "tiny",
        "question": "?",
        "variants": ["htc", {"name": "mor", "options": {"tested": "top"}}],
        "tasks": [{"name": "text", "options": options}],
        "seeds": 1,
        "model": {"n_blocks": 4, "d_model": 8, "n_heads": 2, "n_cycles": 2},
        "train": {"steps": 2},
    }
    manifest = make_plan(Study.model_validate(raw), "", None).manifest
    assert [row.notes for row in manifest.variants] == [[], [LOOKS_AHEAD]]
    assert (
        len(manifest.tasks[0].notes) == 3
        and "passages of 100 bytes in test stand in train too" in manifest.tasks[0].notes[1]
    )


@pytest.mark.usefixtures("undrawn")
def test_a_report_tells_them_again(tmp_path: Path) -> None:
    first, *others = MANIFEST.tasks
    manifest = MANIFEST.but(tasks=[first.but(notes=["a <b> c"]), *others])
    some = next(id for id, record in RESULTS.items() if record.status == "done")
    results = {**RESULTS, some: RESULTS[some].but(ran=[1.0, 0.512])}
    write_report(manifest, results, tmp_path)
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert f"{first.label}: a &lt;b&gt; c" in page and markdown_text(f"{first.label}: a <b> c") in text
    assert of_test(results) in page and of_test(results) in text and "100%, 51%" in text
    assert not of_test(RESULTS)
