"""The tables of fronts and of aggregates over tasks, from stored results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from records import MANIFEST, RESULTS, TASKS, of_seeds

from reports.aggregates import aggregates, profiles
from reports.figures import performance_profile
from reports.fronts import fronts
from reports.page import write_report


def test_aggregates_by_hand() -> None:
    htc, ztt = aggregates(MANIFEST, RESULTS)
    accuracy = [(value - 0.38) / (1 - 0.38) for value in (0.7, 0.69)]
    bits = [(value / 0.69 - 4.42) / (0 - 4.42) for value in (1.6, 1.61)]
    assert float(htc["interquartile mean"]) == pytest.approx(sum(sorted(accuracy + bits)[1:3]) / 2, abs=6e-4)
    assert (htc["runs"], htc["tasks"], ztt["runs"]) == ("4/4", "2/2", "2/4")
    assert list(htc) == ["variant", "interquartile mean", "range of 2 seeds", "runs", "tasks"]


def test_who_is_better_over_all_tasks_is_told_from_five_seeds_on() -> None:
    def noise(variant: str, task: str, seed: int) -> float:
        return 0.005 * (variant == "ztt") * (task == "p_hop")

    htc, ztt = aggregates(*of_seeds(5, noise))
    assert htc["P(better than reference)"] == "-" == htc["its 95 % interval"]
    # p_hop: above all later seeds and the same one, 15 of 25; kjv: equal scores count half
    assert ztt["P(better than reference)"] == "0.55" and htc["runs"] == "10/10"
    low, high = (float(end) for end in ztt["its 95 % interval"].strip("[]").split(", "))
    assert 0 <= low < 0.55 < high <= 1
    lower, upper = (float(end) for end in ztt["95 % interval"].strip("[]").split(", "))
    assert lower < float(ztt["interquartile mean"]) < upper <= 1
    assert "P(better than reference)" not in aggregates(*of_seeds(4, noise))[0]


def test_one_task_is_no_aggregate_and_a_task_without_a_level_is_counted_as_left_out() -> None:
    assert aggregates(MANIFEST.but(tasks=TASKS[:1]), RESULTS) == []
    bare = TASKS[0].but(label="bare", levels={})
    rows = aggregates(MANIFEST.but(tasks=[*TASKS, bare]), RESULTS)
    assert {row["tasks"] for row in rows} == {"2/3"}
    learned = TASKS[0].but(label="learned", levels={"majority class": 1.0})  # there is nothing above it
    assert {row["tasks"] for row in aggregates(MANIFEST.but(tasks=[*TASKS, learned]), RESULTS)} == {"2/3"}


def test_profiles_by_hand_and_as_they_are_drawn() -> None:
    found = profiles(MANIFEST, RESULTS)
    accuracy = [(value - 0.38) / (1 - 0.38) for value in (0.7, 0.69)]
    bits = [(value / 0.69 - 4.42) / (0 - 4.42) for value in (1.6, 1.61)]
    share = [np.mean([np.mean(np.array(runs) > tau) for runs in (accuracy, bits)]) for tau in found[0].tau]
    np.testing.assert_allclose(found[0].share, share)
    assert (found[0].tau[0], found[0].tau[-1], found[0].n, found[1].n) == (0, 1, 2, 0)
    assert np.isnan(found[0].low).all(), "two seeds have no band"
    figure = performance_profile(MANIFEST, RESULTS)
    assert figure is not None
    htc, ztt = figure.axes[0].lines
    np.testing.assert_allclose(htc.get_ydata(), share)
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == ["htc (n = 2)", "ztt (n = 0)"]
    assert len(ztt.get_xdata()) == len(found[0].tau)
    five = performance_profile(*of_seeds(5))
    assert five is not None
    band = five.axes[0].collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 0 and band[:, 1].max() == 1


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


@pytest.mark.long
def test_the_report_holds_both_tables_and_the_profile(tmp_path: Path) -> None:
    paths = write_report(*of_seeds(5), tmp_path, published=True)
    text = (tmp_path / "report.md").read_text()
    assert "P(dominates reference)" in text and "interquartile mean" in text
    assert tmp_path / "performance_profile.png" in paths and "(performance_profile.png)" in text
    assert (
        "tasks is left out. Bars and bands: 95 % intervals over 5 seeds (of 5 seeds they cover at least 90.4% of the"
        in text
    )
    assert "lognormal, sd of log 1). From 20 of 20 cells (sha256 " in text
