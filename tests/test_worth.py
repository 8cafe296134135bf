"""What a variant costs beside what it gives, over the reference; and one page of what published studies have found."""

from __future__ import annotations

from pathlib import Path

import pytest
from records import of_seeds

from bench.errors import UserError
from bench.store.manifest import DecideRow, HypothesisRow, Measure
from bench.store.published import published_text
from reports.findings import page
from reports.table import costs as cost_rows
from reports.table import csv_of_cells, summary
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
    ids = {row.id for row in manifest.cells if row.variant == manifest.reference}
    stacked = {id: record.but(stacked=True) if id in ids else record for id, record in results.items()}
    assert {row["time/token"] for row in worth(manifest, stacked, differs)} == {"-"}, "a stack's cells share its time"


def test_what_is_executed_differs_from_seed_to_seed_and_is_told_in_the_mean() -> None:
    manifest, results = of_seeds(3)
    for row in manifest.cells:
        record = results[row.id]
        assert record.status == "done"
        if row.variant == "ztt":
            flops = (1.0 + row.seed) * record.costs.forward_flops_per_token  # 1, 2, 3 times
            results[row.id] = record.but(
                costs=record.costs.but(forward_flops_per_token=flops), ran=[1.0, 0.1 * row.seed]
            )
    plain = {row.task: row.costs for row in summary(manifest, results) if row.variant == "htc"}
    for row in summary(manifest, results):
        if row.variant == "ztt":
            base, found = plain[row.task], row.costs
            assert base is not None and found is not None
            assert found.forward_flops_per_token == pytest.approx(2 * base.forward_flops_per_token)
    assert {row["FLOPs/token"] for row in worth(manifest, results, differences(manifest, results))} == {"x 2.000"}
    told = {row["tokens by cycle"] for row in cost_rows(manifest, results) if row["variant"] == "ztt"}
    assert told == {"100%, 10%"}


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
    assert "1 hypothesis of 1 study: 1 inconclusive. Decided: 0; on fewer than 8 pairs of seeds: 1." in told
    assert "were changed" not in told
    row = next(line for line in told.splitlines() if line.startswith("| a "))
    assert verdicts(claimed, results)[0]["gain"] in row and "5/5" in row
    assert "- older" in told and "verify --published sample --sample 2" in told
    row_of_looks = DecideRow(
        looks=[8], shares=[1.0], alpha=0.05, max_flops=None, max_cells=None, starts={}, changed=True
    )
    text = published_text(claimed.but(decide=row_of_looks), results, verdicts(claimed, results), [])
    (tmp_path / "sample" / "study.json").write_text(text)
    name = manifest.study
    assert f"Of {name} the looks, alpha or hypotheses were changed after the first cells were run." in page(tmp_path)


def test_findings_of_nothing(tmp_path: Path) -> None:
    """A study whose cells have all failed has hypotheses, and no sizes to tell; a folder that is none is refused."""
    manifest, _ = of_seeds(5)
    measures = [Measure(task="p_hop", metric="accuracy", higher_is_better=True)]
    claim = HypothesisRow(claim="helps", better="ztt", than="htc", task="p_hop", margin=0.0, measures=measures)
    claimed = manifest.but(hypotheses=[claim])
    (tmp_path / "vision").mkdir()  # one that the figures of others stand beside
    (tmp_path / "vision" / "study.json").write_text(published_text(claimed, {}, verdicts(claimed, {}), []))
    (tmp_path / "vision" / "results.csv").write_text(csv_of_cells(claimed, {}))
    told = page(tmp_path)
    assert "1 hypothesis of 1 study: 1 inconclusive. Decided: 0" in told and "They hold at the scale" not in told
    assert "5 seeds, 0 cells;" in told and "not measured with this version yet" in told
    with pytest.raises(UserError, match=f"--published: '{tmp_path}/none' is no folder"):
        page(tmp_path / "none")
