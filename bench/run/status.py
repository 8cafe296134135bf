"""Where a study stands: which cells are done, run, have failed or wait, and what is left to compute."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bench.config import CELL_SOURCE
from bench.errors import UserError
from bench.run import lease
from bench.store.manifest import SWEPT, TUNING, Manifest
from bench.store.records import Failure, Record
from bench.store.store import Store
from bench.study.naming import base_of
from bench.study.schema import Study

if TYPE_CHECKING:
    from bench.study.plan import Planned

Group = tuple[str, str]  # labels of a variant and a task


@dataclass
class Status:
    """Of the cells of a manifest.

    Attributes:
        running: what their leases say, with ``name``.
        failed: their names and records.
        other_mode: of those that are done, the ones that were computed in another mode than they would be now.
        left_flops: of the cells that are not done, what is left of them, None if it cannot be known here.
        flops: training FLOPs of a cell by variant and task, as measured or else as planned; those that are not known
            here are left out.
        flops_per_second: of one cell, as measured on those that are done, None if none is.
    """

    done: int = 0
    waiting: int = 0
    running: list[dict[str, Any]] = field(default_factory=list)
    failed: list[tuple[str, Failure]] = field(default_factory=list)
    other_mode: int = 0
    left_flops: float | None = 0.0
    flops: dict[Group, float] = field(default_factory=dict)
    flops_per_second: float | None = None

    @property
    def left_seconds(self) -> float | None:
        """Until the last cell ends, if as many processes as now (at least one) go on at the speed seen so far."""
        return self.seconds(self.left_flops)

    def seconds(self, flops: float | None) -> float | None:
        """How long so many training FLOPs take; None if that is not known."""
        if flops is None or self.flops_per_second is None:
            return None
        processes = {(cell["owner"]["machine"], cell["owner"]["pid"]) for cell in self.running}
        return flops / self.flops_per_second / max(1, len(processes))


def status(store: Store, manifest: Manifest) -> Status:
    """Read the store; nobody is asked, and nothing is changed but that damaged files are set aside."""
    other_mode = set(store.former.other_mode)
    found, shares, records = Status(), list[tuple[Group, float]](), dict[Group, Record]()
    for cell in manifest.cells:
        group, folder = (cell.variant, cell.task), store.folder(cell.id)
        done = store.sound(cell.id)
        if done and group not in records:  # one of each is looked at, for what it cost
            record = store.record(cell.id)
            done = record is not None and record.status == "done"
            if record is not None and record.status == "done":
                records[group] = record
        if done:
            found.done += 1
            found.other_mode += store.current(cell.id) in other_mode
            continue
        held, share = lease.read_lease(folder), 1.0
        if held is not None:
            found.running.append({"name": cell.name, **held})
            share -= held.get("step", 0) / held.get("steps", 1)
        elif (record := store.record(cell.id)) is not None and record.status == "failed":
            found.failed.append((cell.name, record))
        else:
            found.waiting += 1
        shares.append((group, share))
    flops = {group: record.costs.train_flops for group, record in records.items()}
    if any(group not in flops for group, _ in shares):
        flops = {**planned_of(manifest), **flops}
    found.flops = flops
    known = all(group in flops for group, _ in shares)
    found.left_flops = sum(share * flops[group] for group, share in shares) if known else None
    seconds = sum(record.timing.train_seconds for record in records.values())
    found.flops_per_second = sum(flops[group] for group in records) / seconds if seconds else None
    return found


def planned_of(manifest: Manifest) -> dict[Group, float]:
    """``planned_flops`` of a manifest's study, planned again; empty if its data cannot be made here."""
    from bench.study.plan import make_plan  # start-up

    try:
        return planned_flops(make_plan(Study.model_validate(manifest.config), "", None).cells)
    except (UserError, ValueError, OSError):
        return {}


def planned_flops(cells: Iterable[Planned]) -> dict[Group, float]:
    """Training FLOPs of a cell at full cycles, by variant and task."""
    from bench.data.task import task_data  # start-up
    from bench.model.costs import meta_model  # start-up
    from bench.model.freezing import freeze  # start-up
    from bench.model.variant import get_variant  # start-up
    from bench.study.start import sizes_of  # start-up
    from bench.train.depths import mean_step_flops  # start-up

    cells = list(cells)
    sources = {planned.cell.id: planned.cell.init for planned in cells}
    found: dict[Group, float] = {}
    for planned in cells:
        group, cell = (planned.variant, planned.task), planned.cell
        if group not in found:
            data, variant = task_data(cell.task, cell.task_options), get_variant(cell.variant, cell.options)
            init = cell.init
            if init is not None and init.source.startswith(CELL_SOURCE):
                init = sources.get(init.source.removeprefix(CELL_SOURCE))
            vocab, _ = sizes_of(None if init is None else init.source, data)
            lm = meta_model(variant, cell.model, vocab, data.length)
            freeze(lm, cell.train.trained)
            found[group] = cell.train.steps * cell.train.batch_size * mean_step_flops(lm, cell.train, data.length)
    return found


def runs_of(store: Store, name: str) -> list[Manifest]:
    """The other runs of a study that the store holds: as it is written, and with whatever ``--set`` has changed."""
    names = [each for each in store.studies() if base_of(each) == base_of(name) and each != name]
    names = [each for each in names if not each.endswith((TUNING, SWEPT))]
    return [manifest for each in names if (manifest := store.manifest(each)) is not None]


def run_in_words(manifest: Manifest) -> str:
    """What a run is called, and what was changed for it."""
    return f"{manifest.study} ({'; '.join(manifest.changed) or 'as written'})"
