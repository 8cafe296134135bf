"""The names that studies and the command line choose by: variants, tasks, exit rules, gates, figures, trackers.

A registry knows what comes with the suite, what installed packages declare as entry points of its group, and what was
registered by hand: by a file given with ``--import``, in a notebook or in a script (``bench.plugins`` takes that along
to other processes).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Generic, TypeVar

from bench.errors import UserError, shown, typed_line, unknown

SUITE = ("bench", "variants", "reports", "cyclebench")  # packages of its own
NAME = r"\w[\w-]*"
T = TypeVar("T")
Kind = TypeVar("Kind")


class Registry(Generic[T]):
    """Things of one kind by name."""

    all: ClassVar[list[Registry[Any]]] = []  # every registry there is

    def __init__(
        self, kind: str, group: str, builtin: str, reserved: Mapping[str, str] | None = None, base: type | None = None
    ) -> None:
        """A registry of its own.

        Args:
            kind: how messages call one of its things, ``variant``.
            group: of the entry points by which packages declare theirs, ``cyclebench.variants``.
            builtin: the module that registers those that come with the suite; imported when a name is looked up.
            reserved: names that nothing may have, and what each is.
            base: the class that all are subclasses of; None: what is registered is checked elsewhere.
        """
        self.reserved, self.base = reserved or {}, base
        self.kind, self.group, self.builtin = kind, group, builtin
        self._found: dict[str, T] = {}
        self._loaded = self._builtin_loaded = False
        self.all.append(self)

    def register(self, name: str) -> Callable[[Kind], Kind]:
        """Decorator: make a class or a function known under ``name``, which becomes its attribute ``name``.

        The same definition may be registered again: a notebook's cell is run twice. Raises UserError if another one
        has the name, for a reserved one, for a name that files, trackers and ``--set`` could not hold, and for what is
        no subclass of ``base``.
        """
        if not isinstance(name, str) or not re.fullmatch(NAME, name, re.ASCII):
            raise UserError(f"{self.kind} name {shown(name)} (allowed: letters, digits, - and _)")
        if name in self.reserved:
            raise UserError(f"{self.kind} name {name!r} {self.reserved[name]} (allowed: another name)")

        def add(thing: Any) -> Any:
            self.check_base(name, thing)
            if _package(thing) not in SUITE:
                self._load_builtin()  # whose names are taken
            known = self._found.get(name)
            if known is not None and _place(known) != _place(thing):
                raise UserError(f"{self.kind} name {name!r} is taken by {'.'.join(_place(known))}")
            thing.name = name
            self._found[name] = thing
            return thing

        return add

    def check_base(self, name: str, thing: Any) -> None:
        """Raises UserError for what is no subclass of ``base``."""
        if self.base is not None and not (isinstance(thing, type) and issubclass(thing, self.base)):
            what, base = getattr(thing, "__name__", None) or shown(thing), self.base.__name__
            raise UserError(f"{self.kind} {name!r}: {what} is no {base} (allowed: a subclass of cyclebench.{base})")

    def names(self) -> list[str]:
        """All names, in alphabetical order."""
        return sorted(self.items())

    def registered(self) -> Mapping[str, T]:
        """What has been registered so far by name; nothing is looked for."""
        return self._found

    def items(self) -> Mapping[str, T]:
        """What there is by name, in the order it was registered in."""
        self._load()
        return self._found

    def get(self, name: str) -> T:
        """What is registered under ``name``. Raises UserError, with the nearest name, if nothing is."""
        known = self.items()
        if name not in known:
            raise unknown(self.kind, name, known)
        return known[name]

    def by_hand(self) -> dict[str, T]:
        """What was registered so far and is neither of the suite nor of a package that declares entry points."""
        packages = {*SUITE, *(point.value.partition(":")[0].partition(".")[0] for point in self._points)}
        return {name: thing for name, thing in self._found.items() if _package(thing) not in packages}

    @cached_property
    def _points(self) -> list[EntryPoint]:
        return sorted(entry_points(group=self.group), key=lambda point: point.name)

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True  # what is imported here may look names up
        try:
            self._load_builtin()
            for point in self._points:
                try:
                    point.load()
                except Exception as error:  # whatever a foreign package raises when it is imported
                    raise UserError(
                        f"entry point {point.name} = {point.value!r} of {self.group} cannot be loaded: "
                        f"{typed_line(error)}"
                    ) from error
        except BaseException:
            self._loaded = False
            raise

    def _load_builtin(self) -> None:
        if self._builtin_loaded:
            return
        self._builtin_loaded = True  # its modules register what they define
        try:
            import_module(self.builtin)
        except BaseException:
            self._builtin_loaded = False
            raise


def _package(thing: Any) -> str:
    return str(thing.__module__).partition(".")[0]


def _place(thing: Any) -> tuple[str, str]:
    return thing.__module__, thing.__qualname__
