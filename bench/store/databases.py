"""SQLite databases that are there whole or not at all, whenever a process dies.

MLflow and Optuna make their tables in many steps. A process that is killed in between leaves a file that nobody can
open again, and processes that begin at once are in each other's way. So tables are made, or brought up to date, in a
new file, by one process at a time; the new file takes the database's place when it is whole. A damaged database is kept
under another name, and a new one is begun.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from bench.errors import first_line

if TYPE_CHECKING:
    from filelock import BaseFileLock

PATIENCE = 60.0  # seconds to wait for another process that makes tables, or writes what must not be written twice
BUSY = 20.0  # seconds to wait for whoever writes to a database
BESIDE = ("-wal", "-shm", "-journal")  # ends of the names of files that belong to a database
DAMAGED = {  # what SQLite says of a file that no waiting, no room and no right would make readable
    sqlite3.SQLITE_ERROR,  # such as a table that is there already
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_CONSTRAINT,
    sqlite3.SQLITE_NOTADB,
}
NOT_OF_A_FILE = (OSError, MemoryError, ImportError, AttributeError, NameError, TypeError)  # errors, of others


@dataclass(frozen=True)
class Tables:
    """What a library keeps in a database.

    Attributes:
        library: its name.
        names: of its tables.
        migrations: folder of the steps (alembic's) from one version of the tables to the next.
        make: makes the tables in the database at an address, or brings them up to date.
    """

    library: str
    names: frozenset[str]
    migrations: Path
    make: Callable[[str], object]


class ForeignError(Exception):
    """A database that is left alone: of a later version of the library, or of another program."""


class _DamagedError(Exception):
    pass


def sqlite_file(url: str) -> Path | None:
    """The file of a SQLite database at an address of SQLAlchemy; None if it is anything else."""
    if url.startswith("sqlite:///"):  # SQLAlchemy, which reads the others, takes a while to import
        database, _, query = url.removeprefix("sqlite:///").partition("?")
        return None if query or database in ("", ":memory:") else Path(unquote(database)).resolve()
    from sqlalchemy import make_url  # start-up
    from sqlalchemy.exc import ArgumentError  # start-up

    try:
        made = make_url(url)
    except ArgumentError:
        return None
    if made.get_backend_name() != "sqlite" or made.query or made.database in (None, "", ":memory:"):
        return None
    return Path(str(made.database)).resolve()


def sqlite_url(path: Path) -> str:
    """The address of a SQLite database."""
    return f"sqlite:///{path}"


def lock_beside(path: Path) -> BaseFileLock:
    """A lock for a file, in a file of its own beside it. Taking it raises ``filelock.Timeout`` after ``PATIENCE``."""
    from filelock import FileLock  # start-up

    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f".{path.name}.lock"), timeout=PATIENCE)


def make_whole(path: Path, tables: Tables, tell: Callable[[str], object], closely: bool = False) -> bool:
    """See to it that a SQLite file holds a library's tables.

    Args:
        path: of the file, which need not exist.
        tables: the library's.
        tell: called with a line if a database was put aside.
        closely: whether to look at the version of the tables and at every page, not only at the tables' names.

    Returns:
        Whether a damaged database was put aside, and a new one begun.

    Raises:
        ForeignError: if the file is not this library's.
        Exception: whatever keeps the file from being read or written now: other processes, the disk, missing rights.
    """
    room = path.with_name(f".{path.name}.new")
    if not closely and _seems_sound(path, tables) and not room.exists():
        return False
    with lock_beside(path):
        shutil.rmtree(room, ignore_errors=True)  # of a process that was killed here
        try:
            room.mkdir()
            return _made_whole(path, tables, room / path.name, tell)
        finally:
            shutil.rmtree(room, ignore_errors=True)


def _made_whole(path: Path, tables: Tables, new: Path, tell: Callable[[str], object]) -> bool:
    """The same, by the only process that is at it. new: a file to make it in."""
    reason = ""
    if path.exists() and path.stat().st_size:
        try:
            if not _sound(path, tables):
                _renew(path, tables, new, tell)
            return False
        except Exception as error:
            if not _damaged(error):
                raise
            reason = first_line(error)
        new.unlink(missing_ok=True)
    if reason:
        tell(f"{path} is damaged and kept as {_put_aside(path).name} ({reason}); a new one is begun")
    elif any(Path(f"{path}{end}").exists() for end in BESIDE):  # of a database that was removed, not of the new one
        tell(f"{path} was removed, what belonged to it is kept as {_put_aside(path).name}-...")
    tables.make(sqlite_url(new))
    _put_in_place(new, path)
    return bool(reason)


def _seems_sound(path: Path, tables: Tables) -> bool:
    """Whether the tables are there; a damaged file is none that has them."""
    if not path.exists():
        return False
    try:
        with closing(_connected(path)) as database:
            names, revisions = _content(database)
    except sqlite3.Error as error:
        if _damaged(error):
            return False
        raise
    return tables.names <= names and bool(revisions)


def _sound(path: Path, tables: Tables) -> bool:
    """Whether the tables are there, and of the version that the library needs. Raises an error if the file is damaged,
    ForeignError if it is not the library's.
    """
    from alembic.script import ScriptDirectory  # start-up

    with closing(_connected(path)) as database:
        database.execute("PRAGMA ignore_check_constraints = ON")
        for (line,) in database.execute("PRAGMA quick_check"):
            if line != "ok" and " value in " not in line:  # those are about a row, not about the file
                raise _DamagedError(line)
        names, revisions = _content(database)
    steps = ScriptDirectory(str(tables.migrations))
    if later := revisions - {step.revision for step in steps.walk_revisions()}:
        what = f"its tables are of version {', '.join(sorted(later))}"
        raise ForeignError(f"{path} is of a later {tables.library} or of another program: {what}")
    return tables.names <= names and revisions == set(steps.get_heads())


def _content(database: sqlite3.Connection) -> tuple[set[str], set[str]]:
    """The tables, and their version as alembic writes it down."""
    names = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if "alembic_version" not in names:
        return names, set()
    return names, {number for (number,) in database.execute("SELECT version_num FROM alembic_version")}


def _renew(path: Path, tables: Tables, new: Path, tell: Callable[[str], object]) -> None:
    """Put a copy that is up to date in the place of a database. The database is kept, if it was ever whole."""
    with closing(_connected(path)) as old:
        old.execute("PRAGMA journal_mode = DELETE")  # what lies in files beside comes into this one
        old.execute("BEGIN IMMEDIATE")  # from here on nobody else writes to it
        before = new.with_suffix(".before")
        with closing(_connected(path)) as source, closing(sqlite3.connect(before)) as target:
            source.backup(target)
            names, revisions = _content(source)
        shutil.copyfile(before, new)
        shutil.copymode(path, new)
        try:
            tables.make(sqlite_url(new))
        except Exception as error:
            others = {
                name for name in names - tables.names if not name.startswith(("alembic_", "_alembic_", "sqlite_"))
            }
            if others and _damaged(error):
                raise ForeignError(f"{path} holds tables of another program: {', '.join(sorted(others))}") from None
            raise
        if revisions:
            kept = _free_name(path, "before")
            _put_in_place(before, kept)
            tell(f"{path} is brought up to date for this {tables.library}; as it was it is kept as {kept.name}")
        _put_in_place(new, path)


def _connected(path: Path) -> sqlite3.Connection:
    """A connection to a file that exists; in what is executed, a transaction begins where it says so."""
    return sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True, timeout=BUSY, isolation_level=None)


def _damaged(error: Exception) -> bool:
    """Whether an error, of reading a file or of bringing it up to date, is the file's fault: not the machine's, nor the
    library's.
    """
    if isinstance(error, ForeignError):
        return False
    cause: BaseException | None = error
    while cause is not None:
        if (code := getattr(cause, "sqlite_errorcode", None)) is not None:
            return code & 0xFF in DAMAGED
        cause = getattr(cause, "orig", None) or cause.__cause__ or cause.__context__
    return not isinstance(error, NOT_OF_A_FILE)


def _free_name(path: Path, kind: str) -> Path:
    names = (path.with_name(f"{path.name}.{kind}-{number}") for number in count(1))
    return next(name for name in names if not any(os.path.lexists(f"{name}{end}") for end in ("", *BESIDE)))


def _put_aside(path: Path) -> Path:
    """Give a database, with what belongs to it, another name."""
    kept = _free_name(path, "damaged")
    for end in ("", *BESIDE):
        with suppress(FileNotFoundError):
            os.rename(f"{path}{end}", f"{kept}{end}")
    return kept


def _put_in_place(new: Path, path: Path) -> None:
    with new.open("r+b") as file:
        os.fsync(file.fileno())
    os.replace(new, path)
