"""Reports from stored results: everything is there, nothing is dropped, nothing foreign is loaded."""

from __future__ import annotations

import base64
import copy
import csv
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.image import imread
from records import FAILED, MANIFEST, ONE_TASK, RESULTS, of_seeds

from bench.store.manifest import CellRow
from reports.drawing import figures
from reports.page import best, write_report
from reports.render import KINDS
from reports.table import further_tests, summary
from reports.units import human
from reports.verdicts import differences

DONE = MANIFEST.cells[0].id
NEEDS_MORE = ("cost_to_score", "exit_examples")  # a hypothesis on such costs; pictures
OF_A_TASK = [name for name, drawing in figures.items().items() if not drawing.over_tasks and name not in NEEDS_MORE]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    paths = write_report(MANIFEST, RESULTS, out, formats=KINDS)
    assert sorted(paths) == sorted(out.iterdir())
    return out


def test_every_figure_is_there_and_drawn(written: Path) -> None:
    for name in OF_A_TASK:
        for task in ("p_hop", "kjv"):
            image = imread(written / f"{name}_{task}.png")
            assert image.shape[1] > 600 and image.std() > 0.02
            assert (written / f"{name}_{task}.pdf").read_bytes().startswith(b"%PDF")
            assert ElementTree.parse(written / f"{name}_{task}.svg").getroot().tag.endswith("svg")


def test_rows_count_what_failed_and_what_is_missing() -> None:
    rows = {(row.task, row.variant): row for row in summary(MANIFEST, RESULTS)}
    assert len(rows) == 4
    complete, failed, missing = rows["p_hop", "htc"], rows["p_hop", "ztt"], rows["kjv", "ztt"]
    assert (complete.done, complete.failed, complete.missing) == (2, 0, 0)
    shown = complete.score
    assert shown.mean == pytest.approx(0.695) and (shown.low, shown.high, shown.kind) == (0.69, 0.7, "range")
    assert (failed.done, failed.failed, failed.reason) == (1, 1, "loss is nan within steps 11-20")
    assert (missing.done, missing.missing) == (1, 1)


def test_tables_name_failed_and_missing_cells(written: Path) -> None:
    markdown = (written / "report.md").read_text()
    assert "1 failed: loss is nan within steps 11-20" in markdown and "1 missing" in markdown
    assert "- kjv, ztt, 1 of 1 seeds: the loop diverges after 4 cycles" in markdown
    assert re.search(r"^\| p_hop \| htc \| accuracy \| 0\.695 ", markdown, re.MULTILINE)
    rows = list(csv.DictReader(io.StringIO((written / "results.csv").read_text())))
    assert [row["status"] for row in rows].count("done") == 6 and len(rows) == 8
    assert {row["id"] for row in rows if row["status"] == "failed"} == {FAILED}
    assert [row["test_accuracy@64"] for row in rows].count("0.5") == 6


def test_further_test_splits_have_a_table(written: Path) -> None:
    results = copy.deepcopy(RESULTS)
    bits = [r.metrics for r in results.values() if r.status == "done" and r.cell.task == "kjv"]
    assert further_tests(MANIFEST.but(tasks=MANIFEST.tasks[1:]), results) == [], "bits have no further split"
    bits[0]["test_bits_per_byte@far"] = 2.5
    htc = [results[cell.id].metrics for cell in MANIFEST.cells[0:4:2]]
    htc[1]["test_accuracy@64"], htc[1]["test_accuracy@128"] = 0.6, 0.25
    rows = {(row["task"], row["variant"]): row for row in further_tests(MANIFEST, results)}
    assert list(rows["p_hop", "htc"]) == ["task", "variant", "metric", "test", "test@64", "test@128", "test@far"]
    found = rows["p_hop", "htc"]
    assert found["test@64"] == "0.550 (0.500 to 0.600) (2/2)"
    assert (
        found["test"].startswith("0.695 (0.690 to 0.700)")
        and found["test@128"] == "0.250 (1/2)"
        and found["test@far"] == "-"
    )
    assert rows["p_hop", "ztt"]["test@64"] == "0.500 (1/2)" and rows["p_hop", "ztt"]["test@128"] == "missing (0/2)"
    assert rows["kjv", "htc"]["test@far"] == "2.500 (1/2)" and rows["kjv", "ztt"]["test@far"] == "missing (0/2)"
    markdown, page = ((written / f"report.{kind}").read_text() for kind in ("md", "html"))
    table = markdown.split("Further test splits")[1].split("\n## ")[0]
    assert "| p_hop | ztt | accuracy | 0.690 (1/2) | 0.500 (1/2) |\n" in table and "kjv" not in table
    assert "\n\nFrom 3 cells (sha256 " in table, "those of p_hop alone"
    assert "took no part in training. a to b: the range of 2 seeds, too few" in table
    assert "<th>test@64</th>" in page


def test_slices_stand_in_a_table_of_their_own(written: Path) -> None:
    rows = list(csv.DictReader(io.StringIO((written / "slices.csv").read_text())))
    assert len(rows) == 3 and {row["task"] for row in rows} == {"p_hop"} and FAILED not in {row["id"] for row in rows}
    assert {(row["axis"], row["slice"], row["accuracy"], row["exact_match"], row["n"]) for row in rows} == {
        ("hops", "1", "0.9", "0.25", "100")
    }


class Page(HTMLParser):
    """What a page shows and what it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_holds_everything_and_loads_nothing(written: Path) -> None:
    page = Page()
    page.feed((written / "report.html").read_text())
    images = [value for value in page.loads if value.startswith("data:image/png;base64,")]
    assert len(images) == 2 * len(OF_A_TASK) + 1
    texts = [value for value in page.loads if value.startswith("data:text/plain;")]
    assert base64.b64decode(texts[0].split(",")[1]).decode() == (written / "results.csv").read_text()
    here = {*images, *texts, *(value for value in page.loads if value.startswith("#"))}
    assert {*page.loads} - here == {path.name for path in written.iterdir() if path.suffix in (".svg", ".pdf")}
    for text in (
        "Is <this> & that shown?",
        "0.695",
        "loss is nan",
        "cyclebench run sample",
        "a CPU",
        FAILED[:12],
        MANIFEST.cells[0].id[:12],
        "ztt, 1 of 1 seeds: the loop diverges after 4 cycles, 2 of them trained",
    ):
        assert text in page.text


def test_the_same_results_make_the_same_files(written: Path, tmp_path: Path) -> None:
    figures = [
        path for path in write_report(ONE_TASK, RESULTS, tmp_path, formats=KINDS) if path.stem.endswith("_p_hop")
    ]
    assert len(figures) == 3 * len(OF_A_TASK)
    for path in figures:
        assert path.read_bytes() == (written / path.name).read_bytes(), path.name


def test_two_seeds_are_too_few_and_the_table_says_so() -> None:
    rows = {row["task"]: row for row in differences(MANIFEST, RESULTS)}
    assert rows["p_hop"]["pairs"] == "1/2" and "too few seeds" in rows["p_hop"]["reading"]


def test_eight_paired_seeds_can_tell() -> None:
    manifest, results = copy.deepcopy(MANIFEST), dict(RESULTS)
    template = {cell.variant: RESULTS[cell.id] for cell in MANIFEST.cells if cell.task == "p_hop" and cell.seed}
    manifest.tasks = manifest.tasks[:1]
    manifest.cells = []
    for seed in range(8):
        for variant, gain in (("htc", 0.0), ("ztt", 0.02)):
            cell = CellRow(variant=variant, task="p_hop", seed=seed, id=f"{variant}{seed}")
            manifest.cells.append(cell)
            scores = {"test_accuracy": 0.6 + 0.01 * seed + gain * (1 + 0.01 * seed)}
            results[cell.id] = template[variant].but(metrics=scores)
    row = differences(manifest, results)[0]
    assert (row["reading"], row["pairs"]) == ("better", "8/8") and float(row["p"]) < 0.01
    manifest.tasks[0].higher_is_better = False
    assert differences(manifest, results)[0]["reading"] == "worse"


@pytest.mark.parametrize("keep", [0, 1])
def test_few_or_no_results_still_make_a_report(keep: int, tmp_path: Path) -> None:
    paths = write_report(ONE_TASK, dict(list(RESULTS.items())[:keep]), tmp_path, published=True)
    names = {path.name for path in paths}
    assert {"report.md", "results.csv"} <= names
    assert ("accuracy_vs_flops_p_hop.png" in names) == bool(keep)
    assert "missing" in (tmp_path / "report.md").read_text()


def test_reading_results_imports_no_model() -> None:
    assert _loaded("reports.page, reports.read, reports.table", "torch", "transformers", "mlflow", "datasets") == []


def test_a_process_that_renders_starts_with_little() -> None:
    assert _loaded("reports.render, reports.units", "torch", "seaborn", "pandas", "scipy") == []


def _loaded(modules: str, *heavy: str) -> list[str]:
    code = f"import {modules}, sys, json; print(json.dumps([m for m in {heavy} if m in sys.modules]))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return list(json.loads(found.stdout))


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (1234, "1.23 k"), (999_999, "1 M"), (2.5e12, "2.5 T"), (0.5, "0.5")]
)
def test_units(value: float, text: str) -> None:
    assert human(value) == text


def test_all_that_are_best_are_named() -> None:
    manifest, results = of_seeds(5, lambda variant, task, seed: 0.0)
    line = best(manifest, results, manifest.tasks[0])
    assert "(htc and ztt, 5 seeds)" in line, line
