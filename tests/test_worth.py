"""What a variant costs beside what it gives, over the reference; and one page of what published studies have found."""

from __future__ import annotations

from pathlib import Path

import pytest
from records import of_seeds

from bench.store.manifest import HypothesisRow, Measure
from bench.store.published import published_text
from reports.findings import page
from reports.verdicts import differences, verdicts
from reports.worth import worth


def test_costs_are_those_over_the_reference() -> None:
    manifest, results = of_seeds(5)
    for row in manifest.cells:
        record = results[row.id]
        assert record.status == "done"
        if row.variant != manifest.reference:
            dearer = record.costs.but(params=2 * record.costs.params, kv_bytes_per_token=0)
            slower = record.timing.but(tokens_per_second=record.timing.tokens_per_second / 1.25)
            results[row.id] = record.but(costs=dearer, timing=slower)
    differs = differences(manifest, results)
    rows = worth(manifest, results, differs)
    assert len(rows) == len(differs) == len(manifest.tasks) and rows.ends == differs.ends
    for row, other in zip(rows, differs, strict=True):
        assert row["parameters"] == "x 2.000" and row["KV cache"] == "x 0.000" and row["time/token"] == "x 1.25"
        assert row["FLOPs/token"] == row["activations"] == "x 1.000"
        assert row["difference"] == other["difference"] and other["reading"].startswith(row["reading"])


@pytest.mark.parametrize("side", ["htc", "ztt"])
def test_nothing_is_told_of_what_has_not_run(side: str) -> None:
    manifest, results = of_seeds(5)
    gone = {row.id for row in manifest.cells if row.variant == side and row.task == "kjv"}
    left = {id: record for id, record in results.items() if id not in gone}
    rows = worth(manifest, left, differences(manifest, left))
    assert [row["task"] for row in rows] == ["p_hop"]


def test_findings_tell_every_verdict_and_at_what_scale(tmp_path: Path) -> None:
    manifest, results = of_seeds(5, lambda variant, task, seed: 0.1 * (variant == "ztt") + 0.001 * seed)
    measures = [Measure(task="p_hop", metric="accuracy", higher_is_better=True)]
    claim = HypothesisRow(claim="a | b helps", better="ztt", than="htc", task="p_hop", margin=0.0, measures=measures)
    claimed = manifest.but(hypotheses=[claim])
    assert "No study has been published with this version yet." in page(tmp_path)
    (tmp_path / "sample").mkdir()
    text = published_text(claimed, results, verdicts(claimed, results), [])
    (tmp_path / "sample" / "study.json").write_text(text)
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "report.md").write_text("# older")
    told = page(tmp_path)
    assert "1 hypotheses of 1 studies" in told and "1 rest on fewer than 8 pairs of seeds" in told
    row = next(line for line in told.splitlines() if line.startswith("| a "))
    assert verdicts(claimed, results)[0]["gain"] in row and "5/5" in row
    assert "- older" in told and "verify --published sample --sample 2" in told
