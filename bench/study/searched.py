"""What a study's searches set: tuning nothing that an entry sets itself, and no search what there is not."""

from __future__ import annotations

from collections.abc import Sequence

from bench.config import CELL_SOURCE
from bench.errors import shown, unknown
from bench.model.variant import variants
from bench.study.entries import TaskEntry, VariantEntry
from bench.study.sweep import Sweep


def check_searches(
    tuned: bool, sweep: Sweep | None, tasks: Sequence[TaskEntry], entries: Sequence[VariantEntry]
) -> None:
    """Raises ValueError for a value beside what tuning sets, and for a range of an option that no variant has. A search
    of budgets says itself what takes the place of its entries' own values.

    tuned: whether the study tunes, hence sets ``train.lr`` and what its variants declare (``Variant.tunable``).
    """
    if tuned:
        _check_tuned(tasks, entries)
    if sweep is not None and sweep.budgets is not None:
        _check_budgets(list(sweep.budgets.ranges), entries)


def _check_tuned(tasks: Sequence[TaskEntry], entries: Sequence[VariantEntry]) -> None:
    given = [
        (f"{field}.{one.label}.train.lr", one.train["lr"])
        for field, some in (("tasks", tasks), ("variants", entries))
        for one in some
        if "lr" in one.train
    ]
    for entry in entries:
        names = variants.get(entry.name).tunable if entry.options else ()  # without need no variant is imported
        given += [
            (f"variants.{entry.label}.options.{name}", entry.options[name]) for name in names if name in entry.options
        ]
    if given:
        key, value = given[0]
        raise ValueError(f"{key} = {shown(value)} cannot be set beside tune, which searches it (allowed: one of both)")


def held(entry: VariantEntry, init: str | None) -> str:
    """What keeps an entry out of a search of shapes and trainings, since it holds at one of them; '' if nothing does.

    init: what the entry's models start from, None: random weights.
    """
    given: dict[str, str | None] = {"match": entry.match, "budget": entry.budget}
    if init is not None and init.startswith(CELL_SOURCE):
        given["init"] = init
    return "; ".join(f"{field} = {value!r}" for field, value in given.items() if value is not None)


def _check_budgets(keys: Sequence[str], entries: Sequence[VariantEntry]) -> None:
    asked = [key for key in keys if key.startswith("options.")]
    kinds = [variants.get(entry.name) for entry in entries] if asked else []
    known = {f"options.{name}" for kind in kinds for name in kind.Options.model_fields}
    for key in asked:
        if key not in known:
            raise ValueError(str(unknown("key of sweep.budgets.ranges:", key, known)))
