"""Where a deciding study stands: which hypotheses are open, which cells they need, and what that costs.

All of it follows from the results alone, so that every process that looks at the same results says the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.evaluate.targets import rule_of
from bench.stats import Contrast, Decision, expected, replay
from bench.store.manifest import DecideRow, HypothesisRow, Manifest
from bench.store.records import Outcome
from bench.store.store import Store
from bench.study.contrasts import contrast_of, looks_of

Group = tuple[str, str]  # labels of a variant and a task
Key = tuple[str, str, int]  # a group and a seed: a place among the study's cells


@dataclass(frozen=True)
class Need:
    """The cells that a look consists of.

    index: of the hypothesis; the number of hypotheses stands for the first look, which all variants take part in on all
    tasks, so that the report shows them. look: its pairs.
    """

    index: int
    look: int
    cells: frozenset[Key]


@dataclass(frozen=True)
class Standing:
    """What the results say.

    Attributes:
        family: the contrasts of the study's hypotheses.
        decisions: on them.
        reached: the cells of the looks that were taken.
        needs: the looks that come next, the earliest first.
    """

    family: list[Contrast]
    decisions: list[Decision]
    reached: frozenset[Key]
    needs: list[Need]


def design(manifest: Manifest) -> DecideRow:
    """How the study decides. Its manifest must be one of a deciding study."""
    assert manifest.decide is not None
    return manifest.decide


def stand(manifest: Manifest, results: Mapping[str, Outcome]) -> Standing:
    """Take the looks that the results allow.

    Args:
        manifest: with the cells so far, or with all that the study may come to.
        results: records by cell id; cells without one may be left out.
    """
    looks, entries = looks_of(manifest), manifest.hypotheses
    assert looks is not None
    family = [contrast_of(manifest, results, entry) for entry in entries]
    decisions, reached, needs = replay(family, looks), set[Key](), list[Need]()
    for index, (entry, decision) in enumerate(zip(entries, decisions, strict=True)):
        reached |= cells_of(manifest, entry, decision.pairs)
        if decision.following is not None:
            needs.append(Need(index, decision.following, cells_of(manifest, entry, decision.following)))
    first = looks.earliest(max(1, len(entries))) or looks.pairs[0]
    everyone = Need(len(entries), first, cells_of(manifest, None, first))
    if everyone.cells <= having(manifest, results, "done"):
        reached |= everyone.cells
    else:
        needs.append(everyone)
    return Standing(family, decisions, frozenset(reached), sorted(needs, key=lambda need: (need.look, need.index)))


def cells_of(manifest: Manifest, entry: HypothesisRow | None, pairs: int) -> frozenset[Key]:
    """The cells of the first pairs of a hypothesis, None: of all variants on all tasks, with what they start from."""
    if entry is not None:
        labels, tasks = {entry.better, entry.than}, {measure.task for measure in entry.measures}
    else:
        labels, tasks = ({row.label for row in rows} for rows in (manifest.variants, manifest.tasks))
    starts = design(manifest).starts
    labels |= {starts[label] for label in labels if label in starts}
    return frozenset((label, task, seed) for label in labels for task in tasks for seed in range(pairs))


def having(manifest: Manifest, results: Mapping[str, Outcome], status: str) -> set[Key]:
    """The places of the cells whose record says so."""
    found = ((cell, results.get(cell.id)) for cell in manifest.cells)
    return {(c.variant, c.task, c.seed) for c, record in found if record is not None and record.status == status}


def fits(row: DecideRow, cells: Collection[Key], flops: Mapping[Group, float]) -> bool:
    """Whether a study of these cells keeps to its budget. flops: of a cell, as planned, where there is a limit."""
    if row.max_cells is not None and len(cells) > row.max_cells:
        return False
    return row.max_flops is None or flops_of(cells, flops) <= row.max_flops


def flops_of(cells: Iterable[Key], flops: Mapping[Group, float]) -> float:
    """Training FLOPs of cells; NaN if those of one are not known."""
    counts = Counter((variant, task) for variant, task, _ in cells)
    return sum(counts[group] * flops.get(group, math.nan) for group in sorted(counts))  # in the same order everywhere


def admitted(
    row: DecideRow, before: Collection[Key], needs: Iterable[Need], flops: Mapping[Group, float]
) -> list[Need]:
    """The looks to run cells for now: of those that the budget allows, taken in the order of ``needs``, the earliest.

    Args:
        row: how the study decides.
        before: the study's cells so far.
        needs: the looks that may come about.
        flops: of a cell, as planned.
    """
    total, found = set(before), list[Need]()
    for need in needs:
        if found and need.look > found[0].look:
            break
        if fits(row, total | need.cells, flops):
            total |= need.cells
            found.append(need)
    return found


@dataclass(frozen=True)
class Open:
    """What an open hypothesis needs.

    Attributes:
        claim: the hypothesis.
        pairs: of the last look.
        look: pairs of the next one.
        cells: those of it that are not done.
        further: pairs expected until it is decided or the last look is reached.
        assumed: ``further`` rests on an assumption, since there are no two pairs yet: equal variants whose differences
            have the standard deviation of the bounds.
        stop: why it does not go on, in words; empty: it does.
    """

    claim: str
    pairs: int
    look: int
    cells: frozenset[Key]
    further: float
    assumed: bool
    stop: str


def still_open(
    manifest: Manifest, results: Mapping[str, Outcome], standing: Standing, flops: Mapping[Group, float]
) -> list[Open]:
    """The open hypotheses, in the study's order.

    Args:
        manifest: with the cells so far.
        results: their records by cell id.
        standing: what they say.
        flops: of a cell, as planned, where there is a limit.
    """
    done, found = having(manifest, results, "done"), []
    failed = {
        (c.variant, c.task, c.seed): f"{c.name} has failed: {record.reason}"
        for c in manifest.cells
        if (record := results.get(c.id)) is not None and record.status == "failed"
    }
    row, looks = design(manifest), looks_of(manifest)
    assert looks is not None
    hypotheses = [need for need in standing.needs if need.index < len(standing.decisions)]
    for need in sorted(hypotheses, key=lambda need: need.index):
        contrast, decision = standing.family[need.index], standing.decisions[need.index]
        gone = [failed[key] for key in sorted(need.cells & failed.keys(), key=lambda key: (key[2], key))]
        stop = ""
        if gone:
            more = f" ({len(gone)} cells in all)" if len(gone) > 1 else ""
            stop = f"{gone[0]}{more}; the look waits until that cell is done (--retry failed)"
        elif not fits(row, standing.reached | need.cells, flops):
            limits = {"decide.max_flops": row.max_flops, "decide.max_cells": row.max_cells}
            told = " and ".join(f"{name} = {limit:g}" for name, limit in limits.items() if limit is not None)
            stop = f"the budget is spent ({told})"
        further, assumed = decision.further, False
        if contrast.within is not None and sum(contrast.differences[:2] == contrast.differences[:2]) < 2:
            assumed = True
            further = expected(contrast, looks, len(standing.decisions), 0.0, contrast.within).pairs
        entry = manifest.hypotheses[need.index]
        found.append(Open(entry.claim, decision.pairs, need.look, need.cells - done, further, assumed, stop))
    return found


def flops_to_end(
    manifest: Manifest, results: Mapping[str, Outcome], opened: Iterable[Open], flops: Mapping[Group, float]
) -> float:
    """Training FLOPs expected until all open hypotheses that go on are decided or at their last look; NaN if not known.

    Args:
        manifest: with the cells so far.
        results: their records by cell id.
        opened: the open hypotheses.
        flops: of a cell.
    """
    entries = {entry.claim: entry for entry in manifest.hypotheses}
    seeds: dict[Group, float] = {}
    have = Counter((variant, task) for variant, task, _ in having(manifest, results, "done"))
    for each in opened:
        groups = {key[:2] for key in cells_of(manifest, entries[each.claim], 1)}
        pairs = min(have[group] for group in groups)
        for group in groups:
            seeds[group] = max(seeds.get(group, 0.0), pairs + each.further)
    return sum(max(0.0, n - have[group]) * flops.get(group, math.nan) for group, n in seeds.items())


def scores(store: Store, manifest: Manifest, ids: Iterable[str]) -> dict[str, Outcome]:
    """The records of those cells that have one, with no more than what the study's hypotheses are judged by: most of a
    file is about exits.
    """
    asks = any(rule_of(measure.metric) for entry in manifest.hypotheses for measure in entry.measures)
    found = {id: store.record(id, _with_exits if asks else _judged) for id in ids}
    return {id: record for id, record in found.items() if record is not None}


def _judged(value: dict[str, Any]) -> dict[str, Any]:
    return {**_with_exits(value), "exits": None}


def _with_exits(value: dict[str, Any]) -> dict[str, Any]:
    return {**value, "slices": {}, "cycles": [], "zero_attention": None}
