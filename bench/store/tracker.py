"""What shows the store's results beside the report: a window that can be filled again from the store at any time."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, Protocol

from bench.errors import UserError, typed_line
from bench.registry import Registry
from bench.store.manifest import CellRow, Manifest, SearchRow
from bench.store.records import Outcome
from bench.store.store import Store

Key = tuple[str, str]
"""A cell and its attempt ('' for its result), or a search and the digest of what it has found."""


HOOKS = {"study", "opened", "entry", "dropped", "log", "search", "tell", "finish"}  # what a tracker may do of its own


class Placed(Protocol):
    """A cell's place in its study: labels."""

    @property
    def variant(self) -> str: ...

    @property
    def task(self) -> str: ...


@dataclass(frozen=True)
class Findings:
    """What a study has found, for the first page of a tracker.

    Attributes:
        sentences: a verdict each, in Markdown, as is the table.
        table: its lines.
        metrics: means over seeds and counts of cells, by names such as ``accuracy/TASK/VARIANT``.
    """

    sentences: tuple[str, ...] = ()
    table: tuple[str, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)


def _harmless(hook: Callable[..., None]) -> Callable[..., None]:
    @wraps(hook)
    def call(self: Tracker, *arguments: Any) -> None:
        if self.broken and hook.__name__ not in ("study", "finish"):
            return
        try:
            hook(self, *arguments)
        except UserError:
            raise
        except Exception as error:
            self.broken = True
            where = "results are kept in the store, and a later command adds them"
            print(f"warning: tracker {self.name!r} has failed, {where}: {typed_line(error)}", file=sys.stderr)

    return call


class Tracker:
    """A window on the store. Subclass it and decorate it with ``@register("name")``.

    ``study``, ``log``, ``search``, ``tell`` and ``finish`` are for subclasses; so are ``opened``, ``entry`` and
    ``dropped``, for those that show cells while they run. The suite calls ``begin``, ``add``,
    ``add_search``, ``catch_up`` and ``complete``.

    Attributes:
        known: what it holds of the study.
        broken: whether its server has failed, after which it is silent.
        hung: whether the server has not even answered: then this command does not ask again.
        emptied: whether all that it held is gone.
        trusting: whether what it says of itself is enough; else every run is looked at.
        filled, there: cells that were missing, and were not, whenever it was filled from the store.
    """

    name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        """What a subclass's hook raises is told once, and the tracker is silent from then on."""
        super().__init_subclass__()
        for hook in HOOKS & vars(cls).keys():
            setattr(cls, hook, _harmless(vars(cls)[hook]))

    def __init__(self, uri: str, store: Store) -> None:
        """uri: what ``--tracking-uri`` says; nothing is contacted before a study begins."""
        self.uri, self.store = uri, store
        self.known: set[Key] = set()
        self.broken = self.hung = self.emptied = False
        self.trusting = True
        self.filled = self.there = 0
        self.manifest: Manifest | None = None  # of the study that it is at

    @classmethod
    def shown_by(cls, uri: str) -> str:
        """What a user opens, or types, to look at it."""
        return uri

    def study(self, manifest: Manifest) -> None:
        """A study begins or goes on."""

    def opened(self, id: str, place: Placed, seed: int, started: float) -> None:
        """A cell begins here. started: seconds since 1970, as its record will tell."""

    def entry(self, id: str, entry: dict[str, float]) -> None:
        """A cell that was opened has another entry of its history; one that goes on has those of before again."""

    def dropped(self, id: str) -> None:
        """A cell that may have been opened has stopped without a record."""

    def log(self, record: Outcome, place: Placed) -> None:
        """A cell has a record."""

    def search(self, row: SearchRow) -> None:
        """A search of a sweep has ended."""

    def tell(self, found: Findings) -> None:
        """The study's command ends: what the study has found so far. Comes before ``finish``."""

    def finish(self, paths: Sequence[Path]) -> None:
        """The study's command has ended. paths: of its report's files."""

    def begin(self, manifest: Manifest) -> None:
        """A study begins or goes on."""
        if self.manifest is None or self.manifest.study != manifest.study:
            self.known = set()
        self.manifest = manifest
        self.study(manifest)

    def add(self, record: Outcome, place: Placed) -> None:
        """A cell has a new record."""
        self.log(record, place)
        if not self.broken:
            self.known.add((record.id, "" if record.status == "done" else str(record.at)))

    def add_search(self, row: SearchRow) -> None:
        """A search has ended."""
        self.search(row)
        if not self.broken:
            self.known.add((row.study, digest_of(row)))

    def holding(self, manifest: Manifest) -> dict[Key, CellRow | SearchRow]:
        """What the store holds of a study: its cells that have a record, its searches. Results are not read."""
        found: dict[Key, CellRow | SearchRow] = {}
        for cell in manifest.cells:
            if self.store.done(cell.id):
                found[cell.id, ""] = cell
            elif (record := self.store.record(cell.id)) is not None and record.status == "failed":
                found[cell.id, str(record.at)] = cell
        return {**found, **{(row.study, digest_of(row)): row for row in self.store.searches(manifest.study)}}

    def catch_up(self, manifest: Manifest) -> None:
        """Log what the store holds of a study and this does not, whoever has run it; nothing else is read."""
        self.fill(self.holding(manifest))

    def fill(self, holding: dict[Key, CellRow | SearchRow]) -> None:
        """Log what is not known of what the store holds."""
        for key, row in holding.items():
            if self.broken:
                return
            if key in self.known:
                self.there += isinstance(row, CellRow)
            elif not isinstance(row, CellRow):
                self.add_search(row)
            elif (record := self.store.record(row.id)) is not None:
                self.add(record, row)
                self.filled += 1

    def complete(self, manifest: Manifest, paths: Sequence[Path] = (), found: Findings | None = None) -> None:
        """A command ends: from here on all that the store holds of the study is held here, too.

        With the study go its tuning and its sweep; all other studies of the store, if what was held of them is gone. A
        server that has failed meanwhile is asked once more.

        Args:
            manifest: of the study.
            paths: of the files of its report.
            found: what it has found, if that is known.
        """
        failed, self.broken = self.broken, self.hung
        if failed and not self.broken:
            self.manifest = None
        self._show(manifest, paths, found)
        for name in self.store.studies() if self.emptied else self.store.parts(manifest.study):
            if name != manifest.study and (other := self.store.manifest(name)) is not None:
                self._show(other, (), None)
        if failed and not self.broken:
            print(f"{self.name} at {self.uri} answers again and holds what the store holds", file=sys.stderr)

    def _show(self, manifest: Manifest, paths: Sequence[Path], found: Findings | None) -> None:
        if self.manifest is None or self.manifest.study != manifest.study:
            self.begin(manifest)
        self.catch_up(manifest)
        if found is not None:
            self.tell(found)
        self.finish(paths)


def digest_of(row: SearchRow) -> str:
    """A digest of what a search has found."""
    return hashlib.sha256(json.dumps(row.dump(), sort_keys=True).encode()).hexdigest()


trackers: Registry[type[Tracker]] = Registry("tracker", "cyclebench.trackers", "bench.store.trackers", base=Tracker)
register = trackers.register
