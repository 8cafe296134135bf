"""SQLite files of MLflow and Optuna: whole or not there, whoever begins when, and whatever became of them.

``CYCLEBENCH_TRACKING_KILLS`` sets how often a process is killed while it makes tables (3 by default).
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
from alembic import command
from alembic.config import Config
from mlflow import MlflowClient
from sqlalchemy import Engine, event, make_url

from bench.store import databases
from bench.store.databases import ForeignError, Tables, make_whole, sqlite_file, sqlite_url
from bench.store.mlflow_server import _tables
from bench.sweep.storage import TABLES

KILLS = int(os.environ.get("CYCLEBENCH_TRACKING_KILLS", "3"))
LIBRARIES = {"MLflow": _tables, "Optuna": lambda: TABLES}


def used(tables: Tables, path: Path, name: str) -> list[str]:
    """Write something by that name, as the library does it, and return the names of all that is there."""
    if tables.library == "MLflow":
        client = MlflowClient(sqlite_url(path))
        client.create_experiment(name)
        return sorted(found.name for found in client.search_experiments() if found.name != "Default")
    storage = optuna.storages.RDBStorage(sqlite_url(path))
    optuna.create_study(storage=storage, study_name=name)
    names = sorted(study.study_name for study in optuna.get_all_study_summaries(storage))
    storage.engine.dispose()
    return names


@pytest.fixture(autouse=True)
def unpooled(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow keeps its engines, and they would keep a file that is no longer there."""
    monkeypatch.setenv("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")


@pytest.fixture(params=LIBRARIES)
def tables(request: pytest.FixtureRequest) -> Tables:
    return LIBRARIES[request.param]()


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A database of each, made whole: that takes a while."""
    paths = {name: tmp_path_factory.mktemp("made") / "some.db" for name in LIBRARIES}
    for name, path in paths.items():
        assert not make_whole(path, LIBRARIES[name](), pytest.fail)
        assert sorted(p.name for p in path.parent.iterdir()) == [".some.db.lock", "some.db"]
    return paths


@pytest.fixture
def path(tables: Tables, templates: dict[str, Path], tmp_path: Path) -> Path:
    """A database that holds something."""
    shutil.copy(templates[tables.library], tmp_path / "some.db")
    assert used(tables, tmp_path / "some.db", "first") == ["first"]
    with closing(sqlite3.connect(tmp_path / "some.db")) as database:
        database.execute("PRAGMA journal_mode = DELETE")  # nothing of it lies in files beside
    return tmp_path / "some.db"


@pytest.fixture
def quick(templates: dict[str, Path], tables: Tables) -> Tables:
    """The tables, with a ready file for those that are to be made anew; what is there already is treated as ever."""

    def make(url: str) -> None:
        file = sqlite_file(url)
        assert file is not None
        if file.exists():
            tables.make(url)
        else:
            shutil.copy(templates[tables.library], file)

    return Tables(tables.library, tables.names, tables.migrations, make)


def dump(path: Path) -> list[str]:
    """All that a database holds."""
    with closing(sqlite3.connect(path)) as database:
        return list(database.iterdump())


def kept(path: Path) -> dict[str, bytes]:
    """What lies beside a database, by name."""
    return {p.name: p.read_bytes() for p in path.parent.iterdir() if p not in (path, path.with_name(".some.db.lock"))}


def test_what_is_sound_is_left_alone(quick: Tables, path: Path) -> None:
    before = path.read_bytes()
    for closely in (False, True):
        assert not make_whole(path, quick, pytest.fail, closely)
    assert path.read_bytes() == before and kept(path) == {}


def garbage(path: Path) -> None:
    path.write_bytes(b"no database at all")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flipped(path: Path) -> None:
    """A page in the middle: the tables' names can still be read."""
    content = bytearray(path.read_bytes())
    with closing(sqlite3.connect(path)) as database:
        size = database.execute("PRAGMA page_size").fetchone()[0]
        (page,) = database.execute("SELECT rootpage FROM sqlite_master WHERE name IN ('runs', 'trials')").fetchone()
    content[(page - 1) * size : (page - 1) * size + 100] = bytes(range(100, 200))
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [garbage, cut, zeros, flipped])
def test_a_damaged_file_is_kept_and_told_and_a_new_one_begun(
    damage: Callable[[Path], None], quick: Tables, path: Path
) -> None:
    for number in (1, 2):
        damage(path)
        before, told = path.read_bytes(), list[str]()
        assert make_whole(path, quick, told.append, closely=True)
        assert len(told) == 1 and f"some.db is damaged and kept as some.db.damaged-{number} (" in told[0]
        assert kept(path)[f"some.db.damaged-{number}"] == before
        assert used(quick, path, "next") == ["next"]


def test_what_a_removed_file_has_left_is_not_taken_for_a_part_of_the_new_one(quick: Tables, path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE strange (anything TEXT)")
        left = path.with_name("some.db-wal").read_bytes()
        path.unlink()
    path.with_name("some.db-wal").write_bytes(left)
    assert not make_whole(path, quick, lambda _: None)
    assert kept(path)["some.db.damaged-1-wal"] == left and used(quick, path, "next") == ["next"]


def test_an_empty_file_is_as_good_as_none(quick: Tables, path: Path) -> None:
    path.write_bytes(b"")
    assert not make_whole(path, quick, pytest.fail)
    assert kept(path) == {} and used(quick, path, "next") == ["next"]


def test_an_older_one_is_brought_up_to_date_and_kept(tables: Tables, path: Path) -> None:
    config = Config()
    config.set_main_option("script_location", str(tables.migrations))
    config.set_main_option("sqlalchemy.url", sqlite_url(path))
    if tables.library == "MLflow":
        command.downgrade(config, "-1")
    else:  # Optuna's way back is not one
        command.stamp(config, "v3.0.0.d")
    before, told = dump(path), list[str]()
    assert not make_whole(path, tables, told.append, closely=True)
    assert len(told) == 1 and f"is brought up to date for this {tables.library}" in told[0]
    assert dump(path.with_name("some.db.before-1")) == before != dump(path)
    assert used(tables, path, "next") == ["first", "next"]


def test_a_later_one_is_refused_and_left_as_it_is(quick: Tables, path: Path) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = 'of next year'")
    before = path.read_bytes()
    with pytest.raises(ForeignError, match=r"is of a later .* or of another program: .* of next year"):
        make_whole(path, quick, pytest.fail, closely=True)
    assert path.read_bytes() == before and kept(path) == {}


@pytest.mark.parametrize("names", [("metrics", "experiments", "studies", "trials"), ("runs", "tags")])
def test_tables_of_another_program_are_left_as_they_are(names: tuple[str, ...], tables: Tables, tmp_path: Path) -> None:
    path = tmp_path / "some.db"
    with closing(sqlite3.connect(path)) as database, database:
        for name in (*names, "mine"):  # names of theirs, columns of its own
            database.execute(f"CREATE TABLE {name} (anything TEXT)")
        database.execute("INSERT INTO mine VALUES ('dear')")
    before = path.read_bytes()
    if tables.library == "MLflow":  # it alters them
        with pytest.raises(ForeignError, match=r"holds tables of another program: .*mine"):
            make_whole(path, tables, pytest.fail)
        assert path.read_bytes() == before and kept(path) == {}
    else:  # it takes the file as it is
        make_whole(path, tables, pytest.fail)
        with closing(sqlite3.connect(path)) as database:
            assert database.execute("SELECT * FROM mine").fetchall() == [("dear",)]


def test_a_file_that_is_in_use_is_not_damaged(quick: Tables, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(databases, "BUSY", 0.1)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            make_whole(path, quick, pytest.fail, closely=True)
        other.execute("ROLLBACK")
    assert kept(path) == {} and not make_whole(path, quick, pytest.fail, closely=True)


class StoppedError(Exception):
    """Raised in the middle of the making of tables."""


def statements(make: Callable[[], object], stop: int) -> int:
    """How many statements are executed, up to the one before which it stops."""
    count = 0

    def counted(*_: object) -> None:
        nonlocal count
        if count == stop:
            raise StoppedError
        count += 1

    event.listen(Engine, "before_cursor_execute", counted)
    try:
        make()
    except StoppedError:
        pass
    finally:
        event.remove(Engine, "before_cursor_execute", counted)
    return count


def half_made(tables: Tables, folder: Path, shares: tuple[float, ...]) -> Iterator[Path]:
    """Files as processes of earlier versions have left them, which made tables where they are used."""
    (folder / "whole").mkdir()
    every = statements(lambda: tables.make(sqlite_url(folder / "whole" / "some.db")), -1)
    for share in shares:
        (folder / str(share)).mkdir()
        path = folder / str(share) / "some.db"
        assert statements(lambda path=path: tables.make(sqlite_url(path)), int(share * every)) < every  # type: ignore[misc]
        yield path


@pytest.mark.long
def test_half_made_tables_become_whole(tables: Tables, quick: Tables, tmp_path: Path) -> None:
    for path in half_made(tables, tmp_path, (0.02, 0.4, 0.99)):
        told = list[str]()
        assert make_whole(path, quick, told.append) == ("damaged" in str(told)), "completed, or begun anew"
        assert used(tables, path, "first") == ["first"]


def killed(make: Callable[[], object], moment: int) -> None:
    """Call something in a process that kills itself before a statement or before it renames or removes a file."""
    child = os.fork()
    if child == 0:
        try:
            seen = 0

            def count(*arguments: Any) -> None:
                nonlocal seen
                seen += arguments[0] not in ("open", "import")
                if seen == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

            event.listen(Engine, "before_cursor_execute", count)
            sys.addaudithook(lambda name, _: count(name) if name in ("os.rename", "os.rmdir", "os.remove") else None)
            make()
        finally:
            os._exit(0)
    os.waitpid(child, 0)


@pytest.mark.long
def test_killed_while_it_makes_tables_it_makes_them_the_next_time(tmp_path: Path) -> None:
    """Optuna's: MLflow's are in test_tracking_complete.py."""
    chance = random.Random(int.from_bytes(os.urandom(4), "big"))
    TABLES.make(sqlite_url(tmp_path / "first.db"))
    every = statements(lambda: TABLES.make(sqlite_url(tmp_path / "second.db")), -1)
    for number in range(KILLS):
        path, moment = tmp_path / f"{number}.db", chance.randrange(1, every + 5)
        killed(lambda path=path: make_whole(path, TABLES, pytest.fail), moment)  # type: ignore[misc]
        assert not make_whole(path, TABLES, pytest.fail)
        assert used(TABLES, path, "first") == ["first"], moment
        assert not list(tmp_path.glob(".*.new")), moment


def test_a_room_that_a_killed_process_has_left_is_removed(tmp_path: Path) -> None:
    path, room = tmp_path / "some.db", tmp_path / ".some.db.new"
    make_whole(path, TABLES, pytest.fail)
    room.mkdir()
    assert not make_whole(path, TABLES, pytest.fail) and not room.exists()


def test_processes_at_once_make_one(templates: dict[str, Path], tables: Tables, tmp_path: Path) -> None:
    path, context = tmp_path / "some.db", multiprocessing.get_context("fork")

    def make(url: str) -> None:
        (tmp_path / "made").open("a").write("once\n")
        tables.make(url)

    counted = Tables(tables.library, tables.names, tables.migrations, make)
    processes = [context.Process(target=make_whole, args=(path, counted, print)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 3
    assert (tmp_path / "made").read_text() == "once\n" and used(tables, path, "first") == ["first"]


@pytest.mark.parametrize(
    "url", ["http://here:5000", "postgresql://here/x", "sqlite://", "sqlite:///:memory:", "mlruns", "databricks", ""]
)
def test_other_addresses_are_no_sqlite_file(url: str) -> None:
    assert sqlite_file(url) is None


def test_the_file_of_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.db").symlink_to(tmp_path / "target.db")
    for url in ("sqlite:///a b.db", "sqlite:///a%20b.db", "sqlite:///a@b:c.db", "sqlite:///a?", "sqlite:///a?mode=ro"):
        read = make_url(url)
        assert sqlite_file(url) == (None if read.query else tmp_path / str(read.database)), url
    assert sqlite_file(f"sqlite:///{tmp_path}/link.db") == tmp_path / "target.db", "a link stays one"
