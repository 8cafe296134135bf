"""Figures of others beside ours: ours are what was published."""

from __future__ import annotations

from pathlib import Path

import pytest

from reports.references import REFERENCES, beside_others


def publish(folder: Path, study: str, task: str, first: str, second: str, gaps: tuple[float, ...]) -> None:
    """As much of a study as is read: a seed more of one variant alone, which makes no pair, and a cell that failed."""
    (folder / study).mkdir()
    (folder / study / "study.json").touch()
    rows = ["variant,task,seed,status,test_accuracy"]
    for seed, gap in enumerate(gaps):
        rows += [
            f"{first},{task},{seed},done,{0.5 + gap + 0.1 * seed}",
            f"{second},{task},{seed},done,{0.5 + 0.1 * seed}",
        ]
    rows += [f"{first},{task},{len(gaps)},done,0.99", f"{second},{task},{len(gaps)},failed,0.1"]
    (folder / study / "results.csv").write_text("\n".join(rows))


@pytest.mark.parametrize(
    ("gaps", "told"),
    [
        ((0.02, 0.04), "digits +0.030 (sd 0.014, 2 seeds). It agrees."),
        (
            (0.0, 0.01),
            "digits +0.005 (sd 0.007, 2 seeds). It disagrees: a gap of more than 0.01 is seen on 0 of 1 tasks.",
        ),
    ],
)
def test_ours_are_the_paired_means_of_what_was_published(tmp_path: Path, gaps: tuple[float, ...], told: str) -> None:
    (pairs,) = [each.ours for each in REFERENCES if each.ours]
    vision = next(pair for pair in pairs if pair[0] == "vision")
    assert sum("not measured" in line for line in beside_others(tmp_path)) == len(REFERENCES)
    publish(tmp_path, *vision, gaps)
    (line,) = [line for line in beside_others(tmp_path) if "digits" in line]
    assert line.endswith(f"| {told} |")
