"""What a record says of a cell beside its configuration."""

from __future__ import annotations

from typing import Any

from bench.config import Cell
from bench.data.task import get_task
from bench.model.variant import get_variant
from bench.plugins import digests


def settings_of(cell: Cell) -> dict[str, dict[str, Any]]:
    """The options of a cell with those at their defaults. Raises UserError if its variant or task is not known."""
    variant, task = get_variant(cell.variant, cell.options), get_task(cell.task, cell.task_options)
    return {"options": variant.options.model_dump(mode="json"), "task_options": task.options.model_dump(mode="json")}


def code_of(cell: Cell) -> dict[str, str]:
    """Digests of the code, registered by hand, that the cell's numbers are of (``bench.plugins.digests``). A task's is
    not among them, since its data are compared.
    """
    named = {f"variant {cell.variant}", *(f"gate {value}" for value in cell.options.values())}
    return {what: it for what, it in digests().items() if what in named or what.startswith("exit rule ")}
