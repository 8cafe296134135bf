"""Figures are true and can be read: marks at their numbers, few variants in a panel, nothing higher than a page."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from records import MANIFEST, RESULTS, of_seeds

from bench.store.manifest import CellRow, Manifest, VariantRow
from reports.drawing import figures
from reports.figures import accuracy_vs_flops, accuracy_vs_params
from reports.look import COLOURS, DASHES, MARKERS, MOST, STYLE, TALLEST, WIDE, WIDTH, colour, groups, marker

TASK = MANIFEST.tasks[0]
LONG = "with zero tokens from the first cycle on, additions only"


def many(variants: int, seeds: int = 2) -> tuple[Manifest, dict[str, Any]]:
    """A study of so many variants with long names that all cost the same."""
    few, results = of_seeds(seeds)
    labels = [f"ztt {number} {LONG}" for number in range(variants)]
    copied = {(cell.task, cell.seed): results[cell.id] for cell in few.cells if cell.variant == "ztt"}
    cells = [
        CellRow(variant=label, task=task, seed=seed, id=f"{label} {task} {seed}")
        for label in labels
        for task, seed in copied
    ]
    rows = [VariantRow(label=label, variant="ztt", match=None, chosen="") for label in labels]
    manifest = few.but(variants=rows, cells=cells, reference=labels[0])
    return manifest, {cell.id: copied[cell.task, cell.seed].but(id=cell.id) for cell in cells}


@pytest.mark.parametrize(
    ("draw", "cost"), [(accuracy_vs_flops, "forward_flops_per_token"), (accuracy_vs_params, "params_non_embedding")]
)
def test_a_mark_stands_at_its_cost(draw: Any, cost: str) -> None:
    few, results = of_seeds(2)
    costs = {"htc": 822_000, "ztt": 823_000}  # so near that their marks cover each other
    told = {
        id: record.but(costs=record.costs.but(**{cost: costs[record.cell.variant]})) for id, record in results.items()
    }
    figure = draw(few, told, TASK)
    panel, strip = figure.axes[:2]
    marks = {line.get_label(): line.get_xdata() for line in panel.lines if not str(line.get_label()).startswith("_")}
    assert {name: list(at) for name, at in marks.items()} == {"htc": [822_000], "ztt": [823_000]}
    for place in (0, 1):  # apart in the strip, whose axis has no unit
        seeds = [one.get_offsets() for one in strip.collections]
        assert np.unique(seeds[place][:, 0]).tolist() == [place]
    assert list(strip.get_xticks()) == []


def test_a_curve_ends_where_its_mark_is() -> None:
    few, results = of_seeds(2)
    figure = accuracy_vs_flops(few.but(exit_rule="confidence"), results, TASK)
    assert figure is not None
    panel = figure.axes[0]
    ends = [line.get_xdata()[-1] for line in panel.lines if line.get_linestyle() == "-" and len(line.get_xdata()) > 2]
    marks = [line.get_xdata()[0] for line in panel.lines if line.get_label() in ("htc", "ztt")]
    assert ends == marks == [2e6, 2e6]


@pytest.mark.parametrize("variants", [7, pytest.param(26, marks=pytest.mark.long)])
def test_many_variants_are_small_multiples(variants: int) -> None:
    manifest, results = many(variants)
    for name, drawing in figures.items().items():
        figure = drawing(manifest, results, TASK)
        if figure is None:
            assert name in ("cost_to_score", "exit_examples")
            continue
        width, height = figure.get_size_inches()
        assert width in (WIDTH, WIDE) and height <= TALLEST + 0.2 <= 10, (name, width, height)
        for axes in figure.axes:
            own = [line for line in axes.lines if str(line.get_label()).startswith("ztt")]
            assert len(own) <= MOST, name
    assert variants > 10 or width == WIDTH


def test_looks_differ_within_a_panel() -> None:
    assert len(set(COLOURS)) == len(set(MARKERS)) == len(set(DASHES)) == MOST
    for variants in (1, 6, 7, 13, 40):
        manifest, _ = many(variants, seeds=1)
        assert [index for group in groups(manifest) for index in group] == list(range(variants))
        for group in groups(manifest):
            assert len({(colour(manifest, i), marker(manifest, i)) for i in group}) == len(group) <= MOST


def test_titles_do_not_run_into_each_other() -> None:
    manifest, results = many(8)
    for name in ("exit_curves", "exit_depth", "zero_attention"):
        figure = figures.get(name)(manifest, results, TASK)
        assert isinstance(figure, Figure)
        with mpl.rc_context(STYLE):
            engine = figure.get_layout_engine()
            assert engine is not None
            engine.execute(figure)
        boxes = [axes.title.get_window_extent() for axes in figure.axes if axes.get_title()]
        assert len(boxes) == 8
        for number, box in enumerate(boxes):
            assert box.x0 > -1 and box.x1 < figure.bbox.x1 + 1, name
            assert not any(box.overlaps(other) for other in boxes[:number]), name


@pytest.mark.parametrize("seeds", [2, pytest.param(8, marks=pytest.mark.long)])
def test_no_text_runs_over_the_edge(seeds: int) -> None:
    manifest, results = of_seeds(seeds)
    drawn = [(name, figures.get(name)(manifest, results, task)) for name in figures.names() for task in manifest.tasks]
    for name, figure in drawn:
        if figure is None:
            continue
        with mpl.rc_context(STYLE):
            figure.draw_without_rendering()
        axes = [axis for one in figure.axes for axis in (one.xaxis, one.yaxis)]
        ticks = {id(label) for axis in axes for minor in (False, True) for label in axis.get_ticklabels(minor=minor)}
        for text in figure.findobj(Text):
            if id(text) not in ticks and text.get_visible() and text.get_text().strip():
                box, page = text.get_window_extent(), figure.bbox
                assert box.x0 > -1 and box.x1 < page.x1 + 1 and box.y0 > -1 and box.y1 < page.y1 + 1, (name, text)


def test_a_study_in_which_few_are_done_is_drawn() -> None:
    figure = accuracy_vs_flops(MANIFEST, dict(list(RESULTS.items())[:1]), TASK)
    assert figure is not None and [text.get_text() for text in figure.axes[2].get_legend().get_texts()] == ["htc"]
