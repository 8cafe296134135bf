"""The tables of fronts and of aggregates over tasks, from stored results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from records import MANIFEST, RESULTS, TASKS

from reports.aggregates import aggregates, fronts, profiles
from reports.figures import performance_profile
from reports.page import write_report


def test_fronts_by_hand() -> None:
    rows = {(row["task"], row["variant"]): row for row in fronts(MANIFEST, RESULTS)}
    htc = rows["p_hop", "htc"]
    # Exits at 1 and 2 MFLOPs/token with accuracy 0.6 and 0.7 less 0.01 a seed; chance is 0.38, the budget 2.2 M.
    by_seed = [(1.0 * (0.6 - s - 0.38) + 0.2 * (0.7 - s - 0.38)) / 2.2 for s in (0.0, 0.01)]
    assert float(htc["hypervolume"]) == pytest.approx(sum(by_seed) / 2, abs=6e-4)
    assert htc["reference point"] == "2.2 M FLOPs/token, 0.380" and htc["P(dominates reference)"] == "-"
    assert (rows["p_hop", "ztt"]["seeds"], rows["p_hop", "ztt"]["95 % interval"]) == ("1/2", "-")
    assert rows["p_hop", "ztt"]["P(dominates reference)"] == "0.00 (n = 1)"  # the same points: nowhere better
    low, high = (float(end) for end in rows["kjv", "htc"]["95 % interval"].strip("[]").split(", "))
    assert low < float(rows["kjv", "htc"]["hypervolume"]) < high


def test_aggregates_by_hand() -> None:
    htc, ztt = aggregates(MANIFEST, RESULTS)
    accuracy = [(value - 0.38) / (1 - 0.38) for value in (0.7, 0.69)]
    bits = [(value / 0.69 - 4.42) / (0 - 4.42) for value in (1.6, 1.61)]
    assert float(htc["interquartile mean"]) == pytest.approx(sum(sorted(accuracy + bits)[1:3]) / 2, abs=6e-4)
    assert (htc["runs"], htc["tasks"], htc["P(better than reference)"]) == ("4/4", "2/2", "-")
    # p_hop: seed 1 against both of htc's, (0 + 1/2) / 2; kjv: seed 0 against both, (1/2 + 1) / 2
    assert (ztt["runs"], ztt["P(better than reference)"]) == ("2/4", "0.50") and ztt["its 95 % interval"] == "-"


def test_one_task_is_no_aggregate_and_a_task_without_a_level_is_counted_as_left_out() -> None:
    assert aggregates(MANIFEST.but(tasks=TASKS[:1]), RESULTS) == []
    bare = TASKS[0].but(label="bare", levels={})
    rows = aggregates(MANIFEST.but(tasks=[*TASKS, bare]), RESULTS)
    assert {row["tasks"] for row in rows} == {"2/3"}


def test_profiles_by_hand_and_as_they_are_drawn() -> None:
    found = profiles(MANIFEST, RESULTS)
    accuracy = [(value - 0.38) / (1 - 0.38) for value in (0.7, 0.69)]
    bits = [(value / 0.69 - 4.42) / (0 - 4.42) for value in (1.6, 1.61)]
    share = [np.mean([np.mean(np.array(runs) > tau) for runs in (accuracy, bits)]) for tau in found[0].tau]
    np.testing.assert_allclose(found[0].share, share)
    assert (found[0].tau[0], found[0].tau[-1], found[0].n, found[1].n) == (0, 1, 4, 2)
    assert np.isnan(found[1].low).all(), "one run on each task has no band"
    figure = performance_profile(MANIFEST, RESULTS)
    assert figure is not None
    htc, ztt = figure.axes[0].lines
    np.testing.assert_allclose(htc.get_ydata(), share)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["htc (n = 4)", "ztt (n = 2)"]
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 0 and band[:, 1].max() == 1 and len(ztt.get_xdata()) == len(found[0].tau)


def test_profiles_hold_scores_below_the_level_and_leave_out_who_lacks_a_task() -> None:
    worse = TASKS[0].but(levels={"chance": 0.9})
    assert profiles(MANIFEST.but(tasks=[worse, TASKS[1]]), RESULTS)[0].tau[0] == pytest.approx((0.69 - 0.9) / 0.1)
    fewer = {id: r for id, r in RESULTS.items() if (r.cell.variant, r.cell.task) != ("ztt", "kjv")}
    assert list(profiles(MANIFEST, fewer)) == [0]
    alone = MANIFEST.but(tasks=TASKS[:1])
    assert performance_profile(alone, RESULTS) is None is performance_profile(MANIFEST, {})


def test_nothing_stored_is_no_front_and_no_number() -> None:
    assert fronts(MANIFEST, {}) == []
    assert {row["interquartile mean"] for row in aggregates(MANIFEST, {})} == {"-"}


def test_the_report_holds_both_tables_and_the_profile(tmp_path: Path) -> None:
    paths = write_report(MANIFEST, RESULTS, tmp_path, published=True)
    text = (tmp_path / "report.md").read_text()
    assert "P(dominates reference)" in text and "interquartile mean" in text
    assert tmp_path / "performance_profile.png" in paths and "(performance_profile.png)" in text
    assert "A variant that has no run on one of the tasks is left out. From 6 of 8 cells (sha256 " in text
