"""One page of what published studies have found: every claim with its verdict, its interval and its seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path

from bench.errors import UserError
from bench.store.manifest import Manifest
from bench.store.published import STUDY, PublishedStudy, read_published
from bench.tables import counted, markdown, markdown_image, markdown_text
from reports.references import beside_others
from reports.units import human

ENOUGH = 8  # pairs of seeds that a verdict should rest on
DECIDED = ("supported", "refuted", "equivalent")
AGAIN = "-again"  # ends the name of a study at its preset ``again``: what it left open, on other seeds
SHOWN = (
    "hypothesis",
    "verdict",
    "task",
    "metric",
    "gain",
    "pairs",
)  # columns, and that of the interval before the last


def page(folder: Path, pictures: str = "") -> str:
    """The page, in Markdown, from the published studies in a folder. Raises UserError for one that cannot be read, and
    for a folder that is none.

    pictures: where the folder is for who reads the page, to show the plots of accuracy against FLOPs; empty: no plots.
    """
    if not folder.is_dir():
        raise UserError(f"--published: {str(folder)!r} is no folder (allowed: one that `report --publish` writes to)")
    found = {path.parent.name: read_published(path.parent) for path in sorted(folder.glob(f"*/{STUDY}"))}
    older = sorted(path.parent.name for path in folder.glob("*/report.md") if path.parent.name not in found)
    lines = ["# Findings", "", *summary(found.values()), ""]
    tries, found_by_name = second_tries(found.values()), {one.manifest.study: one for one in found.values()}
    for name, study in found.items():
        lines += _study(name, study)
        if again := [other for other, first in tries.items() if first == study.manifest.study]:
            left = [row["hypothesis"] for row in study.verdicts if row["verdict"] not in DECIDED]
            taken = sum(row["hypothesis"] in left for other in again for row in found_by_name[other].verdicts)
            lines += [
                f"Of {len(left)} inconclusive here {taken} had a second try on other seeds: {markdown_text(again[0])}.",
                "",
            ]
        for plot in _plots(folder / name, study.manifest) if pictures else ():
            lines += [markdown_image(f"{name}: {plot.stem}", f"{pictures}/{name}/{plot.name}"), ""]
    lines += beside_others(folder)
    if older:
        lines += [
            "## Published by an earlier version",
            "",
            "To be run again; what they have found is in their reports:",
        ]
        lines += ["", *(f"- {markdown_text(name)}" for name in older), ""]
    return "\n".join(lines)


def second_tries(found: Collection[PublishedStudy]) -> dict[str, str]:
    """By the name of a study that is a second try: that of the first, with which it has no seed in common."""
    seeds = {study.manifest.study: set(study.manifest.seeds) for study in found}
    firsts = {name: name.removesuffix(AGAIN) for name in seeds if name.endswith(AGAIN)}
    return {name: first for name, first in firsts.items() if first in seeds and not seeds[name] & seeds[first]}


def claims(found: Collection[PublishedStudy]) -> tuple[list[dict[str, str]], int, int]:
    """The verdict that counts on each claim, its own or that of its second try if it was inconclusive; how many claims
    had a second try, and how many that has decided.
    """
    tries = second_tries(found)
    rows: dict[tuple[str, str], dict[str, str]] = {}
    again = settled = 0
    for study in sorted(found, key=lambda study: study.manifest.study in tries):
        name = study.manifest.study
        for row in study.verdicts:
            before = (tries.get(name, name), row["hypothesis"])
            if name in tries and before in rows and rows[before]["verdict"] not in DECIDED:
                again, settled = again + 1, settled + (row["verdict"] in DECIDED)
                rows[before] = row
            else:
                rows[name, row["hypothesis"]] = row
    return list(rows.values()), again, settled


def _plots(folder: Path, manifest: Manifest) -> list[Path]:
    """The published plots of the study's tasks: those of a task that it no longer has may lie there too."""
    from reports.render import file_names  # start-up: it draws

    stems = file_names([("accuracy_vs_flops", task.label) for task in manifest.tasks])
    return [plot for stem in sorted(stems) if (plot := folder / f"{stem}.png").is_file()]


def summary(found: Collection[PublishedStudy]) -> list[str]:
    """The first lines of the page, which the README has too."""
    rows, again, settled = claims(found)
    if not rows:
        return ["No study has been published with this version yet."]
    counts = Counter(row["verdict"] for row in rows)
    decided = sum(counts[verdict] for verdict in DECIDED)
    few = sum(int(row["pairs"].split("/")[0]) < ENOUGH for row in rows)
    changed = [study.manifest.study for study in found if study.manifest.decide and study.manifest.decide.changed]
    sizes = [study.params for study in found if study.params[1]]
    flops = [study.train_flops[1] for study in found]
    tries = second_tries(found)
    claiming = len({tries.get(name, name) for name in (study.manifest.study for study in found if study.verdicts)})
    told = ", ".join(f"{number} {verdict}" for verdict, number in counts.most_common())
    second = f" {again}, inconclusive at first, had a second try on other seeds, which decided {settled}: "
    second += "two tries err up to twice as often."
    lines = [
        f"{counted(len(rows), 'hypothesis', 'hypotheses')} of {counted(claiming, 'study', 'studies')}: {told}. "
        f"Decided: {decided}; on fewer than {ENOUGH} pairs of seeds: {few}.{second if again else ''}",
        "",
    ]
    if changed:
        names = markdown_text(", ".join(changed))
        lines += [f"Of {names} the looks, alpha or hypotheses were changed after the first cells were run.", ""]
    if added := [study.manifest.study for study in found if study.manifest.verdicts_at]:
        lines += [f"Of {markdown_text(', '.join(added))} seeds were added after verdicts were given.", ""]
    if not sizes:
        return lines
    return [
        *lines,
        f"They hold at the scale they were measured at: models of {human(min(size[0] for size in sizes))} to "
        f"{human(max(size[1] for size in sizes))} parameters, each trained with at most {human(max(flops))} FLOPs. "
        "What larger models and longer trainings do was not tested.",
    ]


def _study(name: str, study: PublishedStudy) -> list[str]:
    manifest = study.manifest
    lines = [f"## {markdown_text(name)}", "", markdown_text(manifest.question), ""]
    if study.verdicts:
        ends = next((key for key in study.verdicts[0] if "interval" in key or "range" in key), None)
        columns = [*SHOWN[:-1], *([ends] if ends else []), SHOWN[-1]]
        lines += [*markdown(columns, ([row.get(key, "-") for key in columns] for row in study.verdicts)), ""]
    else:
        lines += ["It declares no hypothesis.", ""]
    sizes = " to ".join(dict.fromkeys(map(human, study.params)))
    seeds, cells = counted(len(manifest.seeds), "seed"), counted(len(study.cells), "cell")
    lines += [
        f"Models of {sizes} parameters, {seeds}, {cells}; `{manifest.command}`, revision "
        f"{(manifest.git or 'not known')[:12]}. Anyone can run cells again: "
        f"`cyclebench verify --published {name} --sample 2`.",
        "",
    ]
    return lines
