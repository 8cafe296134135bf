"""What a study would run and what that would cost, before anything is run."""

from __future__ import annotations

from dataclasses import dataclass

from bench.run.runner import wanted
from bench.run.seeds import of_the_same_cells, with_earlier
from bench.run.status import planned_flops, status
from bench.run.told import replaced
from bench.store.store import Store
from bench.study.load import said_since
from bench.study.plan import make_plan, tuned_by
from bench.study.schema import Study


@dataclass(frozen=True)
class Part:
    """The cells of a variant on a task. failed: of themselves, so that they are not run again unless asked for; flops:
    training FLOPs of one of them, all cycles run.
    """

    variant: str
    task: str
    cells: int
    done: int
    failed: int
    flops: float

    @property
    def left(self) -> int:
        """Cells to be run."""
        return self.cells - self.done - self.failed


@dataclass(frozen=True)
class Ahead:
    """What lies ahead.

    seconds: with one cell at a time, at the speed of the study's cells that are done; None: none is. trials: cells of
    the tuning, which come before and are not among the parts; trial_flops: their training FLOPs; replaced: lines about
    a run of the same name that was another.
    """

    parts: list[Part]
    seconds: float | None
    trials: int
    trial_flops: float
    replaced: list[str]

    @property
    def flops(self) -> float:
        """Training FLOPs of all cells to be run."""
        return sum(part.left * part.flops for part in self.parts)


def ahead(study: Study, store: Store) -> Ahead:
    """Plan a study as ``run`` does, and run nothing. Of one that decides, with all seeds that it may come to.

    Raises:
        UserError: where ``run`` would.
    """
    before = store.manifest(study.name) if study.tune is not None else None
    chosen = before.tuning if before is not None and not said_since(before.config, study) else []
    plan = make_plan(with_earlier(study, store), "", None, tuned_by(study, chosen))
    plan = of_the_same_cells(plan, study.seeds, store)
    by_place: dict[tuple[str, str], list[str]] = {}
    for planned in plan.cells:
        by_place.setdefault((planned.variant, planned.task), []).append(planned.cell.id)
    unique = {planned.cell.id: planned for planned in plan.cells}
    finished, _, todo = wanted(unique, store, retry=False)
    open_ = {planned.cell.id for planned in todo}
    flops, parts = planned_flops(plan.cells), []
    for (variant, task), ids in by_place.items():
        done = sum(id in finished for id in ids)
        failed = len(ids) - done - sum(id in open_ for id in ids)
        parts.append(Part(variant, task, len(ids), done, failed, flops[variant, task]))
    speed = status(store, plan.manifest).flops_per_second if any(part.done for part in parts) else None
    left = sum(part.left * part.flops for part in parts)
    trials = study.tune.trials if study.tune is not None and not chosen else 0
    costs = trials * len(by_place), trials * sum(part.flops for part in parts)
    return Ahead(parts, left / speed if speed else None, *costs, list(replaced(study, plan.manifest, store)))
