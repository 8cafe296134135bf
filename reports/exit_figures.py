"""The figures of exit rules and of the number of cycles at test time, for a task as those of ``reports.figures``."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from bench.stats import Interval, interval
from bench.store.manifest import Manifest, TaskRow
from bench.store.records import Outcome, Record, RuleRecord
from reports.figures import over_seeds
from reports.look import axis_name, by_groups, colour, fitting, legend, marker, multiples, orient, title, with_units
from reports.policy import ENDS, can_rank, heading
from reports.table import done, exits_of
from reports.units import gap_bounds, metric_name

BUDGET = 0.8  # share of the FLOPs at full depth that exit depths are shown for
ZERO_ATTENTION = "zero_attention"
BOUNDS = ("fixed", "random", "oracle", "oracle.loss")
# A colour for each kind of signal and a dash for each rule of the kind: eight colours are all that the colour-blind
# can tell apart.
LOOKS: dict[str, tuple[str, Any]] = {
    "zero_attention": ("#D55E00", "-"),
    "halting": ("#CC79A7", "-"),
    "confidence": ("#0072B2", "-"),
    "entropy": ("#0072B2", (0, (5, 1.5))),
    "patience": ("#0072B2", (0, (1, 1))),
    "kl": ("#56B4E9", "-"),
    "entropy_diff": ("#56B4E9", (0, (5, 1.5))),
    "latent_diff": ("#009E73", "-"),
    "latent_norm": ("#009E73", (0, (5, 1.5))),
    "latent_rms": ("#009E73", (0, (1, 1))),
    "cosine": ("#E69F00", "-"),
}
OTHER = ("#000000", (0, (5, 1.5)))  # a rule of another package
REST: dict[str, Any] = {"color": "#b0b0b0", "ls": "-", "lw": 0.6, "zorder": 1}
BOUND_LOOKS: dict[str, dict[str, Any]] = {
    "fixed": {"color": "#222222", "ls": "-", "lw": 0.8, "marker": "o", "ms": 3.5, "mfc": "white", "zorder": 4},
    "random": {"color": "#CC3311", "ls": (0, (5, 1.5)), "lw": 1.2, "zorder": 3},
    "oracle": {"color": "#777777", "ls": (0, (1, 1)), "lw": 1.2, "zorder": 2},
}


def exit_curves(manifest: Manifest, results: dict[str, Outcome], task: TaskRow) -> Figure | None:
    """The metric against executed FLOPs as the threshold moves, means over seeds. In colour: the study's exit rule, the
    rule that validation data choose for 80 % of the FLOPs (below the panel's name), and leaving at random; grey: all
    other rules.
    """
    panels = with_exits(manifest, results, task)
    if not panels:
        return None
    figure, grid, across = multiples(len(panels), 1.6, sharey=True)
    handles: dict[str, Line2D] = {}
    oracle = "oracle" if task.metric == "accuracy" else "oracle.loss"
    for axes, (label, records) in zip(grid, panels, strict=True):
        best = _chosen(records, task)
        plain, own = _plain_rules(records), manifest.exit_rule
        aggregated = [own] if own and own not in plain and all(own in exits_of(r).rules for r in records) else []
        for key in [*plain, *aggregated]:
            points = _mean_curve(records, key, task.metric)
            if key in (best, manifest.exit_rule):
                shade, dash = LOOKS.get(key, OTHER)
                handles[key] = axes.plot(*points, color=shade, ls=dash, lw=1.4, zorder=3)[0]
            else:
                handles["other rules"] = axes.plot(*points, **REST)[0]
        fixed = [[(p.flops_per_token, p.score(task.metric)) for p in exits_of(r).points] for r in records]
        handles["fixed cycles"] = axes.plot(*np.mean(fixed, 0).T, **BOUND_LOOKS["fixed"])[0]
        for name, key in (("random", "random"), ("oracle", oracle)):
            line = axes.plot(*_mean_curve(records, key, task.metric), **BOUND_LOOKS[name])[0]
            handles["oracle (bound)" if name == "oracle" else name] = line
        chosen = f"\n(chosen: {best})" if best else ""
        axes.set_title(fitting(label, figure, across) + chosen, fontsize=7.5)
        with_units(axes, 3 if across > 1 else 4)
    orient(grid[0], task)
    for axes in grid[-across:]:
        axes.set_xlabel("executed FLOPs/token")
    figure.supylabel(f"test {axis_name(task)}", fontsize=8)
    figure.suptitle(title(manifest, results, task))
    order = sorted(handles, key=lambda name: list(LOOKS).index(name) if name in LOOKS else len(LOOKS))
    legend(figure, [handles[name] for name in order], order, handlelength=2.6)
    return figure


def exit_area(manifest: Manifest, results: dict[str, Outcome], task: TaskRow) -> Figure | None:
    """What each rule is worth: the area between its curve and that of leaving at random, over the FLOPs."""
    unit = metric_name(task.metric)
    better = "" if task.higher_is_better else " saved"
    label = f"{unit}{better} against random at equal FLOPs (mean over FLOPs"
    return _dots(manifest, results, task, lambda rule: rule.area, label, gap_bounds(task.metric))


def exit_signal(manifest: Manifest, results: dict[str, Outcome], task: TaskRow) -> Figure | None:
    """Whether a signal knows that more cycles will help: its rank correlation with what they bring."""
    label = "rank correlation of the signal to stay with the loss saved (mean"
    return _dots(manifest, results, task, mean_rank, label, (-1.0, 1.0))


def exit_depth(manifest: Manifest, results: dict[str, Outcome], task: TaskRow) -> Figure | None:
    """Share of test sequences that leave after each cycle, at thresholds tuned on validation data for a budget."""
    panels = []
    for label, records in with_exits(manifest, results, task):
        shares = {}
        for key in _plain_rules(records):
            tuned = [t.share for r in records for t in exits_of(r).rules[key].tuned if t.budget == BUDGET]
            if len(tuned) == len(records):
                shares[key] = np.mean(tuned, 0)
        if shares:
            panels.append((label, shares))
    if not panels:
        return None
    names = sorted({key for _, shares in panels for key in shares}, key=_place, reverse=True)
    figure, grid, across = multiples(len(panels), max(0.4 + 0.115 * len(names), 0.9), sharex=True, sharey=True)
    most = max(len(share) for _, shares in panels for share in shares.values())
    palette = sns.color_palette("cividis", most)
    for axes, (label, shares) in zip(grid, panels, strict=True):
        at = [number for number, name in enumerate(names) if name in shares]
        left = np.zeros(len(at))
        for cycle in range(len(next(iter(shares.values())))):
            width = np.array([shares[names[number]][cycle] for number in at])
            axes.barh(at, width, left=left, color=palette[cycle], height=0.75)
            left += width
        axes.set(xlim=(0, 1), ylim=(-0.6, len(names) - 0.4))
        axes.set_yticks(range(len(names)), names, fontsize=6.5)
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.set_title(fitting(label, figure, across), fontsize=7.5)
        axes.grid(False)
    for axes in grid[-across:]:
        axes.set_xlabel("share of sequences")
    handles = [Line2D([], [], ls="", marker="s", ms=7, color=shade) for shade in palette]
    legend(figure, handles, [str(n) for n in range(1, most + 1)], title="leaves after cycle")
    figure.suptitle(f"{title(manifest, results, task)},\nat most {BUDGET:.0%} of the FLOPs")
    return figure


def exit_calibration(manifest: Manifest, results: dict[str, Outcome], task: TaskRow) -> Figure | None:
    """How often the model is right where it is so confident: tenths of the sequences at all exit points. Means over
    seeds; thin: the seeds.
    """
    found: dict[int, list[NDArray[np.float64]]] = {}
    measured = dict(with_exits(manifest, results, task))
    for index, variant in enumerate(manifest.variants):
        rules = [rule for record in measured.get(variant.label, []) for rule in exits_of(record).rules.values()]
        bins = [rule.calibration for rule in rules if rule.calibration]
        if bins:
            found[index] = [np.array([one.signal, one.accuracy], dtype=float) for one in bins]
    if not found:
        return None
    figure, panels = by_groups(manifest, 2.5, list(found))
    everything = np.concatenate([seed.ravel() for seeds in found.values() for seed in seeds])
    room = 0.05 * float(np.ptp(everything)) or 0.05
    limits = float(everything.min()) - room, float(everything.max()) + room
    for panel in panels:
        [axes] = panel.axes
        axes.plot([0, 1], [0, 1], ls=(0, (1, 1)), color="#777777", lw=1.2)
        for index in (index for index in panel.group if index in found):
            shade, seeds = colour(manifest, index), found[index]
            for seed in seeds if len(seeds) > 1 else ():
                axes.plot(*seed, lw=0.4, alpha=0.35, color=shade)
            length = min(seed.shape[1] for seed in seeds)  # fewer than ten where many signals are equal
            mean = np.mean([seed[:, :length] for seed in seeds], 0)
            look: dict[str, Any] = {"color": shade, "marker": marker(manifest, index), "ms": 3.5, "lw": 1.2}
            axes.plot(*mean, label=manifest.variants[index].label, alpha=0.9, **look)
        axes.set(xlim=limits, ylim=limits, aspect="equal", xlabel="confidence (mean top-1 probability)")
        panel.name()
    figure.supylabel("accuracy at the exit point (dotted: calibrated)", fontsize=8)
    figure.suptitle(title(manifest, results, task))
    return figure


def cycles_at_test(manifest: Manifest, results: dict[str, Outcome], task: TaskRow) -> Figure | None:
    """The metric when the trained model is run for 1, 2, ... cycles, fewer and more than it was trained with. Means
    over seeds. Thin: the seeds, where they are too few for a band.
    """
    found = {}
    for index, variant in enumerate(manifest.variants):
        if records := [r for r in done(manifest, results, variant.label, task.label) if len(r.cycles) > 1]:
            found[index] = records
    if not found:
        return None
    figure, panels = by_groups(manifest, 2.1, list(found))
    for panel in panels:
        [axes] = panel.axes
        for index in (index for index in panel.group if index in found):
            records = found[index]
            length = min(len(record.cycles) for record in records)
            table = np.array([[point.score(task.metric) for point in r.cycles[:length]] for r in records])
            numbers = np.array([point.cycles for point in records[0].cycles[:length]])
            shade, mean = colour(manifest, index), table.mean(0)
            look: dict[str, Any] = {"color": shade, "marker": marker(manifest, index), "ms": 4, "lw": 1.2}
            axes.plot(numbers, mean, label=manifest.variants[index].label, **look)
            over_seeds(axes, numbers, table, {"color": shade}, task)
            at = numbers == records[0].cell.model["n_cycles"]
            axes.plot(numbers[at], mean[at], ls="", marker="o", ms=9, mfc="none", mec=shade, mew=1.2)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("cycles at test time")
        panel.name()
    orient(panels[0].axes[0], task)
    figure.supylabel(f"test {axis_name(task)}", fontsize=8)
    figure.suptitle(title(manifest, results, task))
    ring = Line2D([], [], ls="", marker="o", ms=9, mfc="none", mec="#444444")
    legend(figure, [ring], ["cycles it was trained with"])
    return figure


def _dots(
    manifest: Manifest,
    results: dict[str, Outcome],
    task: TaskRow,
    value: Callable[[RuleRecord], float | None],
    label: str,
    limits: tuple[float, float] | None,
) -> Figure | None:
    """A number of every rule, the variants side by side: from FEWEST_FOR_INTERVAL seeds on with its interval and the
    rule with the highest mean on top, below that the seeds as dots and the rules in a fixed order.

    label: of the axis, up to what the bars are; limits: the least and the greatest value there can be.
    """
    found: dict[str, dict[int, tuple[Interval, list[float]]]] = {}
    measured = dict(with_exits(manifest, results, task))
    for index, variant in enumerate(manifest.variants):
        records = measured.get(variant.label, [])
        for key in common_rules(records) if records else []:
            values = [value(exits_of(record).rules[key]) for record in records]
            known = [v for v in values if v is not None]
            if key not in BOUNDS and len(known) == len(values):
                found.setdefault(key, {})[index] = interval(known, limits), known
    if not found:
        return None
    shown = [over for row in found.values() for over, _ in row.values()]
    order = sorted(found, key=_place, reverse=True)
    if can_rank(*(over.n for over in shown)):
        order = sorted(found, key=lambda key: max(over.mean for over, _ in found[key].values()))
    figure, panels = by_groups(manifest, 0.5 + 0.16 * len(order), sorted({i for row in found.values() for i in row}))
    for panel in panels:
        [axes] = panel.axes
        used = [index for index in panel.group if any(index in row for row in found.values())]
        for place, index in enumerate(used):
            rows = [number for number, key in enumerate(order) if index in found[key]]
            mine = [found[order[number]][index] for number in rows]
            shift = 0.6 * ((place + 0.5) / len(used) - 0.5)
            _across(axes, [number - shift for number in rows], mine, manifest, index)
        axes.axvline(0, color="#444444", lw=0.9, zorder=1)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_yticks(range(len(order)), order)
        axes.set_ylim(-0.6, len(order) - 0.4)
        panel.name()
    marks = [x for row in found.values() for over, seeds in row.values() for x in (over.mean, *seeds)]
    marks += [end for over in shown if over.kind == "interval" for end in (over.low, over.high)]
    low, high = min(0.0, *marks), max(0.0, *marks)
    span = high - low or 1.0
    told = f"{label}, {ENDS})" if ENDS in heading(shown) else f"{label}; dots: seeds)"
    for panel in panels:
        panel.axes[0].set_xlim(low - 0.05 * span, high + 0.05 * span)
        panel.axes[0].set_xlabel(textwrap.fill(told.replace(" %", "\N{NO-BREAK SPACE}%"), 36))  # as wide as the axes
    figure.suptitle(title(manifest, results, task))
    return figure


def _across(
    axes: Axes, at: list[float], mine: list[tuple[Interval, list[float]]], manifest: Manifest, index: int
) -> None:
    """A variant's marks at these heights: with its interval, or its seeds as dots where they are too few for one."""
    shade = colour(manifest, index)
    sure = [over.kind == "interval" for over, _ in mine]
    wide = [[over.mean - over.low if ok else 0.0 for (over, _), ok in zip(mine, sure, strict=True)]]
    wide += [[over.high - over.mean if ok else 0.0 for (over, _), ok in zip(mine, sure, strict=True)]]
    few = [(x, height) for height, (over, seeds) in zip(at, mine, strict=True) for x in seeds if not can_rank(over.n)]
    if few:
        axes.scatter([x for x, _ in few], [height for _, height in few], s=5, color=shade, alpha=0.6, lw=0)
    look: dict[str, Any] = {"fmt": marker(manifest, index), "ms": 3, "elinewidth": 0.8, "capsize": 1.0, "color": shade}
    label = manifest.variants[index].label
    axes.errorbar([over.mean for over, _ in mine], at, xerr=wide if any(sure) else None, label=label, **look)


def with_exits(manifest: Manifest, results: dict[str, Outcome], task: TaskRow) -> list[tuple[str, list[Record]]]:
    """The variants with exit points and their records."""
    found = [(v.label, done(manifest, results, v.label, task.label)) for v in manifest.variants]
    with_exits = [(label, [record for record in records if record.exits]) for label, records in found]
    return [(label, records) for label, records in with_exits if records]


def common_rules(records: list[Record]) -> list[str]:
    """Rules that all the records have."""
    return [key for key in exits_of(records[0]).rules if all(key in exits_of(r).rules for r in records)]


def _plain_rules(records: list[Record]) -> list[str]:
    """Rules with their usual aggregate, in the order of their looks, without the bounds."""
    return sorted((key for key in common_rules(records) if key not in BOUNDS and "." not in key), key=_place)


def _chosen(records: list[Record], task: TaskRow) -> str | None:
    """The rule that is best on validation data at BUDGET of the FLOPs; None where none was tuned for it."""
    found = {}
    for key in _plain_rules(records):
        tuned = [t.valid for r in records for t in exits_of(r).rules[key].tuned if t.budget == BUDGET]
        if len(tuned) == len(records) and all(task.metric in scores for scores in tuned):
            found[key] = float(np.mean([scores[task.metric] for scores in tuned]))
    return (max if task.higher_is_better else min)(found, key=lambda key: found[key]) if found else None


def _place(key: str) -> tuple[int, str]:
    """A rule's place in an order that no result changes."""
    return list(LOOKS).index(key) if key in LOOKS else len(LOOKS), key


def _mean_curve(records: list[Record], key: str, metric: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """FLOPs per token and the seeds' mean metric there, over the FLOPs that all of their curves reach."""
    curves = [exits_of(record).rules[key].curve for record in records]
    low = max(curve["flops_per_token"][0] for curve in curves)
    high = min(curve["flops_per_token"][-1] for curve in curves)
    flops = np.linspace(low, high, 200)
    return flops, np.mean([np.interp(flops, curve["flops_per_token"], curve[metric]) for curve in curves], 0)


def mean_rank(rule: RuleRecord) -> float | None:
    """The mean rank correlation over the exit points that have one."""
    known = [value for value in rule.rank if value is not None]
    return sum(known) / len(known) if known else None
