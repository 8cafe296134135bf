"""Figures of others beside ours: ours are what was published."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.errors import UserError
from reports.references import REFERENCES, beside_others

(PAIRS,) = (each.ours for each in REFERENCES if each.ours)
VISION = next(pair for pair in PAIRS if pair[0] == "vision")


def publish(
    folder: Path, study: str, task: str, first: str, second: str, gaps: tuple[float, ...], step: float = 0.1
) -> Path:
    """As much of a study as is read: a seed more of one variant alone, which makes no pair, and a cell that failed."""
    (folder / study).mkdir()
    (folder / study / "study.json").touch()
    rows = ["variant,task,seed,status,test_accuracy"]
    for seed, gap in enumerate(gaps):
        rows += [
            f"{first},{task},{seed},done,{0.5 + gap + step * seed}",
            f"{second},{task},{seed},done,{0.5 + step * seed}",
        ]
    rows += [f"{first},{task},{len(gaps)},done,0.99", f"{second},{task},{len(gaps)},failed,0.1"]
    (folder / study / "results.csv").write_text("\n".join(rows))
    return folder / study / "results.csv"


@pytest.mark.parametrize(
    ("gaps", "ours", "reading"),
    [
        ((0.02, 0.04), "digits +0.030 (+0.020 to +0.040) (2 seeds). ", "Too few seeds to say whether it agrees."),
        ((0.02, 0.04, 0.03, 0.03, 0.03), "digits +0.030 [+0.02", "(5 seeds). It agrees."),
        (
            (0.0, 0.005, 0.0, 0.005, 0.0),
            "digits +0.002 [",
            "It disagrees: a gap of more than 0.01 is shown on 0 of 1 tasks, and excluded on 1.",
        ),
        (
            (0.0, 0.03, -0.01, 0.02, 0.01),
            "digits +0.010 [",
            "It is not shown to agree: a gap of more than 0.01 is shown on 0 of 1 tasks, and excluded on 0.",
        ),
        ((0.495,) * 5, "digits +0.495 [", "It agrees."),
    ],
)
def test_ours_are_the_paired_means_of_what_was_published(
    tmp_path: Path, gaps: tuple[float, ...], ours: str, reading: str
) -> None:
    told = beside_others(tmp_path)
    assert sum("not measured" in line for line in told) == 1
    assert sum("no study measures the same" in line for line in told) == len(REFERENCES) - 1
    publish(tmp_path, *VISION, gaps, step=0.001)
    (line,) = [line for line in beside_others(tmp_path) if "digits" in line]
    assert ours in line and line.endswith(f"{reading} |")


def test_where_both_are_perfect_there_is_no_room_for_a_gap(tmp_path: Path) -> None:
    path = publish(tmp_path, *VISION, (0.0,) * 6, step=0.0)
    path.write_text(path.read_text().replace(",0.5", ",0.999"))
    (line,) = [line for line in beside_others(tmp_path) if "digits" in line]
    assert line.endswith("| digits no room for a gap, both have more than 0.99. |")


@pytest.mark.parametrize(
    ("table", "why"),
    [
        (b"a,b\n1,2\n", "column 'task' is missing"),
        (b"", "No columns"),
        (b"\xff\xfe\x00", ""),
        (b"variant,task,seed,status,test_accuracy\n" + 2 * b"htc,digits,0,done,0.5\n", "duplicate"),
    ],
)
def test_a_table_that_is_none_is_one_line(table: bytes, why: str, tmp_path: Path) -> None:
    path = publish(tmp_path, *VISION, (0.0,) * 6)
    path.write_bytes(table)
    with pytest.raises(UserError, match=rf"results.csv cannot be read: .*{why}") as found:
        beside_others(tmp_path)
    assert "\n" not in str(found.value)
