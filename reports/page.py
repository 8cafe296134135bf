"""The report's files: figures, tables, and the self-contained page."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
from jinja2 import Environment, PackageLoader, StrictUndefined

from bench.store import atomic_write
from reports.aggregates import aggregates, fronts
from reports.execution import executions
from reports.figures import DPI, FIGURES, STYLE
from reports.table import Manifest, Record, columns, costs, csv_of_cells, csv_of_slices, summary
from reports.tuning import tuning
from reports.units import metric_name
from reports.verdicts import differences, verdicts


def write(manifest: Manifest, results: dict[str, Record], out: Path) -> list[Path]:
    """Write every figure (PNG, SVG), ``results.csv``, ``report.md``, ``report.html`` and, where tests are sliced,
    ``slices.csv`` into ``out``; their paths.

    results: the records by cell id; a cell of the manifest that has none is shown as missing.
    """
    paths, sections = [], []
    for task in manifest["tasks"]:
        figures = []
        ids = [cell["id"] for cell in manifest["cells"] if cell["task"] == task["label"]]
        have = [id for id in ids if results.get(id, {}).get("status") == "done"]
        for name, (draw, title) in FIGURES.items():
            with mpl.rc_context(STYLE):
                figure = draw(manifest, results, task)
                if figure is None:
                    continue
                files = {kind: _render(figure, kind) for kind in ("png", "svg")}
            for kind, data in files.items():
                paths.append(out / f"{name}_{_file_name(task['label'])}.{kind}")
                atomic_write(paths[-1], data)
            image = base64.b64encode(files["png"]).decode()
            figures.append({"title": title, "image": image, "cells": f"{len(have)} of {len(ids)} cells", "ids": have})
        sections.append({**task, "figures": figures, "best": best(manifest, results, task)})
    texts = {"results.csv": csv_of_cells(manifest, results)}
    if slices := csv_of_slices(manifest, results):
        texts["slices.csv"] = slices
    context = {
        "manifest": manifest,
        "sections": sections,
        "summary": [columns(row) for row in summary(manifest, results)],
        "verdicts": verdicts(manifest, results),
        "differences": differences(manifest, results),
        "fronts": fronts(manifest, results),
        "aggregates": aggregates(manifest, results),
        "tuning": tuning(manifest),
        "costs": costs(manifest, results),
        "executions": executions(manifest, results),
        "environment": _environments(results),
        "failures": [r for r in results.values() if r["status"] == "failed"],
    }
    environment = Environment(
        loader=PackageLoader("reports", "templates"),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    texts["report.html"] = environment.get_template("report.html").render(context)
    environment.autoescape = False
    texts["report.md"] = environment.get_template("report.md").render(context)
    for name, text in texts.items():
        paths.append(out / name)
        atomic_write(paths[-1], text.encode())
    return paths


def best(manifest: Manifest, results: dict[str, Record], task: dict[str, Any]) -> str:
    """One plain sentence: which mean is best, over how many seeds."""
    rows = [row for row in summary(manifest, results) if row["task"] == task["label"] and row["done"]]
    if not rows:
        return "No cell of this task is done."
    top = (max if task["higher_is_better"] else min)(rows, key=lambda row: row["mean"])
    word = "highest" if task["higher_is_better"] else "lowest"
    levels = "".join(f"; {name} is {level:.3f}" for name, level in task["levels"].items())
    n = f"{top['done']} seed{'s' if top['done'] > 1 else ''}"
    return f"The {word} mean test {metric_name(task['metric'])} is {top['mean']:.3f} ({top['variant']}, {n}){levels}."


def _render(figure: Any, kind: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=DPI, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return buffer.getvalue()


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
