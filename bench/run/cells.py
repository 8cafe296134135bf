"""One cell: run it, and run it as a job that nobody else runs and whose failure is a record."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.config import RESULTS_SCHEMA, Cell
from bench.errors import Fault, UserError, reason_of
from bench.run.lease import BEAT, Lease, LeaseLostError
from bench.run.settings import settings_of
from bench.run.usage import Usage
from bench.store.loops import record_divergence
from bench.store.records import Configuration, Failure, Outcome
from bench.store.store import Store
from bench.train.checkpoints import Every, cell_logger
from bench.train.device import environment_of, repeatable
from bench.train.distributed import Team
from bench.train.loop import WatchHistory, train_together

if TYPE_CHECKING:
    from bench.run.going import Going

Tell = Callable[[str, tuple[Any, ...]], None]
"""Called with an event of a cell: ``start`` (label, steps), ``update`` (step, loss or None, tokens per second),
``phase`` (what it is at after its steps), ``began`` (seconds since 1970), ``entry`` (of its history), or ``found``: it
has a record that another process has made."""
TellOf = Callable[[str, str, tuple[Any, ...]], None]
"""The same with the cell's id in front."""


@dataclass(frozen=True)
class Job:
    """What a worker, here or on another machine, needs to run a cell.

    lease: the number of the lease it must take; failed: the time of the failure that was known when the job was made;
    watch: called with every entry of the history, in the process that runs the cell; what it raises ends the cell
    without a result, ``GivenUpError`` without a record of a failure, too.
    """

    cell: Cell
    label: str
    root: Path
    every: Every
    lease: int
    failed: float | None = None
    beat: float = BEAT
    watch: WatchHistory | None = None


class GivenUpError(Exception):
    """A cell is not worth being trained to its end."""


def run_job(job: Job, tell: Tell) -> Outcome | None:
    """Run a job's cell alone and return its record; see ``run_jobs``."""
    return dict(run_jobs((job,), lambda _, kind, arguments: tell(kind, arguments)))[job.cell.id]


def run_jobs(jobs: Sequence[Job], tell: TellOf) -> Iterator[tuple[str, Outcome | None]]:
    """Run the cells of jobs, trained together, and yield the id and the record of each as it ends; whatever goes wrong
    becomes the failure record of the cell it went wrong in.

    None if another process holds a cell. A record that another process has made in the meantime is yielded as it is.
    """
    with ExitStack() as stack:
        members = []
        for job in jobs:
            member = stack.enter_context(_Member(job, partial(tell, job.cell.id)))
            record = member.take()
            if member.held is None or record is not None:
                yield member.end(record)
            else:
                members.append(member)
        yield from _run(members)


class _Member:
    """A job on its way: its lease, its log and what it tells; a context manager that gives the lease back."""

    def __init__(self, job: Job, tell: Tell) -> None:
        self.job, self.cell, self.tell, self.store = job, job.cell, tell, Store(job.root)
        self.log = cell_logger(job.cell.id)
        self.held: Lease | None = None
        self.started = 0.0
        self._stack, self._first = ExitStack(), list[tuple[int, float]]()

    def __enter__(self) -> _Member:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def take(self) -> Outcome | None:
        """Take the lease; returns the record that is there already, or that of a disk that refuses the lease."""
        folder = self.store.folder(self.cell.id)
        try:
            lease = Lease.take(folder, self.job.lease, self.job.beat)
            if lease is None:
                return None
            self._stack.enter_context(lease)
            self._stack.enter_context(cell_log(folder, self.cell.id))
            self.held = lease
            self.tell("start", (self.job.label, self.cell.train.steps))
            found = self.store.record(self.cell.id)
        except OSError as error:  # not even a lease can be written
            return failure(self.cell, *reason_of(error))
        if found is not None and (found.status == "done" or found.at != self.job.failed):
            self.tell("found", ())
            return found
        self.started = time.time()
        self.tell("began", (self.started,))
        lease.note(label=self.job.label, steps=self.cell.train.steps, step=0, tokens_per_second=None)
        self.log.info("begins: %s, process %d, lease %d", self.job.label, os.getpid(), lease.number)
        return None

    def report(self, step: int, loss: float | None, speed: float) -> None:
        """Renew what others see of the cell. Raises LeaseLostError if it is no longer ours."""
        assert self.held is not None
        self.held.check()
        self._first.append((step, time.monotonic()))
        done, since = self._first[0]
        left = (time.monotonic() - since) / (step - done) * (self.cell.train.steps - step) if step > done else None
        self.held.note(step=step, tokens_per_second=speed, seconds_left=left)
        del self._first[1:]
        self.tell("update", (step, loss, speed))

    def watch(self, entry: dict[str, float]) -> None:
        """Tell an entry of the history, to who watches the job, too."""
        self.tell("entry", (entry,))
        if self.job.watch is not None:
            self.job.watch(entry)

    def end(self, record: Outcome | None) -> tuple[str, Outcome | None]:
        """Give the cell back."""
        self._stack.close()
        return self.cell.id, record

    def finish(self, going: Going) -> Outcome | None:
        """Test and store what has been trained."""
        self.tell("phase", ("testing",))
        try:
            record = going.finish()
        except Exception as error:
            return self.fail(error)
        if (diverges := record_divergence(record)) is not None:
            self.log.warning("%s", diverges)
        self.log.info("done in %.1f s", record.timing.seconds)
        return record

    def fail(self, error: Exception) -> Failure | None:
        """The failure's record; None if another process has the cell."""
        assert self.held is not None
        if isinstance(error, GivenUpError):
            self.log.info("given up: %s", error)
            return None
        try:
            self.held.check()
            record = failure(self.cell, *reason_of(error))
            with suppress(OSError):  # on a full disk: the caller still learns of it
                self.store.write_failure(self.cell.id, record, self.held.room)
            self.held.check()  # it may have been taken over in between: then nothing was written
        except (LeaseLostError, UserError) as lost:  # or it has a result by now
            self.log.error("stops: %s", lost)
            return None
        self.log.error("failed: %s", record.reason)
        return record


def _run(members: Sequence[_Member]) -> Iterator[tuple[str, Outcome | None]]:
    if not members:
        return
    from bench.run.going import Going, run_rank  # start-up: transformers

    first, going = members[0].cell, dict[Any, tuple[_Member, Going]]()
    try:
        with (
            Usage() as usage,
            repeatable(first.seed, first.train.threads),
            Team(first, members[0].store.root, run_rank) as team,
        ):
            for member in members:
                try:
                    one = Going(
                        member.cell,
                        member.store,
                        member.held,
                        report=member.report,
                        every=member.job.every,
                        watch=member.watch,
                        team=team,
                        started=member.started,
                    )
                except Exception as error:
                    yield member.end(member.fail(team.cause(error)))
                else:
                    going[one.training] = member, one
            for training, ending in train_together(list(going)):
                member, one = going.pop(training)
                record = member.finish(one) if ending is None else member.fail(team.cause(ending))
                usage.take()
                with suppress(OSError):
                    if record is not None and record.status == "done" and member.held is not None:
                        member.store.write_usage(member.cell.id, usage.samples, member.held.room)
                yield member.end(record)
    except SystemExit:
        for member, _ in going.values():
            member.log.warning("stopped from outside")
        raise


def give_up(store: Store, cell: Cell, number: int, record: Failure, known: float | None) -> Outcome | None:
    """Store the failure of a cell whose workers have died, unless another process is at it or has made a record; the
    record there is then, None while another holds the cell.

    Args:
        store: that the cell is in.
        cell: that has no result.
        number: of the lease to take for it.
        record: what is to be stored; a disk that refuses it does not matter here.
        known: the time of the failure that was known before.
    """
    try:
        lease = Lease.take(store.folder(cell.id), number)
        if lease is None:
            return None
        with lease:
            found = store.record(cell.id)
            if found is not None and (found.status == "done" or found.at != known):
                return found
            store.write_failure(cell.id, record, lease.room)
    except OSError:
        pass
    return record


def add_to_log(folder: Path, text: str) -> None:
    """Put what was printed for a cell into its log. A disk that refuses it does not matter."""
    with suppress(OSError), (folder / "log.txt").open("a", encoding="utf-8") as file:
        file.write(text)


def failure(cell: Cell, reason: str, kind: Fault, trace: str | None = None) -> Failure:
    """The record of a failed cell, as of now.

    Args:
        cell: that has no result.
        reason: in one line.
        kind: whose fault it is, see ``Failure``.
        trace: where in the code, None if nothing was raised.
    """
    reason, trace = _sayable(reason), None if trace is None else _sayable(trace)
    settings: dict[str, dict[str, Any]] = {}
    with suppress(Exception):  # the variant may be what is wrong
        settings = settings_of(cell)
    return Failure(
        schema=RESULTS_SCHEMA,
        status="failed",
        id=cell.id,
        cell=Configuration.of(cell),
        reason=reason,
        kind=kind,
        at=time.time(),
        traceback=trace,
        environment=environment_of(cell.train),
        settings=settings,
    )


def _sayable(text: str) -> str:
    """The text without halves of characters, as names of files may have them: no JSON could hold those."""
    return text.encode(errors="backslashreplace").decode()


@contextmanager
def cell_log(folder: Path, id: str) -> Iterator[None]:
    """What happens to a cell, and every warning of a library meanwhile, goes to its ``log.txt``."""
    handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk must not stop the cell
    warned = logging.getLogger("py.warnings")
    logging.captureWarnings(True)
    for logger in (cell_logger(id), warned):
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in (cell_logger(id), warned):
            logger.removeHandler(handler)
        logging.captureWarnings(bool(warned.handlers))  # of the other cells of the pack
        with suppress(OSError):
            handler.close()
