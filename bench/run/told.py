"""What is told of a run before it begins."""

from __future__ import annotations

from collections.abc import Iterator

from bench.config import FIRST_PILOT
from bench.store.manifest import Manifest
from bench.store.store import Store
from bench.study.load import said_since
from bench.study.naming import base_of
from bench.study.plan import Plan
from bench.study.schema import Study
from bench.tables import counted


def told(study: Study, plan: Plan, store: Store) -> Iterator[str]:
    """Lines about what the matching chose, what was changed, which seeds there are, and what there is to know of the
    data. store: with the manifest of the last run.
    """
    for entry in plan.manifest.variants:
        if entry.chosen:
            yield f"{entry.label}: matched in {entry.match}: {entry.chosen}"
    if study.changed:
        yield f"{study.name}: {base_of(study.name)} with {'; '.join(study.changed)}"
    yield from replaced(study, plan.manifest, store)
    if added := [str(seed) for seed in plan.manifest.seeds if seed not in study.seeds]:
        yield f"seeds {', '.join(added)}, which earlier commands have added, stay in the study"
    yield from plan.manifest.notes
    if seeds := [seed for seed in plan.manifest.seeds if seed >= FIRST_PILOT]:
        yield f"pilot: seeds from {FIRST_PILOT} on ({seeds[0]}{', ...' * (len(seeds) > 1)}) enter no verdict"


def replaced(study: Study, manifest: Manifest, store: Store) -> Iterator[str]:
    """A line if the last run under this name was of a study that said something else, since its report is replaced."""
    before = store.manifest(manifest.study)
    if before is None or not (changes := said_since(before.config, study)):
        return
    line = f"{manifest.study}: the study has changed since its last run, whose report is replaced: {'; '.join(changes)}"
    left = {cell.id for cell in before.cells} - {cell.id for cell in manifest.cells}
    if done := sum(map(store.done, left)):
        line += f"; {counted(done, 'finished cell')} of it stay, of no study (another name keeps both)"
    yield line
