"""Seeds are added to a study: those that an earlier command has run stay in it, whatever the next one asks for."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from bench.store.store import Store
from bench.study.plan import Plan
from bench.study.schema import Study


def with_earlier(study: Study, store: Store) -> Study:
    """The study with the seeds of its last run beside its own; one that decides has those of its looks. Pilots and
    others are never in one run.
    """
    before = store.manifest(study.name)
    if before is None or study.decides or before.pilot != study.pilot:
        return study
    own = {*study.seeds, *((study.tune.seed,) if study.tune is not None else ())}
    earlier = [seed for seed in before.seeds if seed not in own]
    return study.model_copy(update={"seeds": tuple(sorted([*study.seeds, *earlier]))}) if earlier else study


def of_the_same_cells(plan: Plan, asked: Collection[int], store: Store) -> Plan:
    """The plan without the earlier seeds whose cells are others by now: the study, or its data, has been changed.

    Args:
        plan: of ``with_earlier``.
        asked: the seeds of the command: no cells of others are run.
        store: with the manifest of the last run.
    """
    before = store.manifest(plan.manifest.study)
    if before is None or set(plan.study.seeds) == set(asked):
        return plan
    known = {(row.variant, row.task, row.seed): row.id for row in before.cells}
    rows = plan.manifest.cells
    changed = {row.seed for row in rows if known.get((row.variant, row.task, row.seed)) != row.id} - set(asked)
    seeds = [seed for seed in plan.study.seeds if seed not in changed]
    manifest = plan.manifest.but(
        seeds=seeds,
        cells=[row for row in rows if row.seed not in changed],
        config={**plan.manifest.config, "seeds": seeds},
    )
    return replace(plan, cells=tuple(p for p in plan.cells if p.cell.seed in asked), manifest=manifest)


def after_verdicts(plan: Plan, store: Store) -> Plan:
    """The plan whose manifest says with how many seeds verdicts on its hypotheses were given before seeds were added.

    Seeds that are added by what others showed, and tested with those, make wrong verdicts likelier than is said.
    store: with the manifest of the last run.
    """
    before, now = store.manifest(plan.manifest.study), plan.manifest
    if before is None or now.decide is not None or before.pilot or not now.hypotheses:
        return plan
    known, ours = {row.id for row in before.cells}, {row.id for row in now.cells}
    if not any(claim in now.hypotheses for claim in before.hypotheses) or not known <= ours:  # of another study
        return plan
    more = not {row.seed for row in now.cells} <= {row.seed for row in before.cells}  # no mere variant or task
    undone = {id for id in known if not store.done(id)}
    given = [len(before.seeds)] if more and undone == store.failures(undone).keys() else []
    seen = [*before.verdicts_at, *given]
    return replace(plan, manifest=now.but(verdicts_at=seen)) if seen else plan
