"""What a variant costs beside what it gives, over the reference."""

from __future__ import annotations

import pytest
from records import of_seeds

from reports.verdicts import differences
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
