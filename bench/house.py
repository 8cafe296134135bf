"""Our folders are ours: a user's own ``variants/``, ``reports/`` or ``studies/`` is never taken for the suite's.

Python finds a module in the folder it was started in before it looks among what is installed. A finder of our own comes
first for the names of our folders, and looks beside this package alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

HOUSE = Path(__file__).parent.parent  # where our folders lie side by side
NAMES = ("bench", "variants", "reports", "cyclebench")
STUDIES = HOUSE / "studies"
PUBLISHED = HOUSE / "reports" / "published"
OWN = Path("reports", "published")  # what a user publishes, in the working folder


class Finder:
    """Finds our packages beside this one."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Called by Python for every module that is not imported yet."""
        return PathFinder.find_spec(name, [str(HOUSE)]) if path is None and name in NAMES else None


def settle() -> None:
    """Put the finder first. Raises ImportError, in one line, if another package of one of our names is there already:
    two of a name cannot be.
    """
    for name in NAMES:
        module = sys.modules.get(name)
        place = getattr(module, "__file__", None)
        if module is not None and (place is None or Path(place).resolve().parent != (HOUSE / name).resolve()):
            raise ImportError(
                f"package {name!r} of {place or list(module.__path__)} was imported before cyclebench, which has "
                "one of that name: import cyclebench first, or give yours another name"
            )
    if Finder not in sys.meta_path:
        sys.meta_path.insert(0, Finder)
