"""Tables and figures of a sweep, from its stored result alone."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from bench.store.files import atomic_write
from bench.store.manifest import BudgetRow, SweepResult, TaskRow, ThresholdRow
from bench.tables import csv_text, markdown_code, markdown_image, markdown_text
from reports.exit_figures import LOOKS, OTHER, REST
from reports.figures import over_seeds
from reports.look import COLOURS, STYLE, WIDTH, axis_name, fitting, in_letters, legend, multiples, orient, with_units
from reports.policy import told_seeds
from reports.render import file_names, render
from reports.table import Row, named, ran_on
from reports.units import human, metric_name, plain

Search = ThresholdRow | BudgetRow

SHOWN = 0.8  # share of the FLOPs at full depth that the table shows where there is no limit of the user's own


def threshold_rows(result: SweepResult, every_budget: bool = False) -> list[Row]:
    """The thresholds tuned for a budget, a row for each rule; every_budget: for all of them."""
    rows = []
    for search in result.thresholds:
        for point in search.tuned:
            if not (every_budget or result.max_flops is not None or abs(point.share_of_full - SHOWN) < 0.01):
                continue
            name = search.metric
            rows.append(
                {
                    "task": search.task,
                    "variant": search.variant,
                    "rule": search.rule,
                    "FLOPs/token at most": f"{human(point.max_flops)} ({point.share_of_full:.0%})",
                    "thresholds, first seed": ", ".join(
                        "never" if v is None else f"{v:.3g}" for v in point.thresholds[0]
                    ),
                    "metric": metric_name(name),
                    "valid": plain(point.valid[name], 4),
                    "test": plain(point.test[name], 4),
                    "one exact threshold": plain(point.single[name], 4) if point.single else "-",
                    "FLOPs/token": human(point.test["flops_per_token"]),
                    "cycles": plain(point.test["mean_cycles"], 2),
                    "trials": str(search.trials),
                }
            )
    return rows


def budget_rows(result: SweepResult) -> list[Row]:
    """The trials on the front of every variant and task, and which was chosen within the limit."""
    rows = []
    for search in result.budgets:
        for point in search.front:
            name = search.metric
            chosen = search.chosen is not None and search.chosen.trial == point.trial
            rows.append(
                {
                    "task": search.task,
                    "variant": search.variant,
                    "trial": f"{point.trial}{' (chosen)' if chosen else ''}",
                    "setting": ", ".join(f"{key}={_number(value)}" for key, value in point.params.items()),
                    "metric": metric_name(name),
                    "valid": plain(point.valid, 4),
                    "test": plain(point.test, 4),
                    "FLOPs/token": human(point.flops_per_token),
                    "training FLOPs": human(point.train_flops),
                    "trials": f"{search.trials} ({search.pruned} pruned, {search.failed} failed)",
                }
            )
    return rows


def findings(result: SweepResult) -> list[str]:
    """Plain sentences: which rule of every variant validation data choose at the shown budget, what a threshold for
    each exit point gives beside one for all, and which trial of every variant they choose; all numbers are of test
    data. A choice is no ranking: it rests on as few seeds as there are.
    """
    found, ways = [], {task.label: 1.0 if task.higher_is_better else -1.0 for task in result.tasks}
    groups: dict[tuple[str, str], list[ThresholdRow]] = {}
    for search in result.thresholds:
        groups.setdefault((search.task, search.variant), []).append(search)
    for (task, variant), searches in groups.items():
        name, way = searches[0].metric, ways[task]
        points = [(s.rule, point) for s in searches for point in s.tuned]
        shown = [pair for pair in points if abs(pair[1].share_of_full - SHOWN) < 0.01]
        shown = shown or [(s.rule, s.tuned[-1]) for s in searches if s.tuned]
        if result.max_flops is not None and (lost := [s.rule for s in searches if not s.tuned]):
            found.append(
                f"{task}, {variant}: no threshold of {', '.join(lost)} keeps within {human(result.max_flops)} "
                "FLOPs/token."
            )
        if shown:
            rule, point = max(shown, key=lambda pair: way * pair[1].valid[name])
            found.append(
                f"{task}, {variant}: at most {point.share_of_full:.0%} of the FLOPs at full depth, validation data "
                f"choose {rule} of {len(shown)} rule{'s' * (len(shown) != 1)}; its test {metric_name(name)} is "
                f"{point.test[name]:.4f} ({told_seeds([len(searches[0].cells)])})."
            )
        each = [point for search in searches if search.per_cycle for point in search.tuned]
        gains = [way * (point.test[name] - point.single[name]) for point in each if point.single]
        if gains:
            found.append(
                f"{task}, {variant}: a threshold for each exit point, found by trials, gives {np.mean(gains):+.4f} "
                f"test {metric_name(name)} (positive is better) beside one exact threshold for all, in the mean over "
                f"{len(gains)} rules and budgets; more in {sum(gain > 0 for gain in gains)} of them. (They keep the "
                f"budget in the mean over the cells, the one in each.)"
            )
    for trials in result.budgets:
        if chosen := trials.chosen:
            setting = ", ".join(f"{key}={_number(value)}" for key, value in chosen.params.items())
            limit = "" if result.max_flops is None else f" within {human(result.max_flops)} FLOPs/token"
            found.append(
                f"{trials.task}, {trials.variant}: of {trials.trials} trials{limit}, one seed each, validation data "
                f"choose {setting}; its test {metric_name(trials.metric)} is {chosen.test:.4f} at "
                f"{human(chosen.flops_per_token)} FLOPs/token."
            )
    return found


def write_sweep(result: SweepResult, out: Path, formats: tuple[str, ...] = ("png", "svg")) -> list[Path]:
    """Write the tables (CSV), for every task a figure, and what was found (``sweep.md``) into ``out``; their paths."""
    paths, pictures = [], []
    for name, rows in (("thresholds", threshold_rows(result, every_budget=True)), ("budgets", budget_rows(result))):
        if rows:
            paths.append(out / f"sweep_{name}.csv")
            atomic_write(paths[-1], csv_text(rows).encode())
    drawn = [(kind, task) for task in result.tasks for kind in FIGURES]
    stems = file_names([("sweep", kind, task.label) for kind, task in drawn])
    for (kind, task), stem in zip(drawn, stems, strict=True):
        with mpl.rc_context(STYLE):
            figure = FIGURES[kind](result, task)
            if figure is None:
                continue
            cells = named(_ids(search for search in _searches(result, kind) if search.task == task.label))
            for suffix, data in render(figure, cells, formats).items():
                paths.append(out / f"{stem}.{suffix}")
                atomic_write(paths[-1], data)
        pictures += [markdown_image(f"{kind} of {task.label}", f"{stem}.png"), "", f"From {cells}.", ""]
    told = [f"# Sweep of {result.study}", ""]
    told += [f"- changed: {markdown_text(change)}" for change in result.changed]
    told += [*(f"- {markdown_text(line)}" for line in findings(result)), "", *pictures, *_cell_lists(result)]
    told += [f"- {key}: {markdown_code(getattr(result, key))}" for key in ("command", "git")]
    told += [f"- Ran on {markdown_text(ran_on(place))}" for place in result.environment]
    paths.append(out / "sweep.md")
    atomic_write(paths[-1], "\n".join([*told, ""]).encode())
    return paths


def on_page(result: SweepResult) -> dict[str, Any]:
    """What the page of the study that a sweep is of shows of it."""
    shown = []
    for task in result.tasks:
        for kind, draw in FIGURES.items():
            with mpl.rc_context(STYLE):
                if (figure := draw(result, task)) is None:
                    continue
                cells = named(_ids(search for search in _searches(result, kind) if search.task == task.label))
                image = base64.b64encode(render(figure, cells, ("png",))["png"]).decode()
            [stem] = file_names([("sweep", kind, task.label)])
            one = {"title": f"{kind} of {task.label}", "about": " ".join((draw.__doc__ or "").split()), "cells": cells}
            wide = figure.get_size_inches()[0] > WIDTH
            shown.append({**one, "image": image, "file": f"{stem}.png", "others": [], "wide": wide})
    told: dict[str, Any] = {"name": result.study, "findings": findings(result), "figures": shown}
    told["cells"] = named(_ids([*result.thresholds, *result.budgets]))
    return {**told, "tables": [threshold_rows(result), budget_rows(result)]}


def _searches(result: SweepResult, kind: str) -> Sequence[Search]:
    """Its searches of a kind, ``thresholds`` or ``budgets``."""
    return result.thresholds if kind == "thresholds" else result.budgets


def _ids(searches: Iterable[Search]) -> set[str]:
    return {id for search in searches for id in search.cells}


def _cell_lists(result: SweepResult) -> list[str]:
    """The cells of each table, variant and task: of the thresholds those that the study trained, of the budgets the
    trials that were trained to their end.
    """
    lines = ["## Cells", "", "Sets are named by the sha256 of their sorted ids, one a line, cut to 12 digits.", ""]
    for kind in ("thresholds", "budgets"):
        for task, variant in dict.fromkeys((search.task, search.variant) for search in _searches(result, kind)):
            ids = _ids(s for s in _searches(result, kind) if (s.task, s.variant) == (task, variant))
            about = markdown_text(f"{kind}, {task}, {variant}")
            lines.append(f"- {about}: {named(ids)}: {', '.join(f'`{id}`' for id in sorted(ids))}")
    return [*lines, ""]


def threshold_figure(result: SweepResult, task: TaskRow) -> Figure | None:
    """Test metric against executed FLOPs of the thresholds tuned for every budget, a panel for each variant. In colour
    the rule that validation data choose at most budgets, with its interval, or its seeds where they are too few.
    """
    searches = [s for s in result.thresholds if s.task == task.label and s.tuned]
    if not searches:
        return None
    variants = list(dict.fromkeys(search.variant for search in searches))
    figure, panels, across = multiples(len(variants), 1.8, sharey=True)
    handles: dict[str, Any] = {}
    for axes, variant in zip(panels, variants, strict=True):
        mine = [search for search in searches if search.variant == variant]
        chosen = _most_chosen(mine, 1.0 if task.higher_is_better else -1.0)
        for search in mine:
            points = sorted(search.tuned, key=lambda point: point.test["flops_per_token"])
            at = [point.test["flops_per_token"] for point in points]
            line = at, [point.test[task.metric] for point in points]
            if search.rule != chosen:
                handles["other rules"] = axes.plot(*line, **REST)[0]
                continue
            shade, dash = LOOKS.get(search.rule, OTHER)
            values = np.array([point.test_by_seed for point in points]).T
            over_seeds(axes, at, values, {"color": shade, "ls": dash}, task)
            look: dict[str, Any] = {"color": shade, "ls": dash, "lw": 1.3, "marker": "o", "ms": 3}
            handles[search.rule] = axes.plot(*line, **look, zorder=3)[0]
        axes.set_title(fitting(in_letters(variant), figure, across) + f"\n({chosen})", fontsize=7.5)
        with_units(axes, 3)
    orient(panels[0], task)
    for axes in panels[-across:]:
        axes.set_xlabel("executed FLOPs/token")
    figure.suptitle(in_letters(task.label))
    figure.supylabel(f"test {axis_name(task)}", fontsize=8)
    order = sorted(handles, key=lambda name: name == "other rules")
    legend(figure, [handles[name] for name in order], order)
    return figure


def _most_chosen(searches: Sequence[ThresholdRow], way: float) -> str:
    """The rule that is the best on validation data at most budgets. way: -1 where lower is better."""
    wins: Counter[str] = Counter()
    for share in {point.share_of_full for search in searches for point in search.tuned}:
        at = [(p.valid[s.metric], s.rule) for s in searches for p in s.tuned if p.share_of_full == share]
        wins[max(at, key=lambda pair: way * pair[0])[1]] += 1
    return wins.most_common(1)[0][0]


def budget_figure(result: SweepResult, task: TaskRow) -> Figure | None:
    """Test metric against executed FLOPs of every variant's front of budget trials, a panel for each variant: the steps
    of what is to be had at each cost. Grey: the fronts of the others; dotted: the limit.
    """
    searches = [s for s in result.budgets if s.task == task.label and s.front]
    if not searches:
        return None
    figure, panels, across = multiples(len(searches), 1.8, sharey=True)
    for axes, own in zip(panels, searches, strict=True):
        for search in searches:
            points = sorted((point.flops_per_token, point.test) for point in search.front)
            look: dict[str, Any] = dict(REST)
            if search is own:
                look = {"color": COLOURS[0], "lw": 1.2, "marker": "o", "ms": 4, "zorder": 3}
            axes.step(*zip(*points, strict=True), where="post", **look)
        if result.max_flops is not None:
            axes.axvline(result.max_flops, ls=":", color="#444444", lw=1)
        axes.set_title(fitting(in_letters(own.variant), figure, across), fontsize=7.5)
        with_units(axes, 3)
        axes.margins(x=0.08)
        axes.set_xlim(left=0)  # trials of nearly the same cost are not torn apart
    orient(panels[0], task)
    for axes in panels[-across:]:
        axes.set_xlabel("executed FLOPs/token")
    figure.suptitle(f"{in_letters(task.label)}: chosen on validation data")
    figure.supylabel(f"test {axis_name(task)}", fontsize=8)
    return figure


FIGURES: dict[str, Callable[[SweepResult, TaskRow], Figure | None]] = {
    "thresholds": threshold_figure,
    "budgets": budget_figure,
}


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
