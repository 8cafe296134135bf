"""Studies side by side: what they share, paired by the seeds that both have."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import cyclebench
from records import MANIFEST, RESULTS, of_seeds
from stored import plan, stored

from bench.config import FIRST_PILOT
from bench.stats import Contrast, paired
from bench.store.manifest import CellRow, DecideRow
from reports.compare import Side, apart, shared, side_by_side


def side(name: str, seeds: range, gain: float = 0.0, **changes: Any) -> Side:
    """The sample study with these seeds, its scores better by a gain that is nearly the same for each."""
    manifest, results = of_seeds(seeds.stop)
    kept = [cell for cell in manifest.cells if cell.seed in seeds]
    renamed = [cell.but(id=f"{name} {cell.id}") for cell in kept]
    found = {}
    for cell, new in zip(kept, renamed, strict=True):
        record = results[cell.id]
        move = gain * (1 + 0.01 * cell.seed)
        metrics = {
            key: value + (move if key == "test_accuracy" else -move if key == "test_bits_per_byte" else 0)
            for key, value in record.metrics.items()
        }
        found[new.id] = record.but(id=new.id, metrics=metrics)
    return Side(name, manifest.but(study=name, seeds=list(seeds), cells=renamed, **changes), found)


def test_shared_variants_stand_side_by_side_with_their_seeds() -> None:
    a, b = side("a", range(2)), side("b", range(1, 4), gain=0.1)
    rows = {(row["task"], row["variant"]): row for row in side_by_side([a, b])}
    assert set(rows) == {(task, variant) for task in ("p_hop", "kjv") for variant in ("htc", "ztt")}
    row = rows["p_hop", "htc"]
    assert row["a"].startswith("0.695 (0.690 to 0.700)") and row["a"].endswith("(n = 2)")
    assert row["b"].endswith("(n = 3)") and row["FLOPs, a"] == "60 G"
    named = side_by_side([a, b._replace(name="task")])[0]
    assert named["task"] == "p_hop" and named["run task"].endswith("(n = 3)")
    other = b.manifest.but(tasks=[b.manifest.tasks[0], b.manifest.tasks[1].but(metric="loss")])
    assert {found.task.label for found in shared([a, b._replace(manifest=other)])} == {"p_hop"}, "of the same metric"
    kinds = b.manifest.but(variants=[row.but(variant=f"other {row.variant}") for row in b.manifest.variants])
    assert not list(shared([a, b._replace(manifest=kinds)])), "a label alone makes no variant the same"


def test_differences_are_paired_by_the_seeds_that_both_have() -> None:
    rows = {(row["task"], row["variant"]): row for row in apart([side("a", range(8)), side("b", range(12), gain=0.2)])}
    up, down = rows["p_hop", "htc"], rows["kjv", "htc"]
    assert up["pairs"] == "8/12" and up["difference"] == "+0.207" and up["reading"].startswith("better")
    assert down["difference"] == "-0.207" and down["reading"].startswith("better"), "lower bits are better"
    assert (up["run"], up["against"]) == ("b", "a") and up["corrected p"] != up["p"]
    few = apart([side("a", range(2)), side("b", range(2), gain=0.1)])
    assert all("too few" in row["reading"] and not row["reading"].startswith("better") for row in few)
    none = apart([side("a", range(2)), side("b", range(5, 7))])
    assert {row["reading"] for row in none} == {"no seed in common"}
    a = side("a", range(2))
    same = apart([a, a._replace(name="again")])
    assert {row["reading"] for row in same} == {"the same cells"} and {row["corrected p"] for row in same} == {"-"}


def test_the_rounding_of_scores_decides_nothing() -> None:
    """Differences of thousandths are equal in size often, but not to the last bit: p counts these patterns of signs."""
    scores = np.array([944, 914, 946, 924, 908, 939, 913, 883])
    gaps = np.array([0, 3, 2, 2, 2, -2, 1, 2])
    seen = (scores + gaps) / 1000 - scores / 1000
    assert paired(Contrast(seen).differences).p == paired(gaps).p == 14 / 128


def test_what_cannot_differ_costs_the_others_no_correction() -> None:
    a, b = side("a", range(7)), side("b", range(7), gain=0.2)
    mixed = {cell.id: cell for cell in a.manifest.cells if (cell.variant, cell.task) != ("ztt", "p_hop")}
    changed = [cell for cell in b.manifest.cells if (cell.variant, cell.task) == ("ztt", "p_hop")]
    cells = [*mixed.values(), *changed]
    found = {cell.id: {**a.results, **b.results}[cell.id] for cell in cells}
    rows = apart([a, Side("b", b.manifest.but(cells=cells), found)])
    (row,) = [row for row in rows if row["reading"] != "the same cells"]
    assert row["p"] == row["corrected p"] == "0.0156" and row["reading"].startswith("better")


def test_added_and_pilot_seeds_are_not_tested() -> None:
    looks = DecideRow(looks=[6, 8], shares=[0.5, 0.5], alpha=0.05)
    for row in apart([side("a", range(8)), side("b", range(8), gain=0.2, decide=looks)]):
        assert row["reading"] == "not tested: seeds were added by what they showed"
        assert row["p"] == row["corrected p"] == "-" and row["pairs"] == "8/8" and row["difference"] != "-"
    a, b = side("a", range(8)), side("b", range(8), gain=0.2)
    pilots = []
    for one in (a, b):
        cells = [cell.but(seed=cell.seed + FIRST_PILOT) for cell in one.manifest.cells]
        pilots.append(one._replace(manifest=one.manifest.but(cells=cells)))
    readings = {row["reading"] for row in apart(pilots)}
    assert readings == {"no seed in common, pilot seeds are not compared"}


def test_what_is_missing_or_has_failed_is_no_pair() -> None:
    a = Side("a", MANIFEST, RESULTS)
    cells = [CellRow(variant=c.variant, task=c.task, seed=c.seed, id=c.id) for c in MANIFEST.cells]
    rows = {(r["task"], r["variant"]): r for r in apart([a, Side("b", MANIFEST.but(cells=cells), RESULTS)])}
    assert rows["p_hop", "ztt"]["pairs"] == "1/1" and rows["p_hop", "htc"]["pairs"] == "2/2"


@pytest.mark.long
def test_the_command(tmp_path: Path) -> None:
    stored(tmp_path / "runs", plan())
    stored(tmp_path / "other", plan(["seeds=3"], train={"steps": 40, "batch_size": 4, "device": "cpu"}))
    told = cyclebench(tmp_path, "compare", "stored", "other::stored", "--out", "tables")
    assert told.returncode == 0, told.stderr
    assert "Side by side" in told.stdout and "other::stored differs from stored in train.steps=40" in told.stdout
    rows = list(csv.DictReader((tmp_path / "tables" / "differences.csv").open()))
    assert [row["variant"] for row in rows] == ["htc", "ztt"] and rows[0]["pairs"] == "2/3"
    assert "| htc |" in (tmp_path / "tables" / "compare.md").read_text()
    found = json.loads(cyclebench(tmp_path, "compare", "stored", "other::stored", "--json").stdout)
    assert len(found["differences"]) == 2
    for wrong, why in (
        (["stored", "stored"], "is one run"),
        (["stored", "other::stored", "--preset", "x"], "are of one study"),
    ):
        ended = cyclebench(tmp_path, "compare", *wrong)
        assert ended.returncode == 2 and why in ended.stderr and ended.stderr.count("\n") == 1, ended.stderr


@pytest.mark.parametrize("count", [3])
def test_more_than_two(count: int) -> None:
    sides = [side(f"run {number}", range(2), gain=0.01 * number) for number in range(count)]
    assert len(apart(sides)) == 4 * (count - 1) and all(f"run {count - 1}" in row for row in side_by_side(sides))
