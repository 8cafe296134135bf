"""The bench's figures as tables, Markdown and a plot, from what it measured alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from bench.store.files import atomic_write
from bench.tables import markdown, markdown_code, markdown_text
from reports.look import COLOURS, DASHES, MARKERS, STYLE, WIDTH
from reports.render import render
from reports.units import human

Row = dict[str, Any]
LINE = 0.17  # inches of a panel for each row that is compared


def shown(row: Row) -> dict[str, str]:
    """A row as it is read; a median has its quartiles beside it."""
    found = {}
    for key, value in row.items():
        if key.endswith(("_low", "_high")):
            continue
        name = key.replace("_", " ")
        if f"{key}_low" in row:
            low, high = (_text(key, row[f"{key}_{end}"]) for end in ("low", "high"))
            found[f"{name} [quartiles]"] = f"{_text(key, value)} [{low}, {high}]"
        else:
            found[name] = _text(key, value)
    return found


def _text(key: str, value: Any) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if key.endswith("error"):
        return f"{value:.1e}"
    if key.endswith("share"):
        return f"{value:.1%}"
    if key.endswith("per_second"):
        return human(value)
    if key.endswith("seconds"):
        return f"{1000 * value:.3g} ms" if value < 1 else f"{value:,.2f} s" if value < 100 else f"{value:,.0f} s"
    return f"{value:.3f}"


def table(section: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The columns of a section and its rows; a dash where a row has nothing to say."""
    rows = [shown(row) for row in section["rows"]]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return columns, [[row.get(name, "-") for name in columns] for row in rows]


def write_performance(result: dict[str, Any], out: Path) -> list[Path]:
    """Write ``performance.json``, ``performance.md`` and, where a section is drawn, ``performance.png`` into ``out``;
    their paths.

    result: ``command``, ``rounds``, ``environment`` and ``sections``, each with ``title``, ``seconds`` and ``rows``.
    """
    drawn = figure(result)
    before = ["![ratios, packing, scaling](performance.png)", ""] if drawn else []
    paths = write_tables(result, out, "performance", before)
    if drawn is not None:
        with mpl.rc_context(STYLE):
            atomic_write(out / "performance.png", render(drawn, result["command"], ("png",))["png"])
        paths.append(out / "performance.png")
    return paths


def write_tables(result: dict[str, Any], out: Path, stem: str, before: Sequence[str] = ()) -> list[Path]:
    """Write ``STEM.json`` and ``STEM.md`` into ``out``; their paths.

    Args:
        result: as of ``write_performance``, and if need be ``title``, rows of ``goals``, and a ``state`` of a section.
        out: folder.
        stem: of the files' names.
        before: lines above the command.
    """
    paths = [out / f"{stem}.json", out / f"{stem}.md"]
    atomic_write(paths[1], _markdown(result, before).encode())  # whatever stands in the JSON stands here, too
    atomic_write(paths[0], (json.dumps(result, indent=1) + "\n").encode())
    return paths


def _markdown(result: dict[str, Any], before: Sequence[str]) -> str:
    lines = [f"# {result.get('title', 'Performance')}", ""]
    lines += [
        "What is compared took turns in one process, every other round in the opposite order; medians, with quartiles "
        "of the ratios of each round in brackets.",
        "",
        *before,
        f"{markdown_code(result['command'])}, {result['rounds']} rounds; "
        + ", ".join(f"{key} {markdown_text(value)}" for key, value in result["environment"].items()),
    ]
    if "goals" in result:
        lines += ["", *markdown(*table({"rows": result["goals"]}))]
    for name, section in result["sections"].items():
        columns, rows = table(section)
        told = f" ({section['state']})" if section.get("state", "done") != "done" else ""
        lines += ["", f"## {name}", "", f"{section['title'][:1].upper()}{section['title'][1:]}{told}."]
        lines += ["", *markdown(columns, rows)] if rows else []
    return "\n".join([*lines, ""])


def figure(result: dict[str, Any]) -> Figure | None:
    """A panel for each section that was measured and has one, two side by side, as wide as two columns of text."""
    sections = {name: section["rows"] for name, section in result["sections"].items() if name in PANELS}
    panels = {name: [row for row in rows if "note" not in row] for name, rows in sections.items()}
    if not panels:
        return None
    sizes = [_lines(name, rows) for name, rows in panels.items()]
    heights = [max(1.6, 0.6 + LINE * max(sizes[place : place + 2])) for place in range(0, len(sizes), 2)]
    with mpl.rc_context(STYLE):
        found = Figure(figsize=(2 * WIDTH, sum(heights)), layout="constrained")
        grid = found.subplots(len(heights), min(2, len(panels)), squeeze=False, height_ratios=heights)
        for axes in grid.flat[len(panels) :]:
            axes.remove()
        for axes, (name, rows) in zip(grid.flat, panels.items(), strict=False):
            PANELS[name](axes, rows)
    return found


def _lines(name: str, rows: Sequence[Row]) -> int:
    return 8 if name in ("packing", "scaling") else len(rows)


def _bars(
    axes: Axes,
    rows: Sequence[Row],
    label: Callable[[Row], str],
    title: str,
    key: str = "ratio",
    level: float | None = 1,
) -> None:
    """A median and its quartiles a line, the first at the top, against a level that means no difference."""
    if level is not None:
        axes.axvline(level, color="#555555", lw=1, ls=":", zorder=1)
    for place, row in enumerate(rows):
        middle = row[key]
        ends = [[middle - row.get(f"{key}_low", middle)], [row.get(f"{key}_high", middle) - middle]]
        axes.errorbar([middle], [place], xerr=ends, fmt="o", ms=3.5, lw=1.2, capsize=2, color=COLOURS[0])
    axes.set_yticks(range(len(rows)), [label(row) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_title(title)


def _curves(axes: Axes, rows: Sequence[Row], by: str, x: str, relative: bool) -> None:
    """A line with quartiles for each value of ``by``, over ``x`` on a scale of doublings."""
    axes.axhline(1, color="#555555", lw=1, ls=":", zorder=1)
    ticks = set()
    for number, name in enumerate(dict.fromkeys(row[by] for row in rows)):
        mine = [row for row in rows if row[by] == name]
        at = [row[x] / (mine[0][x] if relative else 1) for row in mine]
        middle = [row["ratio"] for row in mine]
        ends = [[row["ratio"] - row["ratio_low"] for row in mine], [row["ratio_high"] - row["ratio"] for row in mine]]
        shade, mark = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        look: dict[str, Any] = {"color": shade, "marker": mark, "ms": 3.5, "lw": 1, "capsize": 2}
        look["ls"] = DASHES[number % len(DASHES)]
        axes.errorbar(at, middle, yerr=ends, label=name, **look)
        ticks |= set(at)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.legend(frameon=False, loc="best", fontsize=6.5, labelspacing=0.3).set_in_layout(False)


def _training(axes: Axes, rows: Sequence[Row]) -> None:
    compared = [row for row in rows if "ratio" in row]
    short = {"transformers GPT-2": "GPT-2", "transformers Llama": "Llama", "transformers' Trainer": "Trainer"}

    def label(row: Row) -> str:
        mode = "" if row["mode"] == "loop" else f", {row['mode']}"
        family = " (llama)" if row["family"] == "llama" and "Llama" not in row["model"] else ""
        return f"{short.get(row['model'], row['model'])}{family}, d {row['d_model']}{mode}"

    _bars(axes, compared, label, "training: ours over others, tokens/s")
    axes.set_xlabel("ratio (right of 1: ours is faster)")


def _additions(axes: Axes, rows: Sequence[Row]) -> None:
    names = {"attention": "attention gate", "none": "no gate"}
    _bars(axes, rows, lambda row: f"{names[row['gating']]}, d {row['d_model']}", "training step: ZTT over HTC")
    axes.set_xlabel("time ratio (above 1: it costs time)")


def _packing(axes: Axes, rows: Sequence[Row]) -> None:
    _curves(axes, rows, "model", "seeds", relative=False)
    axes.set(title="seeds in one stack over one by one", xlabel="seeds", ylabel="time ratio")
    axes.set_ylim(bottom=0)


def _thresholds(axes: Axes, rows: Sequence[Row]) -> None:
    _bars(axes, rows, lambda row: f"{row['way']}, d {row['d_model']}", "judging thresholds")
    axes.set_xlabel("time over that of the evaluation")


def _exit_row(row: Row) -> str:
    many = f", {row['batch']} sequences" if row["batch"] > 1 else ""
    return f"{row['policy']}, d {row['d_model']}{many}"


def _exits(axes: Axes, rows: Sequence[Row]) -> None:
    _bars(axes, rows, _exit_row, "exits: time saved over predicted")
    axes.set_xlabel("ratio (1: all of it)")


def _scaling(axes: Axes, rows: Sequence[Row]) -> None:
    _curves(axes, rows, "parameter", "value", relative=True)
    axes.set(title="step time over its FLOPs", xlabel="times the first value", ylabel="relative to the first")
    axes.set_ylim(bottom=0)


def _startup(axes: Axes, rows: Sequence[Row]) -> None:
    _bars(axes, rows, lambda row: row["what"], "start-up in a fresh process", "seconds", None)
    axes.set(xlabel="seconds")
    axes.set_xlim(left=0)


PANELS: dict[str, Callable[[Axes, Sequence[Row]], None]] = {
    "training": _training,
    "additions": _additions,
    "packing": _packing,
    "thresholds": _thresholds,
    "exits": _exits,
    "scaling": _scaling,
    "startup": _startup,
}
