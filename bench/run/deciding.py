"""Studies that decide: seeds are added look by look, to the variants that an open hypothesis needs.

What comes next follows from the results alone (``bench.run.standing``). So a study that was killed goes on where it
was, and several processes on one store add the same cells and reach the same decisions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from bench.run.standing import Key, Need, Standing, admitted, design, having, scores, stand, still_open
from bench.run.status import planned_flops
from bench.store.manifest import DecisionRow, Manifest
from bench.store.records import Outcome
from bench.store.store import Store
from bench.study.naming import base_of
from bench.study.plan import Plan
from bench.tables import counted

TRIES = 2  # of a look in one call: a result that turns out to be damaged is made again, once

RunPlan = Callable[[Plan], object]
"""Runs a plan's cells and stores its manifest."""


def decide(plan: Plan, run: RunPlan, store: Store, tell: Callable[[str], object]) -> Plan:
    """Run cells until every hypothesis is decided, the budget is spent, the last look is reached, or cells have failed.

    A look's cells that have failed are run again as in any study; the looks that still lack one wait, and the others go
    on.

    Args:
        plan: of all cells that the study may come to.
        run: called for every look with the cells it lacks and a manifest of all cells so far, and a last time without
            cells.
        store: where ``run`` leaves the results.
        tell: called with a line for every look, and for every hypothesis that stays open.

    Returns:
        The plan of the cells that the study has come to.
    """
    full = _declared(plan.manifest, store, tell)
    flops = planned_flops(plan.cells) if design(full).max_flops is not None else {}
    tries, asked, known = Counter[tuple[int, int]](), set[Key](), dict[str, Outcome]()
    while True:
        results = _results(full, store, known)
        standing = stand(full, results)
        done, failed = having(full, results, "done"), having(full, results, "failed")
        worth = [need for need in standing.needs if _worth(need, tries, done | failed)]
        now = admitted(design(full), standing.reached | asked, worth, flops)
        cells = {key for need in now for key in need.cells}
        so_far = _so_far(plan, full, standing, standing.reached | asked | cells)
        todo = cells - done - (failed & asked)
        if not now:
            break
        tries.update((need.index, need.look) for need in now)
        asked |= cells
        if todo:
            tell(_look(now, standing, todo))
            run(replace(so_far, cells=tuple(p for p in so_far.cells if (p.variant, p.task, p.cell.seed) in todo)))
    run(replace(so_far, cells=()))
    for each in still_open(so_far.manifest, results, standing, flops):
        lacks = f"{counted(len(each.cells), 'cell')} missing for its look at {each.look} pairs"
        about = f"about {each.further:.0f} further pairs expected"
        tell(f"{each.claim}: open at {each.pairs} pairs, {lacks}, {about}; {each.stop or 'run the same command again'}")
    return so_far


def _declared(manifest: Manifest, store: Store, tell: Callable[[str], object]) -> Manifest:
    """The manifest, which says so if the study declared something else when the first of its cells were run: under its
    own name, or, where it was not run under that yet, under that of another run of the same study.
    """
    own = store.manifest(manifest.study)
    names = [name for name in store.studies() if base_of(name) == base_of(manifest.study)]
    known = [own] if own is not None else [store.manifest(name) for name in names]
    row, ours = design(manifest), {cell.id for cell in manifest.cells}
    seen = [one for one in known if one and any(cell.id in ours and store.done(cell.id) for cell in one.cells)]
    if all(one.decide and not one.decide.changed and _promise(one) == _promise(manifest) for one in seen):
        return manifest
    tell(
        "decide: looks, alpha or hypotheses were others when the first of these cells were run: what alpha promises "
        "holds only for what was declared before"
    )
    return manifest.but(decide=row.but(changed=True))


def _promise(manifest: Manifest) -> object:
    """What must be declared before the first look."""
    row = design(manifest)
    return row.looks, row.shares, row.alpha, [entry.dump() for entry in manifest.hypotheses]


def _results(manifest: Manifest, store: Store, known: dict[str, Outcome]) -> Mapping[str, Outcome]:
    """The records of all cells that have one; finished ones are read once, and kept in ``known``."""
    found = scores(store, manifest, (cell.id for cell in manifest.cells if cell.id not in known))
    known |= {id: record for id, record in found.items() if record.status == "done"}
    return {**found, **known}


def _worth(need: Need, tries: Counter[tuple[int, int]], told: Collection[Key]) -> bool:
    """Whether a look may still come about: it was not tried, or a cell of it has left no record."""
    count = tries[need.index, need.look]
    return not count or (count < TRIES and not need.cells <= set(told))


def _so_far(plan: Plan, full: Manifest, standing: Standing, cells: Collection[Key]) -> Plan:
    """The plan cut down to some of its cells, with the decisions so far."""
    rows = [row for row in full.cells if (row.variant, row.task, row.seed) in cells]
    decisions = [
        DecisionRow(claim=entry.claim, verdict=found.verdict.verdict, pairs=found.pairs, open=found.open)
        for entry, found in zip(full.hypotheses, standing.decisions, strict=True)
    ]
    manifest = full.but(cells=rows, seeds=sorted({row.seed for row in rows}), decisions=decisions)
    kept = tuple(planned for planned in plan.cells if (planned.variant, planned.task, planned.cell.seed) in cells)
    return replace(plan, cells=kept, manifest=manifest)


def _look(now: list[Need], standing: Standing, todo: Collection[Key]) -> str:
    """What is run now, in words."""
    still, m = sum(decision.open for decision in standing.decisions), len(standing.decisions)
    labels = ", ".join(sorted({variant for variant, _, _ in todo}))
    return f"look at {now[0].look} pairs: {still} of {m} hypotheses open; {counted(len(todo), 'cell')} of {labels}"
