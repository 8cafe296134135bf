"""The registry of the report's figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import matplotlib as mpl
from matplotlib.figure import Figure

from bench.errors import UserError, shown
from bench.registry import Registry
from bench.store.manifest import Manifest, TaskRow
from bench.store.records import Outcome, Record
from reports.look import STYLE, in_letters
from reports.render import without_glyph_warnings

Draw = TypeVar("Draw", bound=Callable[..., Figure | None])
Needs = Callable[[Record], bool]


class Drawing:
    """A figure that the report draws: of every task, or of all tasks together.

    What its function's docstring says stands below it on the page.
    """

    name: str  # set when it is registered

    def __init__(
        self, draw: Callable[..., Figure | None], title: str, over_tasks: bool, needs: Needs, bars: bool
    ) -> None:
        """See ``register``."""
        self.draw, self.title, self.over_tasks, self.needs, self.bars = draw, title, over_tasks, needs, bars
        self.__doc__, self.__module__, self.__qualname__ = draw.__doc__, draw.__module__, draw.__qualname__

    def __call__(self, manifest: Manifest, results: dict[str, Outcome], task: TaskRow | None = None) -> Figure | None:
        """The figure in the suite's style; None if it has nothing to show.

        task: its row of the manifest. Raises TypeError if what it draws is no figure.
        """
        manifest, of = _in_letters(manifest), () if task is None else (task.but(label=in_letters(task.label)),)
        with mpl.rc_context(STYLE), without_glyph_warnings():
            found = self.draw(manifest, results) if self.over_tasks else self.draw(manifest, results, *of)
        if not isinstance(found, Figure | None):
            raise TypeError(f"it returns {shown(found)}, which is no matplotlib Figure, and not None")
        return found


def _in_letters(manifest: Manifest) -> Manifest:
    """A manifest whose labels are drawn as they are."""
    labels = [*(row.label for row in manifest.variants), *(row.label for row in manifest.tasks)]
    if all(in_letters(label) == label for label in labels):
        return manifest
    return manifest.but(
        reference=manifest.reference and in_letters(manifest.reference),
        variants=[row.but(label=in_letters(row.label)) for row in manifest.variants],
        tasks=[row.but(label=in_letters(row.label)) for row in manifest.tasks],
        cells=[row.but(variant=in_letters(row.variant), task=in_letters(row.task)) for row in manifest.cells],
        hypotheses=[
            row.but(
                **{key: in_letters(getattr(row, key)) for key in ("better", "than", "task")},
                measures=[measure.but(task=in_letters(measure.task)) for measure in row.measures],
            )
            for row in manifest.hypotheses
        ],
    )


figures: Registry[Drawing] = Registry("figure", "cyclebench.figures", "reports.builtin")


def register(
    name: str, title: str, over_tasks: bool = False, needs: Needs = lambda record: True, bars: bool = False
) -> Callable[[Draw], Draw]:
    """Decorator: make a function a figure of every report.

    Args:
        name: of its files and for ``Results.figure``.
        title: above it on the page.
        over_tasks: whether it is called once with the manifest and the records, or for each task with the task's row of
            the manifest as well.
        needs: whether a finished cell's record is shown in it: the page tells which cells it was made from.

    Raises:
        UserError: if the name is taken or none, or the title is empty.
    """

    def add(draw: Draw) -> Draw:
        if not title.strip():
            raise UserError(f"figure {name!r}: title = {title!r} (allowed: a text)")
        figures.register(name)(Drawing(draw, title, over_tasks, needs, bars))
        return draw

    return add
