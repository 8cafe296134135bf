"""What reports say of cycles in blocks, and of the cost of reaching a score, from planted records."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from records import MANIFEST, RESULTS, VARIANTS

from bench.evaluate.targets import Reading
from bench.store.manifest import CellRow, HypothesisRow, Manifest, Measure, VariantRow
from bench.store.records import HistoryEntry, Outcome
from reports.drawing import figures
from reports.figures import learning_curves
from reports.page import write_report
from reports.recurrence import families, findings, recurrence, shape_of
from reports.targets import _median, cost_to_score, targets

PHI, SEEDS = 0.4, 6
DONE = next(record for record in RESULTS.values() if record.status == "done" and record.cell.task == "p_hop")


@pytest.mark.parametrize(
    ("schedule", "shape"),
    [
        ("0 1 2", (3, 0, 1)),
        ("0 1 2 1 2 3", (2, 2, 2)),
        ("0 1 0 1 0 1", (0, 2, 3)),
        ("0 0 1 1 1", None),
        ("0", (1, 0, 1)),
    ],
)
def test_the_shape_of_a_schedule(schedule: str, shape: tuple[int, int, int] | None) -> None:
    assert shape_of(schedule) == shape


def planted(score: float = PHI, **train: Any) -> tuple[Manifest, dict[str, Outcome]]:
    """Stacks of 4, 6 and 8 blocks and two blocks between two others that run 1, 2, 3 and 4 times."""
    made = {f"vanilla n_blocks={n}": ("vanilla", " ".join(map(str, range(n))), n, 1) for n in (4, 6, 8)}
    made |= {f"htc n_cycles={r}": ("htc", " ".join(["0", *["1 2"] * r, "3"]), 4, r) for r in (1, 2, 3, 4)}
    cells, results = [], dict[str, Outcome]()
    rng = np.random.default_rng(4)
    for label, (name, schedule, blocks, cycles) in made.items():
        for seed in range(SEEDS):
            cells.append(CellRow(variant=label, task="p_hop", seed=seed, id=f"{label}{seed}"))
            shape = shape_of(schedule)
            assert shape is not None
            worth = 0.2 + 0.3 * math.log(shape[0] + shape[1] * shape[2] ** score) + 0.003 * rng.normal()
            model = {**DONE.cell.model, "n_blocks": blocks, "n_cycles": cycles}
            cell = DONE.cell.but(variant=name, model=model, seed=seed, train={**DONE.cell.train, **train})
            changes = {"id": cells[-1].id, "schedule": schedule, "cell": cell}
            results[cells[-1].id] = DONE.but(**changes, metrics={"test_accuracy": worth})
    rows = [VariantRow(label=label, variant=name, match=None, chosen="") for label, (name, *_) in made.items()]
    return MANIFEST.but(variants=rows, tasks=MANIFEST.tasks[:1], cells=cells, reference=None), results


def test_what_a_cycle_is_worth_is_found_again_and_told() -> None:
    manifest, results = planted()
    (family,) = families(manifest, results)
    assert family.name == "htc" and family.fit.configurations == 6, "htc of one cycle is the stack of four blocks"
    assert family.fit.phi.low < PHI < family.fit.phi.high and family.fit.phi.high - family.fit.phi.low < 0.2
    (row,) = rows = recurrence([family])
    assert (row["variant"], row["cycles"], row["seeds"], row["note"]) == ("htc", "1, 2, 3, 4", "6", "")
    assert "95 % interval" in row and "intervals over 6 seeds" in rows.ends
    (line,) = findings([family])
    assert line.startswith("p_hop, htc: a block that runs r times is worth r^phi blocks of its own, with phi = 0.")
    small = {
        id: record.but(cell=record.cell.but(train={**record.cell.train, "stacked": len(record.schedule) < 12}))
        for id, record in results.items()
        if record.status == "done"
    }
    assert len({record.cell.train["stacked"] for record in small.values()}) == 2
    assert [one.fit for one in families(manifest, small)] == [family.fit], "the shape decides what is stacked"
    labels = ("vanilla n_blocks=8", "htc n_cycles=1", "htc n_cycles=3")
    three = manifest.but(variants=[row for row in manifest.variants if row.label in labels])
    (family,) = families(three.but(cells=[row for row in three.cells if row.variant in labels]), results)
    (row,), (line,) = recurrence([family]), findings([family])
    assert row["R2"] == "-" and "the form is not tested" in row["note"] and "explains" not in line


def test_what_differs_in_more_than_blocks_and_cycles_is_no_family() -> None:
    manifest, results = planted()
    wider = {
        id: record.but(cell=record.cell.but(model={**record.cell.model, "d_model": 999}))
        if record.status == "done" and record.cell.variant == "vanilla"
        else record
        for id, record in results.items()
    }
    (family,) = families(manifest, wider)
    assert {run.shape[:2] for run in family.runs} == {(2, 2)}
    assert "blocks and cycles do not vary by themselves" in family.fit.note and not findings([family])
    started = {
        id: record.but(cell=record.cell.but(init={"source": "smollm2"}))
        if record.status == "done" and record.cell.variant == "vanilla"
        else record
        for id, record in results.items()
    }
    (family,) = families(manifest, started)
    assert {run.shape[:2] for run in family.runs} == {(2, 2)}, "pretrained stacks tell nothing of the others"
    few = manifest.but(variants=[row for row in manifest.variants if row.variant == "vanilla"])
    assert not list(families(few, results)) and not recurrence([])


def claims() -> tuple[Manifest, dict[str, Outcome]]:
    """htc reaches 0.9 with every seed, at 100, 200, ... tokens; ztt with seed 0 alone."""
    both = [cell for cell in MANIFEST.cells if cell.task == "p_hop"]
    common = {"lr": 1e-3, "train_loss": 1.0, "seconds": 0.1, "valid_loss": 2.0}
    results = dict[str, Outcome]()
    for cell in both:
        reaches = 100 * (cell.seed + 1) if cell.variant == "htc" else 100 if cell.seed == 0 else math.inf
        history = [
            HistoryEntry(step=n, tokens=n, flops=7.0 * n, valid_accuracy=0.9 if n >= reaches else 0.2, **common)
            for n in (100, 200, 400)
        ]
        results[cell.id] = DONE.but(id=cell.id, history=history)
    names = {"task": "p_hop", "of": "accuracy", "of_higher_is_better": True}
    entries = [
        HypothesisRow(
            claim=metric,
            better="ztt",
            than="htc",
            task="p_hop",
            margin=0.0,
            measures=[Measure(metric=metric, higher_is_better=metric == "area", **names)],
        )
        for metric in ("tokens_to@0.9", "area")
    ]
    return MANIFEST.but(tasks=MANIFEST.tasks[:1], cells=both, hypotheses=entries), results


def test_the_median_of_a_cost_is_no_more_than_is_known() -> None:
    reached, unreached = Reading(130.0, False, 200.0), [Reading(value, True, value) for value in (100.0, 100.0, 120.0)]
    assert _median([reached, *unreached[:2]]) == "> 100"
    assert _median([Reading(10.0, False, 100.0), *unreached[1:]]) == "> 100"


def test_a_cost_to_a_score_is_drawn_whatever_the_task_is_called() -> None:
    manifest, results = claims()
    drawing = figures.get("cost_to_score")
    for label in ("p_hop", "p $4", "_p"):
        named = manifest.but(
            tasks=[manifest.tasks[0].but(label=label)],
            cells=[cell.but(task=label) for cell in manifest.cells],
            hypotheses=[
                row.but(task=label, measures=[one.but(task=label) for one in row.measures])
                for row in manifest.hypotheses
            ],
        )
        assert drawing(named, results, named.tasks[0]) is not None, label


def test_learning_curves_of_seeds_that_were_validated_elsewhere() -> None:
    """As where numbers of cycles are drawn: other FLOPs at the same steps, or other steps."""
    manifest, results = claims()
    for number, (id, record) in enumerate(results.items()):
        history = [entry.but(flops=entry.flops * (1 + 0.1 * number)) for entry in record.history[number // 2 :]]
        results[id] = record.but(history=history)
    figure = learning_curves(manifest, results, manifest.tasks[0])
    assert figure is not None
    curves = [[line.get_xdata() for line in axes.lines if line.get_label() in VARIANTS] for axes in figure.axes[:2]]
    tokens, flops = curves
    assert [(at[0], at[-1]) for at in tokens] == [(200, 400)] * 2, "what both seeds have"
    assert all((np.diff(at) > 0).all() for at in flops)


@pytest.mark.long
def test_costs_of_reaching_a_score_count_those_that_do_not(tmp_path: Path) -> None:
    manifest, results = claims()
    rows = targets(manifest, results)
    assert [(row["variant"], row["median"], row["least to greatest"], row["runs that reach it"]) for row in rows] == [
        ("htc", "150", "100 to 200", "2/2"),
        ("ztt", "> 250", "100 to > 400", "1/2"),
        ("htc", "-", "-", "-"),
        ("ztt", "-", "-", "-"),
    ]
    assert rows[2]["metric"] == "area under the learning curve (accuracy)" and rows[2]["mean"] == "0.842"
    figure = cost_to_score(manifest, results, manifest.tasks[0])
    assert figure is not None
    (axes,) = figure.axes
    at = {tuple(mark.get_offsets().tolist()[0]) for mark in axes.collections if len(mark.get_offsets())}
    assert (400.0, 1.0) in at and len(at) == 3, "the one that does not reach it stands at its whole training"
    assert not targets(manifest.but(hypotheses=[]), results)
    assert cost_to_score(manifest.but(hypotheses=[]), results, manifest.tasks[0]) is None
    write_report(manifest, results, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "## What reaching a score costs" in text and "100 to > 400" in text
    assert (tmp_path / "cost_to_score_p_hop.png").exists()
    write_report(*planted(), tmp_path / "cycled")
    assert ">What a cycle is worth</h2>" in (tmp_path / "cycled" / "report.html").read_text()
