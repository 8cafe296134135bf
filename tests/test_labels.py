"""Labels, claims and questions of whatever a user types: files of their own, and shown as they are everywhere."""

from __future__ import annotations

import csv
import html
import io
import re
import shutil
import subprocess
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from records import MANIFEST, RESULTS

from bench.cli.screen import show
from bench.store.manifest import HypothesisRow, Manifest, Measure, SweepResult
from bench.tables import markdown, markdown_code, markdown_image, markdown_text
from reports.drawing import Drawing, figures
from reports.latex import latex_text
from reports.look import in_letters
from reports.page import write_report
from reports.render import LONGEST, file_names
from reports.sweeps import write_sweep
from reports.table import summary_rows

LATEX = shutil.which("pdflatex")
RENDER = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render
HARD = [
    *(
        "# a",
        "## ",
        "C #",
        "C ##",
        "a|b",
        "\\|",
        "x\\",
        "a\\b",
        "*x*",
        "**",
        "_x_",
        "__init__",
        "a_",
        "p_hop",
        "<b>",
        "</td>",
    ),
    *(
        "a<br>b",
        "&amp;",
        "& co",
        "&#65;",
        "[a](b)",
        "[a][b]",
        "[a]: b",
        "a] b",
        "![a](b)",
        "[ ] todo",
        "- x",
        "-",
        "+",
        "---",
    ),
    *(
        "===",
        "* * *",
        "1. x",
        "1) x",
        "12",
        "-0.5",
        "+0.25",
        "[0.1, 0.2]",
        "~~x~~",
        "$x$",
        "$\\q$",
        "`c`",
        "``c```",
        "`",
        "> q",
    ),
    *(
        "a\nb",
        "a\r\n\r\nb",
        "a\u2028b",
        "    code",
        "100 %",
        "%",
        "#1",
        "{x}",
        "a^2",
        "a--b",
        "?`",
        "a -> b",
        "[/x] :smile:",
        "{{ x }}",
    ),
]
PRINTED = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).filter(str.strip)


def shown(markup: str) -> str:
    """The text of HTML, a line break as a space."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " " if "<br" in markup else "", markup)).split())


@pytest.mark.parametrize("text", HARD)
def test_markdown_shows_a_text_as_it_is(text: str) -> None:
    _is_shown(text)


@given(
    st.one_of(
        PRINTED, st.text(st.sampled_from("#*_`[]()<>&|~$\\!-+=.:1a \n"), min_size=1, max_size=10).filter(str.strip)
    )
)
def test_markdown_shows_any_text_as_it_is(text: str) -> None:
    _is_shown(text)


def _is_shown(text: str) -> None:
    want = " ".join(text.split())
    for before, after in (("", ""), ("- ", ""), ("## ", ""), ("told: ", " of it"), ("- **", "**: it")):
        told = before.lstrip("-#* ") + want + after.replace("**", "")
        assert shown(RENDER(f"{before}{markdown_text(text)}{after}\n")) == told, (before, after)
    rendered = RENDER("\n".join(markdown(["k", text], [[text, 1], [2, text]])))
    cells = re.findall(r"<t[hd]>(.*?)</t[hd]>", rendered, re.DOTALL)
    told = [" ".join(html.unescape(cell.replace("<br>", " ")).split()) for cell in cells]
    assert told == ["k", want, want, "1", "2", want]
    (code,) = re.findall(r"<code>(.*?)</code>", RENDER(f"by {markdown_code(text)}, it"), re.DOTALL)
    assert html.unescape(code) == want
    (alt,) = re.findall(r'<img src="f\.png" alt="(.*?)" />', RENDER(markdown_image(text, "f.png")), re.DOTALL)
    assert html.unescape(alt) == want


@pytest.mark.skipif(LATEX is None, reason="no pdflatex on this machine (Debian: texlive-latex-recommended)")
def test_latex_shows_a_text_as_it_is(tmp_path: Path) -> None:
    lines = "\n".join(f"{{}}{latex_text(text)} & x \\\\" for text in HARD)
    preamble = r"\documentclass{article}\usepackage[a3paper,margin=1cm]{geometry}\pagestyle{empty}"
    body = rf"\begin{{document}}\noindent\begin{{tabular}}{{ll}}{lines}\end{{tabular}}\end{{document}}"
    (tmp_path / "a.tex").write_text(preamble + body)
    command = [str(LATEX), "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "a.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "Missing" not in done.stdout, done.stdout[-1500:]
    if tool := shutil.which("pdftotext"):
        told = subprocess.run(
            [tool, "-layout", "a.pdf", "-"], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout
        for text in ("a\\b", "100 %", "{x}", "#1", "__init__", "a|b", "<b>", "& co", "a--b"):
            assert text in told, text


@pytest.mark.parametrize("text", HARD)
def test_latex_leaves_nothing_that_latex_reads(text: str) -> None:
    told = latex_text(text)
    bare = re.sub(r"\\[&%$#_{}]|\\text[a-z]+\{\}|-\{\}|\{`\}", "", told)
    assert not set(bare) & set("\\&%$#_{}~^`<>|\n"), told
    assert "--" not in told and not any(ord(c) < 32 for c in told)


def test_two_labels_are_never_one_file() -> None:
    labels = [
        "hop 1",
        "hop_1",
        "hop/1",
        "KJV",
        "kjv",
        "Kjv",
        "é",
        "e\u0301",
        "ﬁ",
        "fi",
        "///",
        "***",
        "..",
        "CON",
        "x" * 500,
        "x" * 501,
        "\udc80",
    ]
    stems = file_names([("cycles", label) for label in labels])
    folded = {unicodedata.normalize("NFKC", stem).casefold() for stem in stems}
    assert len(folded) == len(labels) and all(len(stem.encode()) <= LONGEST + 9 for stem in stems)
    assert not any(set(stem) & set('/\\:*?"<>|. \0') for stem in stems)
    assert stems == file_names([("cycles", label) for label in labels]), "each time the same"
    assert file_names([("cycles", "p_hop"), ("cycles", "kjv")]) == ["cycles_p_hop", "cycles_kjv"], "as they always were"


def test_parts_are_told_apart() -> None:
    one, two, three = file_names([("exit", "curves_x"), ("exit_curves", "x"), ("exit_curves_x",)])
    assert len({one, two, three}) == 3 and {stem.partition("+")[0] for stem in (one, two, three)} == {"exit_curves_x"}


@given(st.lists(st.tuples(st.sampled_from(["a", "a_b"]), st.text(max_size=6)), unique=True, max_size=8))
def test_different_names_are_different_files(names: list[tuple[str, str]]) -> None:
    stems = file_names(names)
    assert len({unicodedata.normalize("NFKC", stem).casefold() for stem in stems}) == len(names)
    for stem in stems:
        stem.encode()
        assert not re.search(r'[/\\:*?"<>|.\x00-\x20]', stem)


LABELS = {"htc": "_h|c $\\q$ [/b] <i>", "ztt": "z#t % ~x~ \\{a}\nb"}
TASKS = {"p_hop": "hop 1", "kjv": "hop_1"}
CLAIM = "# a < b & 5 % of $x\n\nis_so_ \\par [x](y) | *"


def hostile() -> Manifest:
    """The sample study under labels with everything in them."""
    measures = [Measure(task=TASKS["p_hop"], metric="accuracy", higher_is_better=True)]
    common = {"task": TASKS["p_hop"], "measures": measures, "margin": 0.0}
    return MANIFEST.but(
        question="1. Is <this> & that_\n# shown | `so`?",
        reference=LABELS["htc"],
        changed=["variants.a|b_.options={} (as written: <none>)"],
        command="cyclebench run `x` | y",
        variants=[row.but(label=LABELS[row.label], chosen=f"3 -> 4 {row.label}") for row in MANIFEST.variants],
        tasks=[row.but(label=TASKS[row.label]) for row in MANIFEST.tasks],
        cells=[row.but(variant=LABELS[row.variant], task=TASKS[row.task]) for row in MANIFEST.cells],
        hypotheses=[HypothesisRow(claim=CLAIM, better=LABELS["ztt"], than=LABELS["htc"], **common)],
    )


class Page(HTMLParser):
    """The text of a page and its tags."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.tags = "", set[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    write_report(hostile(), RESULTS, out)
    return out


def test_every_task_has_figures_of_its_own(written: Path) -> None:
    names = [name for name, drawing in figures.items().items() if not drawing.over_tasks]
    drawn = {name: sorted(written.glob(f"{name}_hop_1+*.png")) for name in names}
    assert {len(both) for both in drawn.values()} <= {0, 2} and sum(map(len, drawn.values())) >= 20
    for name, both in drawn.items():
        if both and name != "zero_attention":  # the sample has the same of both tasks
            assert both[0].read_bytes() != both[1].read_bytes(), f"{name}: each of its own task"
    text = (written / "report.md").read_text()
    assert sorted(re.findall(r"\]\(([^)]+\.png)\)", text)) == sorted(path.name for path in written.glob("*.png"))


def test_the_page_and_the_text_show_labels_as_they_are(written: Path) -> None:
    page, rendered = Page(), Page()
    page.feed((written / "report.html").read_text())
    rendered.feed(RENDER((written / "report.md").read_text()))
    assert "i" not in page.tags and "i" not in rendered.tags
    manifest = hostile()
    said = [manifest.question, *manifest.changed, manifest.command, CLAIM, *LABELS.values(), *TASKS.values()]
    for found in (page, rendered):
        text = " ".join(found.text.replace("<br>", " ").split())
        for told in said:
            assert " ".join(told.split()) in text, told
    tables = re.findall(r"(?:^\|.*\n)+", (written / "report.md").read_text(), re.MULTILINE)
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, (
            "as many fields in every row"
        )


@pytest.mark.skipif(LATEX is None, reason="no pdflatex on this machine (Debian: texlive-latex-recommended)")
def test_the_latex_compiles_and_its_comments_are_comments(written: Path, tmp_path: Path) -> None:
    source = (written / "report.tex").read_text()
    for line in source.splitlines():
        assert line.startswith(("%", "\\", "{}", "z\\#t", "hop")) or not line or " & " in line, line
    preamble = r"\documentclass{article}\usepackage[a2paper,landscape,margin=1cm]{geometry}\usepackage{booktabs}"
    (tmp_path / "paper.tex").write_text(rf"{preamble}\begin{{document}}\footnotesize {source}\end{{document}}")
    command = [str(LATEX), "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:]


def test_rows_that_begin_with_a_bracket_or_a_star_stay_rows() -> None:
    from reports.latex import _tabular

    rows = [{"task": "[x]", "n": "[1, 2]"}, {"task": "*best", "n": "1"}]
    body = _tabular(["task", "n"], rows).splitlines()[4:6]
    assert body == ["{}[x] & [1, 2] \\\\", "{}*best & 1 \\\\"]


def test_the_csv_reads_back(written: Path) -> None:
    rows = list(csv.DictReader(io.StringIO((written / "results.csv").read_text(), newline="")))
    assert {row["variant"] for row in rows} == set(LABELS.values()) and {row["task"] for row in rows} == set(
        TASKS.values()
    )


def test_the_terminal_shows_labels_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    show(hostile().question, summary_rows(hostile(), RESULTS))
    show("[/title] :smile:", [{"[red]a": "[/b] :x:", "b": "as wide as the title"}])
    said = capsys.readouterr().out
    for text in ("_h|c $\\q$ [/b] <i>", "[/title] :smile:", "[red]a", "[/b] :x:", "# shown | `so`?"):
        assert text in said, text


@pytest.mark.parametrize("label", ["$\\q$", "_x", "a$b", "__", "$$"])
def test_a_figure_draws_a_label_in_letters(label: str) -> None:
    seen: list[Manifest] = []
    drawing = Drawing(lambda manifest, results: seen.append(manifest), "t", True, lambda record: True, False)
    drawing(
        MANIFEST.but(variants=[MANIFEST.variants[0].but(label=label)], cells=[MANIFEST.cells[0].but(variant=label)]), {}
    )
    (variant,), (cell,) = seen[0].variants, seen[0].cells
    assert variant.label == cell.variant == in_letters(label) != label and not variant.label.startswith("_")
    drawing(MANIFEST, {})
    assert seen[1] is MANIFEST


@pytest.mark.long
def test_letters_that_the_font_lacks_are_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    label = "ztt \N{ROCKET} \u65e5"
    cells = [row.but(variant=label) if row.variant == "ztt" else row for row in MANIFEST.cells]
    rows = [row.but(label=label) if row.label == "ztt" else row for row in MANIFEST.variants]
    write_report(MANIFEST.but(variants=rows, cells=cells, hypotheses=[]), RESULTS, tmp_path)
    assert "the figures' font lacks \u65e5 \N{ROCKET}: each is a box there" in (tmp_path / "report.md").read_text()
    assert capsys.readouterr().err.count("font lacks") == 1
    assert not [one for one in recwarn if "Glyph" in str(one.message)]


def test_a_sweep_shows_labels_as_they_are(tmp_path: Path) -> None:
    tasks = [row.but(label=TASKS[row.label]) for row in MANIFEST.tasks]
    scores = {"accuracy": 0.5, "bits_per_byte": 2.0, "loss": 1.0, "flops_per_token": 10.0, "mean_cycles": 1.5}
    point = {"share_of_full": 0.8, "max_flops": 10.0, "trial": 0, "shares": [0.5], "thresholds": [[0.5]]}
    point |= {"valid": scores, "test": scores, "single": None, "test_by_seed": [0.5]}
    threshold = {"study": "x", "variant": LABELS["ztt"], "rule": "confidence", "per_cycle": False, "cells": ["a" * 64]}
    threshold |= {"trials": 1, "full_flops_per_token": 12.0, "front": [], "tuned": [point]}
    rows = [{**threshold, "task": task.label, "metric": task.metric} for task in tasks]
    told = {"study": "sample", "question": "?", "max_flops": None, "storage": "", "git": None, "budgets": []}
    told |= {
        "command": "a `b`",
        "changed": ["x_=1 | <2>"],
        "tasks": [t.dump() for t in tasks],
        "thresholds": rows,
        "environment": [],
    }
    paths = write_sweep(SweepResult.model_validate(told), tmp_path)
    assert len([path for path in paths if path.suffix == ".png"]) == 2 and len(set(paths)) == len(paths)
    rendered = Page()
    rendered.feed(RENDER((tmp_path / "sweep.md").read_text()))
    assert " ".join(LABELS["ztt"].split()) in " ".join(rendered.text.split()) and "x_=1 | <2>" in rendered.text
