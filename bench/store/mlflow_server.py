"""A connection to MLflow: to a server or a database that answers soon, or to a SQLite file that is whole."""

from __future__ import annotations

import logging
import os
import queue
import shlex
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from bench.store.databases import Tables, make_whole, sqlite_file, sqlite_url

ANSWER = 10.0  # seconds in which a server must answer for the first time
EXPERIMENT = "cyclebench"  # of evaluations, and of the studies that were begun when all of them were in one
REQUEST = 30  # seconds in which it must answer to any later request: it may be busy

Value = TypeVar("Value")


def connect(uri: str, closely: bool = False) -> tuple[Any, bool]:
    """An MLflow client that says nothing by itself and calls nobody but the tracking server.

    Args:
        uri: of MLflow.
        closely: whether to look closely at a SQLite file, as something was wrong with it.

    Returns:
        The client, and whether it is of a new SQLite file, as the one before was damaged.

    Raises:
        TimeoutError: if there is no answer.
        Exception: whatever MLflow, SQLAlchemy or the disk say.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # the second waits for seconds, and may wait in vain
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST))
    from mlflow import MlflowClient  # start-up

    for name in ("alembic", "mlflow"):  # what goes wrong is raised as well
        logging.getLogger(name).setLevel(logging.CRITICAL)
    path = sqlite_file(uri)
    if path is None:
        within(ANSWER, lambda: _ask(uri))
        return MlflowClient(uri), False
    new = make_whole(path, _tables(), lambda text: print(text, file=sys.stderr), closely)
    try:
        # Every session opens the file anew: another process may have put it aside, and a new one in its place.
        with _environment("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool"):
            return MlflowClient(sqlite_url(path)), new
    except Exception:
        if closely:
            raise
        return connect(uri, closely=True)


def tags_in(uri: str, tag: str, value: str) -> dict[str, str]:
    """The tags of the finished run that has one of this value, as MLflow's SQLite file holds them, by SQLite alone.

    Empty where there is no such run, or where this cannot be told, as of a server or of a file that is damaged.
    """
    if not (uri.startswith("sqlite:///") and (path := sqlite_file(uri)) is not None and path.is_file()):
        return {}
    asked = """SELECT tags.key, tags.value FROM tags JOIN runs USING (run_uuid) WHERE status = 'FINISHED' AND
        lifecycle_stage = 'active' AND run_uuid IN (SELECT run_uuid FROM tags WHERE key = ? AND value = ?)"""
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as database:
            return dict(database.execute(asked, (tag, value)).fetchall())
    except sqlite3.Error:
        return {}


def experiment(client: Any, name: str) -> str:
    """The id of an experiment, which is made if need be, and taken back if it was deleted."""
    if (found := client.get_experiment_by_name(name)) is None:
        try:
            return str(client.create_experiment(name))
        except Exception:  # another process was faster
            if (found := client.get_experiment_by_name(name)) is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def former_experiment(client: Any, of_study: str) -> str | None:
    """The id of the experiment that once held all studies, if it holds the run of one; else None. of_study: a filter
    that finds that run.
    """
    former = client.get_experiment_by_name(EXPERIMENT)
    if former is None or former.lifecycle_stage == "deleted":
        return None
    return str(former.experiment_id) if client.search_runs([former.experiment_id], of_study, max_results=1) else None


def within(seconds: float, call: Callable[[], Value]) -> Value:
    """What a call returns or raises. Raises TimeoutError if that takes longer: then nobody waits for it any more."""
    ended: queue.SimpleQueue[tuple[Value | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            ended.put((call(), None))
        except BaseException as error:
            ended.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        value, error = ended.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer in {seconds:.0f} s") from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def _ask(uri: str) -> None:
    """Ask a server or a database for anything."""
    from mlflow import MlflowClient  # start-up
    from sqlalchemy import create_engine  # start-up
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError  # start-up

    try:
        engine = create_engine(uri)
    except (ArgumentError, NoSuchModuleError):  # not a database
        MlflowClient(uri).get_experiment_by_name("Default")
        return
    engine.connect().close()  # MLflow itself would try ten times
    engine.dispose()


@cache
def _tables() -> Tables:
    """MLflow's tables."""
    from mlflow.store.db import utils  # start-up
    from mlflow.store.db.base_sql_model import Base  # start-up

    migrations = Path(utils.__file__).parent.parent / "db_migrations"
    return Tables("MLflow", frozenset(Base.metadata.tables), migrations, _make)


def _make(url: str) -> None:
    """What MLflow does with a database at its first start, and at its first of a later version."""
    from mlflow.store.db import utils  # start-up
    from sqlalchemy import create_engine, event, inspect  # start-up

    engine = create_engine(url)
    event.listen(engine, "connect", _unsynced)
    try:
        if inspect(engine).has_table("alembic_version"):
            utils._upgrade_db(engine)
        else:
            utils._initialize_tables(engine)
    finally:
        engine.dispose()


def _unsynced(connection: Any, _: Any) -> None:
    """Do not wait for the disk at every step: the file counts only when it is whole."""
    connection.execute("PRAGMA synchronous = OFF").close()


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """An environment variable for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def ui_command(uri: str) -> str:
    """What a user opens, or types, to look at what is kept at an address: that of a server, or a database."""
    if uri.startswith(("http://", "https://")):
        return uri
    own = Path(sys.executable).with_name("mlflow")
    command = str(own.relative_to(Path.cwd())) if own.is_relative_to(Path.cwd()) else "mlflow"
    return shlex.join([command, "ui", "--host", "127.0.0.1", "--backend-store-uri", uri])
