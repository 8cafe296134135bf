"""The report's files: figures, tables, and the self-contained page."""

from __future__ import annotations

import base64
import inspect
from collections.abc import Iterator
from itertools import tee
from pathlib import Path
from typing import Any

import matplotlib as mpl
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from bench.store import atomic_write
from reports.aggregates import aggregates, fronts
from reports.execution import executions
from reports.exit_figures import findings, rule_rows
from reports.figures import FIGURES
from reports.latex import latex
from reports.look import STYLE
from reports.render import KINDS, rendering
from reports.table import Manifest, Record, columns, costs, csv_of_cells, csv_of_slices, done, summary
from reports.tuning import tuning
from reports.units import metric_name
from reports.verdicts import differences, verdicts

MANY = 500  # cells: from here on, figures are rendered in processes of their own, while the tables are made
NEEDS = {"zero": "zero_attention", "exit": "exits"}  # what a record must have to be in a figure, by its first word


def write(manifest: Manifest, results: dict[str, Record], out: Path, published: bool = False) -> list[Path]:
    """Write every figure (PNG, SVG, PDF), ``results.csv``, ``report.md``, ``report.html``, ``report.tex`` and, where
    tests are sliced, ``slices.csv`` into ``out``; their paths.

    results: the records by cell id; a cell of the manifest that has none is shown as missing. published: only what a
    repository shows: PNG, Markdown and CSV.
    """
    drawn, named = tee(_drawn(manifest, results))
    kinds = ("png",) if published else KINDS
    with rendering((figure for *_, figure in drawn), kinds, len(manifest["cells"]) >= MANY) as files:
        context: dict[str, Any] = {
            "manifest": manifest,
            "summary": [columns(row) for row in summary(manifest, results)],
            "verdicts": verdicts(manifest, results),
            "differences": differences(manifest, results),
            "fronts": fronts(manifest, results),
            "aggregates": aggregates(manifest, results),
            "tuning": tuning(manifest),
            "costs": costs(manifest, results),
            "rules": rule_rows(manifest, results),
            "exit_findings": findings(manifest, results),
            "executions": executions(manifest, results),
            "environment": _environments(results),
            "failures": [r for r in results.values() if r["status"] == "failed"],
        }
        rendered = [(task, name, found) for (task, name, _), found in zip(named, files, strict=True)]
    paths, context["sections"] = _sections(manifest, results, rendered, out)
    texts = {"results.csv": csv_of_cells(manifest, results)}
    if slices := csv_of_slices(manifest, results):
        texts["slices.csv"] = slices
    environment = Environment(
        loader=PackageLoader("reports", "templates"),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    if not published:
        texts["report.html"] = environment.get_template("report.html").render(context)
        texts["report.tex"] = latex(context)
    environment.autoescape = False
    texts["report.md"] = environment.get_template("report.md").render(context)
    for name, text in texts.items():
        paths.append(out / name)
        atomic_write(paths[-1], text.encode())
    return paths


def best(manifest: Manifest, results: dict[str, Record], task: dict[str, Any]) -> str:
    """One plain sentence: which mean is best, over how many seeds."""
    rows = [row for row in summary({**manifest, "tasks": [task]}, results) if row["done"]]
    if not rows:
        return "No cell of this task is done."
    top = (max if task["higher_is_better"] else min)(rows, key=lambda row: row["mean"])
    word = "highest" if task["higher_is_better"] else "lowest"
    levels = "".join(f"; {name} is {level:.3f}" for name, level in task["levels"].items())
    n = f"{top['done']} seed{'s' if top['done'] > 1 else ''}"
    return f"The {word} mean test {metric_name(task['metric'])} is {top['mean']:.3f} ({top['variant']}, {n}){levels}."


def _sections(
    manifest: Manifest,
    results: dict[str, Record],
    rendered: list[tuple[str, str, dict[str, bytes]]],
    out: Path,
) -> tuple[list[Path], list[dict[str, Any]]]:
    """Write the figures' files; their paths, and what the templates say of each task."""
    paths, sections = [], []
    for task in manifest["tasks"]:
        figures = []
        for name, found in ((name, found) for label, name, found in rendered if label == task["label"]):
            draw, title = FIGURES[name]
            for kind, data in found.items():
                paths.append(out / f"{name}_{_file_name(task['label'])}.{kind}")
                atomic_write(paths[-1], data)
            figures.append(
                {
                    "title": title,
                    "about": " ".join((inspect.getdoc(draw) or "").split()),
                    "image": base64.b64encode(found["png"]).decode(),
                    "file": f"{name}_{_file_name(task['label'])}.png",
                    "cells": _cells(manifest, results, task, NEEDS.get(name.split("_")[0])),
                }
            )
        ids = {
            v["label"]: [record["id"] for record in done(manifest, results, v["label"], task["label"])]
            for v in manifest["variants"]
        }
        sections.append({**task, "figures": figures, "ids": ids, "best": best(manifest, results, task)})
    return paths, sections


def _drawn(manifest: Manifest, results: dict[str, Record]) -> Iterator[tuple[str, str, Figure]]:
    """Task, name and figure of every figure that has something to show."""
    for task in manifest["tasks"]:
        mine = {**manifest, "cells": [cell for cell in manifest["cells"] if cell["task"] == task["label"]]}
        for name, (draw, _) in FIGURES.items():
            with mpl.rc_context(STYLE):
                figure = draw(mine, results, task)
            if figure is not None:
                yield task["label"], name, figure


def _cells(manifest: Manifest, results: dict[str, Record], task: dict[str, Any], needed: str | None) -> str:
    """Which cells a figure shows, in words."""
    found = {}
    for variant in manifest["variants"]:
        records = done(manifest, results, variant["label"], task["label"])
        found[variant["label"]] = [record for record in records if not needed or record[needed]]
    planned = sum(cell["task"] == task["label"] and bool(found[cell["variant"]]) for cell in manifest["cells"])
    names = [label for label, records in found.items() if records]
    whose = "" if len(names) == len(found) else f" of {', '.join(names)}"
    return f"{sum(map(len, found.values()))} of {planned} cells{whose}"


def _environments(results: dict[str, Record]) -> list[dict[str, Any]]:
    """The different environments the cells ran in."""
    found: list[dict[str, Any]] = []
    for record in results.values():
        if record["environment"] not in found:
            found.append(record["environment"])
    return found


def _file_name(label: str) -> str:
    """A label as part of a file's name."""
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in label)
