"""What all published studies say together: a claim that was tried twice counts once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.store.manifest import Manifest, TaskRow
from bench.store.published import PublishedStudy
from reports.findings import _plots, claims, page, second_tries, summary
from reports.render import file_names


def published(name: str, seeds: range, verdicts: dict[str, str], pairs: int = 9) -> PublishedStudy:
    manifest: dict[str, Any] = {"study": name, "question": "q", "reference": None, "seeds": list(seeds), "git": None}
    rows = [
        {
            "hypothesis": claim,
            "verdict": verdict,
            "task": "p_hop",
            "metric": "accuracy",
            "gain": "0",
            "pairs": f"{n}/{n}",
        }
        for (claim, verdict), n in zip(verdicts.items(), [pairs] * len(verdicts), strict=True)
    ]
    return PublishedStudy(
        manifest=Manifest(**manifest, variants=[], tasks=[], cells=[], command=f"cyclebench run {name}", config={}),
        cells={},
        verdicts=rows,
        environment=[],
        params=(10, 20),
        train_flops=(1.0, 2.0),
    )


FIRST = {"a": "supported", "b": "inconclusive", "c": "inconclusive", "d": "inconclusive"}
OTHER = published("other", range(8), {"b": "inconclusive"})  # a claim of the same words, of another study


@pytest.mark.parametrize("order", [1, -1])
def test_a_second_try_counts_for_what_was_open_and_for_nothing_else(order: int) -> None:
    again = published("one-again", range(100, 120), {"a": "refuted", "b": "equivalent", "c": "inconclusive"}, pairs=20)
    found = [published("one", range(9), FIRST), again, OTHER][::order]
    assert second_tries(found) == {"one-again": "one"}
    rows, tried, settled = claims(found)
    verdicts = sorted((row["hypothesis"], row["verdict"], row["pairs"]) for row in rows)
    assert verdicts == [
        ("a", "refuted", "20/20"),  # it was decided: this is one more claim
        ("a", "supported", "9/9"),
        ("b", "equivalent", "20/20"),
        ("b", "inconclusive", "9/9"),
        ("c", "inconclusive", "20/20"),
        ("d", "inconclusive", "9/9"),
    ]
    assert (tried, settled) == (2, 1)
    line = summary(found)[0]
    assert line.startswith("6 hypotheses of 2 studies: 3 inconclusive, ") and "Decided: 3; " in line
    assert "2, inconclusive at first, had a second try on other seeds, which decided 1: two tries err up to" in line


def test_the_same_seeds_are_no_second_try() -> None:
    found = [published("one", range(9), FIRST), published("one-again", range(8, 20), {"b": "supported"})]
    assert second_tries(found) == {} and len(claims(found)[0]) == 5
    assert "second try" not in summary(found)[0] and "of 2 studies" in summary(found)[0]
    assert second_tries([published("one-again", range(8, 20), {"b": "supported"})]) == {}  # of what is not published


def test_plots_are_of_the_tasks_that_a_study_has(tmp_path: Path) -> None:
    task = TaskRow(label="a b", task="p_hop", metric="accuracy", higher_is_better=True, levels={})
    manifest = published("other", range(8), {}).manifest.but(tasks=[task])
    for stem in (wanted := file_names([("accuracy_vs_flops", "a b")])[0], "accuracy_vs_flops_before"):
        (tmp_path / f"{stem}.png").touch()
    assert [path.stem for path in _plots(tmp_path, manifest)] == [wanted]


def test_the_page_tells_where_the_second_try_is(tmp_path: Path) -> None:
    for study in (published("one", range(9), FIRST), published("one-again", range(50, 70), {"b": "supported"}), OTHER):
        (tmp_path / study.manifest.study).mkdir()
        (tmp_path / study.manifest.study / "study.json").write_text(study.model_dump_json())
    text = page(tmp_path)
    first, again, other = (
        text.partition(f"\n## {name}\n")[2].partition("\n## ")[0] for name in ("one", "one-again", "other")
    )
    assert "Of 3 inconclusive here 1 had a second try on other seeds: one-again." in first
    assert "second try" not in again and "second try" not in other
