"""The report's files: figures, tables, and the self-contained page."""

from __future__ import annotations

import base64
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from itertools import tee
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from bench.errors import typed_line
from bench.store.environment import environments
from bench.store.files import atomic_write
from bench.store.manifest import Manifest, SweepResult, TaskRow
from bench.store.published import STUDY, published_text
from bench.store.records import Outcome, Record
from bench.tables import counted, markdown, markdown_code, markdown_image, markdown_text
from reports.aggregates import aggregates, comparable
from reports.chart import as_json, chart, scripts
from reports.drawing import Drawing, figures
from reports.execution import executions
from reports.exit_rules import findings, rule_rows
from reports.fronts import fronts, shared_rule
from reports.latex import latex
from reports.look import STYLE, WIDTH
from reports.loops import diverging
from reports.policy import bars, can_rank, told, told_seeds
from reports.recurrence import families, recurrence
from reports.recurrence import findings as recurrence_findings
from reports.render import check_output, file_names, lacking, rendered
from reports.sweeps import on_page
from reports.table import (
    Row,
    costs,
    csv_of_cells,
    csv_of_slices,
    digest,
    done,
    further_tests,
    harness,
    named,
    of_test,
    ran_on,
    summary,
    summary_rows,
)
from reports.targets import targets
from reports.tuning import tuning
from reports.units import metric_name
from reports.verdicts import differences, sentences, verdicts
from reports.worth import worth

TEMPLATES = Path(__file__).parent / "templates"
INLINED = 1 << 18  # bytes of a text that the page holds so that it can be saved from there


class Drawn(NamedTuple):
    """A figure of a task, or of all (None). cells: those that it shows, bars: what its bars are, in words."""

    task: str | None
    drawing: Drawing
    cells: str
    bars: str
    figure: Figure


def write_report(
    manifest: Manifest,
    results: dict[str, Outcome],
    out: Path,
    published: bool = False,
    formats: Sequence[str] = ("png",),
    pool: Executor | None = None,
    sweeps: Sequence[SweepResult] = (),
) -> list[Path]:
    """Write every figure, ``results.csv``, ``report.md``, ``report.html``, ``report.tex`` and, where
    tests are sliced, ``slices.csv`` into ``out``; their paths.

    Args:
        manifest: of the study's last run.
        results: the records by cell id; a cell of the manifest that has none is shown as missing.
        out: folder of the files.
        published: only what a repository shows: PNG, Markdown and CSV, and ``study.json``, what its cells were.
        formats: of the figures: ``png``, ``svg``, ``pdf``.
        pool: processes that render the figures meanwhile (``reports.pool``); None: none.
        sweeps: what the study's sweeps have found; the page shows it too.

    Raises:
        UserError: for a format that there is not, or without ``png``, which the page shows; where out is no folder.
    """
    check_output(out, formats)
    with mpl.rc_context(STYLE):
        letters = lacking(row.label for rows in (manifest.variants, manifest.tasks) for row in rows)
    undrawn = [f"the figures' font lacks {' '.join(letters)}: each is a box there"] if letters else []
    drawn, listed = tee(_drawn(manifest, results, undrawn))
    kinds = ("png",) if published else tuple(formats)
    sourced = ((one.figure, one.cells) for one in drawn)
    files = rendered(sourced, kinds, STYLE, pool)
    context: dict[str, Any] = {
        "manifest": manifest,
        "counted": counted,
        "summary": summary_rows(manifest, results),
        "further_tests": further_tests(manifest, results),
        "harness": harness(manifest, results),
        "verdicts": verdicts(manifest, results),
        "sentences": sentences(manifest, results),
        "differences": (differs := differences(manifest, results)),
        "worth": worth(manifest, results, differs),
        "fronts": fronts(manifest, results),
        "rule_of_fronts": {task.label: shared_rule(manifest, results, task) for task in manifest.tasks},
        "aggregates": aggregates(manifest, results),
        "targets": targets(manifest, results),
        "recurrence": recurrence(cycled := list(families(manifest, results))),
        "recurrence_findings": recurrence_findings(cycled),
        "diverging": diverging(manifest, results),
        "tuning": tuning(manifest),
        "costs": costs(manifest, results),
        "of_test": of_test(results),
        "rules": rule_rows(manifest, results),
        "exit_findings": findings(manifest, results),
        "executions": executions(manifest, results),
        "environment": [ran_on(place) for place in environments(results.values())],
        "other_mode": [r.id[:12] for r in results.values() if r.status == "done" and r.other_mode],
        "failures": [r for r in results.values() if r.status == "failed"],
    }
    context["cells"] = _sources(manifest, results, {row["task"] for row in context["further_tests"]})
    paths, pictures = _files(zip(listed, files, strict=True), _stems(manifest), out, undrawn)
    context["undrawn"] = undrawn
    for problem in undrawn:
        print(f"warning: {problem}", file=sys.stderr)
    context["overall"] = pictures.get(None, [])
    context["sections"] = [
        {**_section(manifest, results, task), "figures": pictures.get(task.label, [])} for task in manifest.tasks
    ]
    texts = {"results.csv": csv_of_cells(manifest, results)}
    if slices := csv_of_slices(manifest, results):
        texts["slices.csv"] = slices
    if published:
        texts[STUDY] = published_text(manifest, results, context["verdicts"], context["environment"])
    else:
        texts["report.tex"] = latex(context)
    texts["report.md"] = _templates(_as_markdown).get_template("report.md").render({**context, **MARKDOWN})
    if not published:
        texts["report.html"] = _page(context, texts, manifest, results, sweeps)
    for name, text in texts.items():
        paths.append(out / name)
        atomic_write(paths[-1], text.encode())
    return paths


def _page(
    context: dict[str, Any],
    texts: Mapping[str, str],
    manifest: Manifest,
    results: dict[str, Outcome],
    sweeps: Sequence[SweepResult],
) -> str:
    """The page, with a list of its contents. texts: of the other files, which it offers to be saved."""
    environment = _templates()
    more: dict[str, Any] = {"chart": chart(manifest, results), "as_json": as_json}
    more["chart_script"] = Markup((TEMPLATES / "chart.js").read_text())
    more["downloads"] = [(name, _to_save(name, text)) for name, text in texts.items()]
    more["sweeps"] = [on_page(sweep) for sweep in sweeps]
    whole = environment.get_template("report.html").render({**context, **more})
    heads = re.findall(r"<h2>(.*?)</h2>", whole)
    for number, head in enumerate(heads):
        whole = whole.replace(f"<h2>{head}</h2>", f'<h2 id="part-{number}">{head}</h2>', 1)
    links = "".join(f'<li><a href="#part-{number}">{head}</a></li>' for number, head in enumerate(heads))
    whole = whole.replace("<!--contents-->", f"<ul>{links}</ul>", 1)  # no label can hold it: they are escaped
    return whole.replace("<!--scripts-->", f"<script>{scripts()}</script>", 1)


def _to_save(name: str, text: str) -> str:
    """Where a file can be had: in the page itself, or beside it if it is large."""
    data = text.encode()
    if len(data) > INLINED:
        return name
    return f"data:text/plain;charset=utf-8;base64,{base64.b64encode(data).decode()}"


def _templates(finalize: Callable[[Any], Any] | None = None) -> Environment:
    """The page's templates. What they are given is shown as it is, letter by letter.

    finalize: makes the template's kind of text of a value; by default HTML is made.
    """
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        autoescape=True,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _as_markdown(value: Any) -> Markup:
    """What a template puts out, as Markdown, if it is not that already."""
    return value if isinstance(value, Markup) else Markup(markdown_text(value))


MARKDOWN: dict[str, Callable[..., Markup]] = {  # what the template of Markdown may call
    "markdown_table": lambda rows: Markup("\n".join(markdown(rows[0], (row.values() for row in rows)))),
    "markdown_image": lambda text, file: Markup(markdown_image(text, file)),
    "markdown_code": lambda text: Markup(markdown_code(text)),
}


def best(manifest: Manifest, results: dict[str, Outcome], task: TaskRow) -> str:
    """One plain sentence: which mean is best (or which are), over how many seeds. Where no two variants have enough
    seeds to rank them, the means in the study's order.
    """
    rows = [row for row in summary(manifest.but(tasks=[task]), results) if row.done]
    if not rows:
        return "No cell of this task is done."
    name = metric_name(task.metric)
    levels = "".join(f"; {name} is {level:.3f}" for name, level in task.levels.items())
    ranked = [row for row in rows if can_rank(row.done)]
    if len(ranked) < 2:
        means = ", ".join(f"{row.variant} {told(row.score)} ({told_seeds([row.done])})" for row in rows)
        return f"Mean test {name}: {means}{levels}{_between(task, [row.score.mean for row in rows])}."
    top = (max if task.higher_is_better else min)(ranked, key=lambda row: row.score.mean)
    word = "highest" if task.higher_is_better else "lowest"
    others = [row.variant for row in rows if row not in ranked]
    few = f"; too few seeds to compare: {', '.join(others)}" if others else ""
    first = [row.variant for row in ranked if row.score.mean == top.score.mean]
    names = " and ".join(part for part in (", ".join(first[:-1]), first[-1]) if part)
    mean = f"{told(top.score)} ({names}, {told_seeds([top.done])})"
    return f"The {word} mean test {name} is {mean}{levels}{_between(task, [top.score.mean])}{few}."


def _between(task: TaskRow, means: list[float]) -> str:
    """What the solvers reach, of those that do a part of the task, that are next to the means on either side."""
    sign = 1 if task.higher_is_better else -1
    rising = sorted((sign * level, name) for name, level in task.solvers.items())
    least, most = (end(sign * mean for mean in means) for end in (min, max))
    below = [entry for entry in rising if entry[0] <= least][-1:]
    above = [entry for entry in rising if entry[0] > most][:1]
    reached = [f"of {name} reaches {sign * level:.3f}" for level, name in [*below, *above]]
    return f"; a solver {', one '.join(reached)}" if reached else ""


def _stems(manifest: Manifest) -> dict[tuple[str, str | None], str]:
    """How the files of every figure are called that a report may have: by the figure's name and the task's label."""
    tasks = [row.label for row in manifest.tasks]
    names = [
        (name, task) for name, one in figures.items().items() for task in (tasks if not one.over_tasks else [None])
    ]
    stems = file_names([(name,) if task is None else (name, task) for name, task in names])
    return dict(zip(names, stems, strict=True))


def _files(
    rendered: Iterable[tuple[Drawn, dict[str, bytes] | str]],
    stems: Mapping[tuple[str, str | None], str],
    out: Path,
    undrawn: list[str],
) -> tuple[list[Path], dict[str | None, list[Row]]]:
    """Write the figures' files; their paths, and by task what the templates say of each figure.

    Args:
        rendered: see there.
        stems: of the files, by figure and task.
        out: their folder.
        undrawn: what is told of figures that cannot be rendered is added.
    """
    paths: list[Path] = []
    pictures: dict[str | None, list[Row]] = {}
    for one, found in rendered:
        if isinstance(found, str):
            undrawn.append(_undrawn(one.drawing, one.task, found))
            continue
        stem = stems[one.drawing.name, one.task]
        for kind, data in found.items():
            paths.append(out / f"{stem}.{kind}")
            atomic_write(paths[-1], data)
        about = " ".join((inspect.getdoc(one.drawing.draw) or "").split())
        about = f"{about} {one.bars}".strip()
        said: dict[str, Any] = {"title": one.drawing.title, "about": about, "cells": one.cells}
        said |= {"image": base64.b64encode(found["png"]).decode(), "file": f"{stem}.png"}
        said |= {"others": [f"{stem}.{kind}" for kind in found if kind != "png"]}
        said |= {"wide": one.figure.get_size_inches()[0] > WIDTH}
        pictures.setdefault(one.task, []).append(said)
    return paths, pictures


def _section(manifest: Manifest, results: dict[str, Outcome], task: TaskRow) -> dict[str, Any]:
    """What the templates say of a task beside its figures."""
    ids = {v.label: [record.id for record in done(manifest, results, v.label, task.label)] for v in manifest.variants}
    return {"label": task.label, "ids": ids, "best": best(manifest, results, task)}


def _drawn(manifest: Manifest, results: dict[str, Outcome], undrawn: list[str]) -> Iterator[Drawn]:
    """Every figure that has something to show: those of each task, then those over all tasks. One that fails costs only
    itself. undrawn: what is told of such is added.
    """
    drawings, together = figures.items().values(), comparable(manifest)
    places: list[tuple[TaskRow | None, Drawing]] = [(t, one) for t in manifest.tasks for one in drawings]
    places = [(t, one) for t, one in places if not one.over_tasks] + [(None, one) for one in drawings if one.over_tasks]
    for task, drawing in places:
        label, tasks = (None, together) if task is None else (task.label, [task])
        mine = manifest.but(cells=[cell for cell in manifest.cells if label in (None, cell.task)])
        try:
            if (figure := drawing(mine, results, task)) is None:
                continue
            shown = _shown(mine, results, tasks, drawing.needs)
        except Exception as error:  # whatever a plug-in's function raises
            undrawn.append(_undrawn(drawing, label, typed_line(error)))
            continue
        yield Drawn(label, drawing, _cells(mine, shown, tasks), _bars(drawing, shown, tasks), figure)


def _undrawn(drawing: Drawing, task: str | None, why: str) -> str:
    return f"figure {drawing.name!r}{'' if task is None else f' of {task}'} could not be drawn: {why}"


def _shown(
    manifest: Manifest, results: dict[str, Outcome], tasks: list[TaskRow], needed: Callable[[Record], bool]
) -> dict[str, list[list[str]]]:
    """By variant and task, the ids of the cells that a figure shows; none of a variant that lacks one of the tasks."""
    found = {}
    for variant in manifest.variants:
        by_task = [done(manifest, results, variant.label, task.label) for task in tasks]
        shown = [[record.id for record in records if needed(record)] for records in by_task]
        found[variant.label] = shown if all(shown) else []
    return found


def _cells(manifest: Manifest, shown: dict[str, list[list[str]]], tasks: list[TaskRow]) -> str:
    """Which cells a figure shows, in words, and the name of the set."""
    labels = {task.label for task in tasks}
    planned = sum(cell.task in labels and bool(shown[cell.variant]) for cell in manifest.cells)
    names = [label for label, ids in shown.items() if ids]
    whose = "" if len(names) == len(shown) else f" of {', '.join(names)}"
    ids = [id for by_task in shown.values() for some in by_task for id in some]
    return f"{len(ids)} of {counted(planned, 'cell')}{whose} ({digest(ids)})"


def _bars(drawing: Drawing, shown: dict[str, list[list[str]]], tasks: list[TaskRow]) -> str:
    """What the caption says of a figure's bars."""
    return bars(min(map(len, by_task)) for by_task in shown.values() if by_task) if drawing.bars and tasks else ""


def _sources(manifest: Manifest, results: dict[str, Outcome], further: set[str]) -> dict[str, str]:
    """The finished cells that tables are made from, by what a table needs. further: the tasks with further tests."""
    finished = [
        (cell.task, record) for cell in manifest.cells if (record := results.get(cell.id)) and record.status == "done"
    ]
    together = {task.label for task in comparable(manifest)}
    trials = [trial for row in manifest.tuning for trial in row.trials if trial.value is not None]
    return {
        "all": named(record.id for _, record in finished),
        "aggregates": named(record.id for task, record in finished if task in together),
        "further_tests": named(record.id for task, record in finished if task in further),
        "exits": named(record.id for _, record in finished if record.exits),
        "execution": named(record.id for _, record in finished if record.execution),
        "tuning": named(trial.id for trial in trials),
    }
