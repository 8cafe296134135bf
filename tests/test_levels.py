"""Levels of solvers that do a part of a task: counted again one label after the other, kept, and told."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from records import MANIFEST, RESULTS, TASKS

from bench.config import IGNORED
from bench.data.batches import arrays
from bench.data.prepared import load_prepared, save
from bench.data.task import TaskData, get_task
from bench.store.digests import read_sealed, write_sealed
from bench.store.manifest import TaskRow
from bench.study.plan import make_plan
from bench.study.schema import Study
from reports.aggregates import aggregates
from reports.look import levels
from reports.page import best

SMALL = {"n_train": 300, "n_valid": 50, "n_test": 100}
# As they were before there were levels of solvers: ids of stored cells are made of them.
FINGERPRINTS: list[tuple[str, dict[str, Any], str]] = [
    (
        "p_hop",
        {"length": 24, "hops": [1, 3], "n_train": 600, "n_valid": 100, "n_test": 200},
        "961ec47afc478adc4af8caea9951f17bb41d917d5b84720ab6213995da5b319c",
    ),
    (
        "p_hop",
        {"length": 24, "hops": 2, "dense": False},
        "cacfce9583cef4beb6bb5bf4bc4bd8630780ee6d28590f035d177258a748ff27",
    ),
    ("addition", {}, "34df9e4a41ca79734eec1271ae69160fba01d83f56e28150b32dad8a7d964106"),
    ("modular_chain", {"test_variables": [8]}, "377212a7bf672a9ebbbcfb02e86377e678d5cff7c60a96e635a7f70d93b5f099"),
    ("modular_chain", {"order": "shuffled"}, "4aa710570b909b509b994367d13e348f5a70e7ef60da64f23d898d4d3e8db344"),
    ("state_tracking", {}, "73ad9d5382e8d03edd04cc0b70dab3ea958a196af7df785e25617eecea8f6b87"),
    ("mqar", {}, "48779b014a8140c54ca31b4f7a9ad12b425ccae296edff4e79561cbca50952f8"),
    ("kjv", {}, "3f78f1b6c4ad84266d7aa776032cc9fd87996e3fc4dc9a820d433706ad41938c"),
]
Row = list[int]
Known = Callable[[Row, int], Hashable]  # of a sequence and a position in it: what a solver knows there


def build(name: str, **options: Any) -> TaskData:
    return get_task(name, {**SMALL, **options}).build()


@pytest.mark.parametrize(("name", "options", "fingerprint"), FINGERPRINTS)
def test_data_keep_their_fingerprint(name: str, options: dict[str, Any], fingerprint: str) -> None:
    assert (get_task(name, {}).build() if name == "kjv" else build(name, **options)).fingerprint == fingerprint


def counted(data: TaskData, known: Known) -> float:
    """Test accuracy of the train split's most frequent label for what is known."""
    seen: dict[Hashable, Counter[int]] = defaultdict(Counter)
    overall: Counter[int] = Counter()
    for row, targets in zip(*(column.tolist() for column in arrays(data.train)), strict=True):
        for at, label in enumerate(targets):
            if label != IGNORED:
                seen[known(row, at)][label] += 1
                overall[label] += 1
    right = []
    for row, targets in zip(*(column.tolist() for column in arrays(data.test)), strict=True):
        for at, label in enumerate(targets):
            if label != IGNORED:
                counts = seen.get(known(row, at), overall)
                right.append(label == min(counts, key=lambda one: (-counts[one], one)))
    return float(np.mean(right))


def after_hops(hops: int | list[int], most: int) -> Known:
    """What a solver of ``most`` hops knows at a position."""

    def known(row: Row, at: int) -> Hashable:
        symbols, wanted = (row[1:], hops[row[0] - 4]) if isinstance(hops, list) else (row, hops)
        at -= isinstance(hops, list)
        for _ in range(min(most, wanted)):
            at = max(j for j in range(at) if symbols[j] == symbols[at]) + 1
        if wanted <= most:
            return symbols[at]
        return at, symbols[at], symbols[at - 1] if at else symbols[0], wanted - min(most, wanted)

    return known


@pytest.mark.parametrize("hops", [1, 3, [0, 1, 3]])
@pytest.mark.parametrize("dense", [True, False])
def test_levels_of_fewer_hops_are_counted_right(hops: int | list[int], dense: bool) -> None:
    data = build("p_hop", length=20, hops=hops, dense=dense)
    expected = {f"{k} hop{'s' * (k != 1)}": counted(data, after_hops(hops, k)) for k in range(np.max(hops))}
    assert data.metric.solvers == pytest.approx(expected, abs=1e-12)


def test_a_solver_of_more_hops_is_better_and_who_does_none_of_them_sees_little() -> None:
    metric = get_task("p_hop", {"hops": [1, 2, 3, 4], "length": 32, "n_test": 4000}).build().metric
    found = [metric.levels["chance"], *metric.solvers.values()]
    assert list(metric.solvers) == ["0 hops", "1 hop", "2 hops", "3 hops"]
    assert np.diff(found).min() > 0.05 and found[-1] < 0.95
    assert build("p_hop", length=20, hops=0).metric.solvers == {} == build("mqar").metric.solvers


def lines_read(modulus: int, queries: int, depth: int) -> Known:
    """What a solver of a modular chain knows that reads lines so deep."""

    def known(row: Row, at: int) -> Hashable:
        lines = {row[i]: row[i + 1 : i + 3] for i in range(0, len(row) - queries - 1, 3)}
        terms = [row[at]]
        for _ in range(depth):
            terms = [part for term in terms for part in (lines[term] if term >= modulus else [term])]
        unread = Counter(term for term in terms if term >= modulus)
        return sum(term for term in terms if term < modulus) % modulus, math.gcd(modulus, *unread.values())

    return known


@pytest.mark.parametrize("options", [{}, {"order": "shuffled", "queries": 1}, {"modulus": 6, "variables": 5}])
def test_levels_of_lines_read_are_counted_right(options: dict[str, Any]) -> None:
    data = build("modular_chain", **options)
    deepest = max(map(int, data.test["depth"]))
    expected = {
        f"depth {depth}": counted(data, lines_read(options.get("modulus", 7), options.get("queries", 4), depth))
        for depth in range(1, deepest)
    }
    assert data.metric.solvers == pytest.approx(expected, abs=1e-12) and deepest > 3


def test_levels_are_read_from_prepared_data_and_old_folders_have_none(tmp_path: Path) -> None:
    made = build("p_hop", length=20, hops=2)
    folder = tmp_path / made.fingerprint
    save(made, folder, tmp_path)
    read = load_prepared(folder)
    assert read is not None and read.metric == made.metric and len(read.metric.solvers) == 2
    about = read_sealed(folder / "data.json")
    del about["metric"]["solvers"]
    write_sealed(folder / "data.json", about)
    old = load_prepared(folder)
    assert old is not None and old.metric.levels == made.metric.levels and old.metric.solvers == {}


def test_the_manifest_holds_them_beside_the_trivial_ones() -> None:
    raw = {"name": "s", "question": "?", "variants": ["htc"], "seeds": 1}
    raw["tasks"] = [{"name": "p_hop", "options": {**SMALL, "hops": 2, "length": 20}}]
    (task,) = make_plan(Study.model_validate(raw), "", None).manifest.tasks
    assert list(task.levels) == ["chance"] and list(task.solvers) == ["0 hops", "1 hop"]
    older = {key: value for key, value in task.dump().items() if key != "solvers"}
    assert task.dump().keys() - older.keys() == {"solvers"} and TaskRow.model_validate(older).solvers == {}


def drawn(task: TaskRow, values: list[float]) -> list[str]:
    axes = Figure().subplots()
    levels(axes, task, values)
    return [text.get_text() for text in axes.texts]


def test_a_figure_names_the_few_that_lie_in_its_range() -> None:
    task = TASKS[0].but(solvers={"0 hops": 0.4, "1 hop": 0.63, "2 hops": 0.79, "3 hops": 0.95})
    assert drawn(task, [0.45, 0.85]) == ["chance 0.38", "2 hops", "1 hop"]  # 0 hops is too near to chance
    assert drawn(task.but(solvers={f"{k} hops": 0.4 + 0.02 * k for k in range(25)}), [0.45, 0.85])[1:] == [
        *("22 hops", "16 hops", "10 hops", "4 hops")
    ]
    assert drawn(TASKS[0], [0.45, 0.85]) == ["chance 0.38"]
    falling = TASKS[1].but(solvers={"much": 3.0, "little": 4.0})
    assert drawn(falling, [2.5, 4.2])[1:] == ["much", "little"]


@pytest.mark.parametrize(
    ("solvers", "told"),
    [
        ({"1 hop": 0.63, "2 hops": 0.79}, "; a solver of 1 hop reaches 0.630, one of 2 hops reaches 0.790."),
        ({"1 hop": 0.71, "2 hops": 0.79}, "; a solver of 1 hop reaches 0.710."),
        ({"1 hop": 0.4, "2 hops": 0.5}, "; a solver of 2 hops reaches 0.500."),
        ({}, "; chance is 0.380."),
    ],
)
def test_the_sentence_tells_between_which_solvers_the_best_mean_lies(solvers: dict[str, float], told: str) -> None:
    assert best(MANIFEST, RESULTS, TASKS[0].but(solvers=solvers)).endswith(told)


def test_scores_are_normalised_by_the_trivial_level_alone() -> None:
    tasks = [task.but(solvers={"a part": 0.99}) for task in TASKS]
    with_them, without = (aggregates(MANIFEST.but(tasks=each), RESULTS) for each in (tasks, TASKS))
    assert with_them == without
