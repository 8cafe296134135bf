"""Opening a store: one of an earlier version is brought up to date in place, and nothing is trained again.

Several processes may open a store at once: one does the work, the others wait. Small on purpose: torch is imported only
where there is something to bring up to date.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from bench.errors import UserError
from bench.store.store import Store
from bench.store.versions import (
    VERSION,
    clear_room,
    holds_something,
    rename_in_manifests,
    stored_version,
    write_former,
    write_version,
)

LOCK = ".upgrade.lock"


def open_store(root: str | Path, begin: bool = False) -> Store:
    """The store in a folder, of this version.

    Args:
        root: the folder.
        begin: whether something will be written. Else a folder that holds no store is left as it is.

    Raises:
        UserError: if the folder is a file, holds a store of a later version, or one that a process of an earlier
            version works on.
    """
    store = Store(Path(root))
    found = stored_version(store.root)
    if found == VERSION or (found is None and not begin and not holds_something(store.root)):
        return store
    if found is not None and found > VERSION:
        raise UserError(f"--runs: {str(root)!r} is a store of version {found} (allowed: up to {VERSION})")
    from filelock import FileLock  # start-up

    store.root.mkdir(parents=True, exist_ok=True)
    with FileLock(store.root / LOCK):
        if stored_version(store.root) != VERSION:
            if holds_something(store.root):
                upgrade(store.root, lambda text: print(text, file=sys.stderr))
            write_version(store.root)
    return Store(store.root)


def upgrade(root: Path, tell: Callable[[str], None]) -> None:
    """Bring all cells, studies and sweeps of a store up to date. It may be killed at any moment and called again.

    Args:
        root: of the store; nobody else may be at this.
        tell: called with a line for whatever the user should know.
    """
    from bench.run.renaming import Renaming  # start-up

    clear_room(root)
    renaming = Renaming(root, tell)
    renaming.check_idle()
    renaming.move_all()
    rename_in_manifests(root, renaming.ids)
    write_former(root, renaming.ids)
    clear_room(root)
