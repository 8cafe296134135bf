"""What the report's files are for: a paper's LaTeX, a browser, a repository."""

from __future__ import annotations

import csv
import html
import io
import json
import re
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from PIL import Image
from records import FAILED, MANIFEST, ONE_TASK, RESULTS

from bench.api import Results
from bench.store.manifest import HypothesisRow, Measure
from bench.store.store import Store
from reports.drawing import figures
from reports.figures import accuracy_vs_flops, zero_attention
from reports.look import STYLE
from reports.page import write_report
from reports.pool import MANY, renderers
from reports.read import read
from reports.render import KINDS, rendered

NEEDS_MORE = ("cost_to_score", "exit_examples")  # a hypothesis on such costs; pictures
OF_A_TASK = [name for name, drawing in figures.items().items() if not drawing.over_tasks and name not in NEEDS_MORE]
BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
LATEX = shutil.which("pdflatex")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]

# Opens the page in frames of two widths, measures it, sorts a table, uses the chart, and writes what it found into the
# document. The wider one has no policy against requests: what it asks for would be seen.
PROBE = """<!doctype html><meta charset="utf-8"><body><script>
const found = {};
const until = async ready => { for (let i = 0; i < 500 && !ready(); i++) await new Promise(go => setTimeout(go, 20)); };
const use = async frame => {
  const page = frame.contentDocument, view = frame.contentWindow;
  const at = name => page.getElementById(`chart-${name}`);
  const marks = () => [...page.querySelectorAll("#chart-view svg .mark-symbol path")];
  const shown = () => at("shown").textContent;
  const tell = (name, value) => {
    at(name).value = value;
    at(name).dispatchEvent(new view.Event("change", {bubbles: true}));
  };
  const drawn = async ready => { await until(ready); return [marks().length, shown(),
    [...page.querySelectorAll("#chart-view .role-axis-title text")].map(e => e.textContent)]; };
  await until(() => marks().length);
  const first = await drawn(() => marks().length);
  const told = [];
  for (const mark of [marks()[0], marks().at(-1)]) {
    const box = mark.getBoundingClientRect();
    const where = {bubbles: true, clientX: box.x + box.width / 2, clientY: box.y + box.height / 2};
    for (const kind of ["pointerover", "pointermove"]) mark.dispatchEvent(new view.PointerEvent(kind, where));
    for (const kind of ["mouseover", "mousemove"]) mark.dispatchEvent(new view.MouseEvent(kind, where));
    await until(() => page.querySelector("#vg-tooltip-element.visible"));
    told.push(page.querySelector("#vg-tooltip-element")?.textContent);
    mark.dispatchEvent(new view.PointerEvent("pointerout", where));
  }
  const before = marks().length;
  at("variants").querySelector("input[value=ztt]").click();
  const fewer = await drawn(() => marks().length < before);
  at("seeds").querySelector("input").click();
  const one = await drawn(() => marks().length < fewer[0]);
  tell("rule", "confidence");
  const ruled = await drawn(() => marks().length > one[0]);
  tell("axis", "params");
  const sized = await drawn(() => marks().length < ruled[0]);
  return {first, told, fewer, one, ruled, sized, disabled: at("rule").disabled,
    asked: view.performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:"))};
};
const measure = frame => {
  const page = frame.contentDocument, root = page.documentElement;
  const beyond = [...page.body.querySelectorAll("*")].filter(
    e => (e.matches(".wide") || !e.closest(".wide")) && e.getBoundingClientRect().right > root.clientWidth + 0.5);
  const order = (head, times) => {
    const th = [...page.querySelectorAll("table.probe th")].find(e => e.textContent === head);
    for (let i = 0; i < times; i++) th.click();
    const cells = [...th.closest("table").tBodies[0].rows].map(row => row.cells[th.cellIndex].textContent);
    return [cells, th.getAttribute("aria-sort")];
  };
  return {
    images: [...page.images].map(i => i.naturalWidth), wide: root.scrollWidth, room: root.clientWidth,
    beyond: beyond.map(e => e.outerHTML.slice(0, 80)), tables: page.querySelectorAll("table").length,
    hidden: [...page.querySelectorAll(".wide")].filter(e => e.scrollWidth > e.clientWidth + 1).length,
    links: [...page.querySelectorAll("nav li a")].map(
      a => page.querySelector(a.getAttribute("href"))?.textContent === a.textContent),
    saved: [...page.querySelectorAll("a.save")].filter(a => a.href.startsWith("data:image/png")).length,
    rising: order("number", 1), falling: order("number", 1), interval: order("interval", 1), word: order("word", 1),
  };
};
for (const [width, page] of [[1200, OPEN], [390, PAGE]]) {
  const frame = document.createElement("iframe");
  frame.width = width; frame.height = 900; frame.srcdoc = page;
  frame.addEventListener("load", async () => {
    const chart = await use(frame);
    found[width] = {...measure(frame), chart};
    if (Object.keys(found).length === 2) {
      const out = document.createElement("pre");
      out.id = "found"; out.textContent = JSON.stringify(found);
      document.body.replaceChildren(out);
    }
  });
  document.body.append(frame);
}
</script></body>"""
CLAIM = "p_hop < 5 % & #1 > ${x}^2~\\y"  # every character that LaTeX would take for its own
ROWS = [("2 M", "[-0.5, 1]", "b10"), ("-", "-", "-"), ("1.5 k", "[+0.25, 2]", "b9"), ("1,234", "[0.1, 3]", "a")]
ROWS += [("2e-05", "[1e-3, 1]", ""), ("-3", "[-1.5, 0]", "c")]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    measures = [Measure(task="p_hop", metric="accuracy", higher_is_better=True)]
    claim = HypothesisRow(claim=CLAIM, better="ztt", than="htc", task="p_hop", measures=measures, margin=0.0)
    write_report(ONE_TASK.but(hypotheses=[claim]), RESULTS, out, formats=KINDS)
    return out


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (Debian: chromium-headless-shell)")
def test_the_page_in_a_browser(written: Path, tmp_path: Path) -> None:
    body = "".join(f"<tr>{''.join(f'<td>{value}</td>' for value in row)}</tr>" for row in ROWS)
    head = "<thead><tr><th>number</th><th>interval</th><th>word</th></tr></thead>"
    page = (written / "report.html").read_text()
    table = f'<div class="wide"><table class="probe">{head}<tbody>{body}</tbody></table></div>'
    page = page.replace("<nav ", table + "<nav ", 1)  # the page's own script sorts a table of hard cases
    policy = re.search(r'<meta http-equiv="Content-Security-Policy".*?>', page)
    assert policy and "default-src 'none'" in policy[0], "the page can ask for nothing"
    probe = tmp_path / "probe.html"
    frames = {"OPEN": page.replace(policy[0], ""), "PAGE": page}
    text = PROBE
    for name, whole in frames.items():
        text = text.replace(name, json.dumps(whole).replace("</", "<\\/").replace("<script", "<\\u0073cript"), 1)
    probe.write_text(text)
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000"]
    shown = subprocess.run(
        [*command, "--dump-dom", probe.as_uri()], capture_output=True, text=True, timeout=240, check=True
    )
    match = re.search(r'<pre id="found">(.*?)</pre>', shown.stdout, re.DOTALL)
    assert match, shown.stderr[-2000:]
    found: dict[str, dict[str, Any]] = json.loads(html.unescape(match[1]))
    for width in ("1200", "390"):
        seen = found[width]
        assert len(seen["images"]) == seen["saved"] >= 10 and min(seen["images"]) > 500
        assert len(seen["links"]) >= 5 and all(seen["links"])
        assert not seen["hidden"], "tables are as wide as the window"
        chart = seen["chart"]
        assert chart["asked"] == [], "no request to any network"
        assert chart["first"][2] == ["executed FLOPs/token", "test accuracy"]
        assert "variant" in chart["told"][0] and re.search(r"seed[01].*cell[0-9a-f]{12}", chart["told"][0])
        assert "mean of seeds" in chart["told"][1] and "mean test accuracy" in chart["told"][1]
        counts = [int(chart[step][1].split()[0]) for step in ("first", "fewer", "one", "ruled", "sized")]
        # a cell has a point at full depth, 2 exit points, 4 of a curve: all; htc's; of one seed; by a rule; no rule
        assert counts == [9, 6, 3, 5, 1]
        assert chart["sized"][2] == ["non-embedding parameters", "test accuracy"] and chart["disabled"]
        assert 0 < seen["room"] <= int(width) and seen["wide"] <= seen["room"] and not seen["beyond"]
        assert seen["tables"] >= 5
        assert seen["rising"] == [["-3", "2e-05", "1,234", "1.5 k", "2 M", "-"], "ascending"]
        assert seen["falling"] == [["2 M", "1.5 k", "1,234", "2e-05", "-3", "-"], "descending"]
        assert seen["interval"][0] == ["[-1.5, 0]", "[-0.5, 1]", "[1e-3, 1]", "[0.1, 3]", "[+0.25, 2]", "-"]
        assert seen["word"][0][:4] == ["a", "b9", "b10", "c"] and set(seen["word"][0][4:]) == {"", "-"}


@pytest.mark.skipif(LATEX is None, reason="no pdflatex on this machine (Debian: texlive-latex-recommended)")
def test_the_latex_tables_compile(written: Path, tmp_path: Path) -> None:
    preamble = r"\documentclass{article}\usepackage[a4paper,landscape,margin=1cm]{geometry}\usepackage{booktabs}"
    source = tmp_path / "paper.tex"
    tables = (written / "report.tex").read_text().replace(r"\begin{tabular}", "\n\n\\noindent\\begin{tabular}")
    source.write_text(rf"{preamble}\begin{{document}}\footnotesize {tables}\end{{document}}")
    command = [str(LATEX), "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", source.name]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert shown.returncode == 0, shown.stdout[-2000:]
    assert (tmp_path / "paper.pdf").read_bytes().startswith(b"%PDF")
    assert "Overfull" not in shown.stdout


def test_the_latex_tables_hold_the_numbers_and_what_failed(written: Path) -> None:
    tables = (written / "report.tex").read_text()
    assert tables.count(r"\toprule") == tables.count(r"\bottomrule") == 3
    claim = (
        r"p\_hop \textless{} 5 \% \& \#1 \textgreater{} \$\{x\}\textasciicircum{}2\textasciitilde{}\textbackslash{}y"
    )
    assert f"\n{claim} & p\\_hop & inconclusive & " in tables
    assert r"p\_hop & htc & accuracy & 0.695 & " in tables and "1/2 & 150 k & 2 M & 1 failed" in tables


def test_a_published_report_is_small_and_whole(tmp_path: Path) -> None:
    paths = write_report(ONE_TASK, RESULTS, tmp_path, published=True)
    assert {path.suffix for path in paths} == {".png", ".md", ".csv", ".json"}
    text = (tmp_path / "report.md").read_text()
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert sorted(pictures) == sorted(path.name for path in paths if path.suffix == ".png")
    for part in ("cyclebench run sample", "torch 2", "a CPU", FAILED[:12], "From 3 of 4 cells (", "cells of ztt ("):
        assert part in text, part


def _caption(written: Path, name: str) -> str:
    """What the report says a figure is from."""
    found = re.search(rf"\({name}_p_hop\.png\)\n\n.* From (.+?\))\.\n", (written / "report.md").read_text())
    assert found
    return found[1]


def test_every_figure_and_table_names_its_cells(written: Path) -> None:
    rows = list(csv.DictReader(io.StringIO((written / "results.csv").read_text())))
    done = sorted(row["id"] for row in rows if row["status"] == "done")
    ztt = [row["id"] for row in rows if row["status"] == "done" and row["variant"] == "ztt"]
    assert len(done) == 3 and len(ztt) == 1
    everything, one = (sha256("".join(f"{id}\n" for id in ids).encode()).hexdigest()[:12] for ids in (done, ztt))
    captions = {name: _caption(written, name) for name in OF_A_TASK}
    assert captions["accuracy_vs_flops"] == captions["cycles"] == f"3 of 4 cells (sha256 {everything})"
    assert captions["zero_attention"] == f"1 of 2 cells of ztt (sha256 {one})"
    for name, caption in captions.items():
        for kind in KINDS:
            assert caption.encode() in _plain((written / f"{name}_p_hop.{kind}").read_bytes()), (name, kind)
    text, page, tables = ((written / f"report.{kind}").read_text() for kind in ("md", "html", "tex"))
    assert text.count(" --- |\n") == len(re.findall(r"^\|.*\|\n\nFrom \d+ cells? \(sha256 ", text, re.MULTILINE)) >= 4
    page = page.split("<script", 1)[0]
    assert page.count("<table>") == page.count('</table></div>\n<p class="note">From ') >= 4
    assert tables.count(r"\begin{tabular}") == tables.count(f"; from 3 cells (sha256 {everything})\n\\begin{{tabular}}")


def _plain(data: bytes) -> bytes:
    """A PDF's strings without their escapes."""
    return data.replace(rb"\(", b"(").replace(rb"\)", b")")


def test_figures_are_the_same_from_other_processes(written: Path) -> None:
    task = ONE_TASK.tasks[0]
    with mpl.rc_context(STYLE):
        figures = [figure for draw in (accuracy_vs_flops, zero_attention) if (figure := draw(ONE_TASK, RESULTS, task))]
    cells = [_caption(written, name) for name in ("accuracy_vs_flops", "zero_attention")]
    with renderers(MANY) as pool:
        assert pool is not None
        found = rendered(zip(figures, cells, strict=True), KINDS, STYLE, pool)
        made = dict(zip(("accuracy_vs_flops", "zero_attention"), found, strict=True))
    for name, files in made.items():
        for kind in KINDS:
            assert files[kind] == (written / f"{name}_p_hop.{kind}").read_bytes(), (name, kind)


def test_what_is_read_from_the_store_makes_the_same_report(written: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    for id, record in RESULTS.items():
        (store.write_failure if record.status == "failed" else store.write_result)(id, record)
    results = read(store, MANIFEST)
    assert results.keys() == RESULTS.keys()
    sizes = [
        len(json.dumps({id: record.dump() for id, record in found.items()}, default=list))
        for found in (results, RESULTS)
    ]
    assert sizes[0] < sizes[1]
    for path in write_report(ONE_TASK, results, tmp_path / "report", published=True):
        if path.suffix == ".png" or path.name == "results.csv":
            assert path.read_bytes() == (written / path.name).read_bytes(), path.name


@pytest.mark.parametrize("drawn", [False, True])
def test_a_figure_from_python_is_saved_as_the_report_saves_it(tmp_path: Path, drawn: bool) -> None:
    """Journals refuse Type 3 fonts."""
    results = Results(Store(tmp_path), MANIFEST)
    vars(results)["records"] = RESULTS
    figure = results.figure("accuracy_vs_flops", MANIFEST.tasks[0].label)
    if drawn:  # as a notebook shows it
        vars(figure)["_repr_png_"]()
    figure.savefig(tmp_path / "x.pdf")
    figure.savefig(tmp_path / "x.png")
    figure.savefig(tmp_path / "small.png", dpi=50)
    assert b"/Type3" not in (tmp_path / "x.pdf").read_bytes()
    sizes = {name: Image.open(tmp_path / name).size for name in ("x.png", "small.png")}
    assert sizes["x.png"] == tuple(round(inches * 200) for inches in figure.get_size_inches())
    assert sizes["x.png"][0] == pytest.approx(4 * sizes["small.png"][0], abs=4)
