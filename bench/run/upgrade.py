"""Opening a store: one of an earlier version is brought up to date in place, and nothing is trained again.

Several processes may open a store at once: one does the work, the others wait. Small on purpose: torch is imported only
where ids change.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench.errors import UserError
from bench.processes import me
from bench.run.lease import EXPIRY, LeaseWatch, read_lease
from bench.store.files import locked
from bench.store.store import Store
from bench.store.versions import (
    VERSION,
    cell_folders,
    clear_room,
    holds_something,
    rename_in_manifests,
    seal_all,
    stored_version,
    write_former,
    write_version,
)

IDS = 3  # the version that has changed the ids of cells last


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
    with locked(store.root):
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
    clear_room(root)
    _check_idle(root)
    if (stored_version(root) or 0) < IDS:
        from bench.run.renaming import Renaming  # start-up

        renaming = Renaming(root, tell)
        renaming.move_all()
        rename_in_manifests(root, renaming.ids)
        write_former(root, renaming.ids)
    seal_all(root)
    clear_room(root)


def _check_idle(root: Path) -> None:
    """Raises UserError if a process of an earlier version runs a cell: it would write what is not understood."""
    watch, until = LeaseWatch(EXPIRY), time.monotonic() + EXPIRY + 1
    busy = set(cell_folders(root))
    while busy := {folder for folder in busy if watch.free(folder) is None}:
        held = [lease for folder in busy if (lease := read_lease(folder)) is not None]
        if held and (time.monotonic() > until or any(lease["owner"]["machine"] == me()["machine"] for lease in held)):
            owner = held[0]["owner"]
            raise UserError(
                f"{root}: process {owner['pid']} on {owner['host']}, of an earlier version, is running a cell of this "
                "store: let it end first"
            )
        time.sleep(1)
