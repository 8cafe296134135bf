"""Progress of a study: bars on a terminal, lines elsewhere, and the time that is left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

SOON, HEARTBEAT = 5.0, 30.0  # seconds between signs of life where there is no terminal: at first, and at most
WIDE, WIDE_BAR, BAR = 100, 24, 8  # columns of a terminal that has room for more; of a bar there, and of one elsewhere


class TimeLeft:
    """How long cells still take: what they are planned to cost, at the speed of all steps seen so far, tests of
    finished cells counted in.
    """

    def __init__(self, costs: Mapping[str, float]) -> None:
        """costs: training FLOPs by cell, of all that are not done."""
        self._costs, self._shares = dict(costs), dict[str, float]()
        self._did, self._since = 0.0, 0.0

    def step(self, key: str, share: float) -> None:
        """A cell has done so much of its training; its first word only tells where it goes on from."""
        self._since = self._since or time.monotonic()
        self._did += self._costs.get(key, 0.0) * (share - self._shares.get(key, share))
        self._shares[key] = share

    def end(self, key: str, done: bool) -> None:
        """A cell has ended, here or elsewhere."""
        if done and self._since:
            self._did += self._costs.get(key, 0.0) * (1 - self._shares.get(key, 0.0))
        self._costs.pop(key, None)

    def seconds(self) -> float | None:
        """Until the last cell ends; None before there is a speed to tell by."""
        took = time.monotonic() - self._since
        if not self._since or self._did <= 0 or took <= 0:
            return None
        left = sum(cost * (1 - self._shares.get(key, 0.0)) for key, cost in self._costs.items())
        return left / self._did * took

    def words(self) -> str:
        """The same as the end of a sentence."""
        seconds = self.seconds()
        return "" if seconds is None or not self._costs else f", about {in_words(seconds)} left"


def in_words(seconds: float) -> str:
    """About how long something takes."""
    for unit, size, until in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        if seconds < until * size:
            return f"{seconds / size:.{0 if unit != 'h' else 1}f} {unit}"
    return f"{seconds / 86400:.1f} days"


class _Words(ProgressColumn):
    """What a bar says beside itself, which never is cut off: the label is broken into lines rather."""

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        tell: Callable[[Task], str] = task.fields["tell"]
        return Text(tell(task))


class Progress:
    """One bar for the study and one for each running cell, with loss, tokens/s and the time left; a context manager.

    Written to stderr. Where that is no terminal: a line when a cell ends, and a sparse line in between.
    """

    def __init__(
        self, total: int, console: Console | None = None, costs: Mapping[str, float] | None = None, what: str = "cells"
    ) -> None:
        """total: cells in the study; costs: as of ``TimeLeft``; what: they are called."""
        self.console = console or Console(stderr=True)
        self.total, self.done, self.failed, self.what = total, 0, 0, what
        self.left = TimeLeft(costs or {})
        self._labels: dict[str, tuple[str, int]] = {}
        self._rows: dict[str, TaskID] = {}
        self._began = self._spoke = time.monotonic()
        self._bars: Bars | None = None
        if self.console.is_terminal:
            width = WIDE_BAR if self.console.width >= WIDE else BAR
            columns = [
                TextColumn("{task.description}", markup=False, table_column=Column(overflow="fold")),
                BarColumn(bar_width=width, table_column=Column(no_wrap=True, min_width=width)),
                _Words(),
            ]
            self._bars = Bars(*columns, console=self.console)
            self._study = self._bars.add_task("study", total=total, tell=lambda _: self._of_all())

    def _of_all(self) -> str:
        failed = f", {self.failed} failed" if self.failed else ""
        took = timedelta(seconds=int(time.monotonic() - self._began))
        return f"{self.done}/{self.total} {self.what}{failed}, {took}{self.left.words()}"

    def __enter__(self) -> Progress:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def skip(self, count: int, failed: int = 0) -> None:
        """Count cells that were done before, and such that have failed and are not tried again."""
        self.done += count + failed
        self.failed += failed
        if count or failed:
            nothing = "; nothing to run" if count + failed == self.total else ""
            but = f", {failed} have failed" if failed else ""
            self._say(f"{count} of {self.total} {self.what} are done already{but}{nothing}")
        if self._bars is not None:
            self._bars.update(self._study, completed=self.done)

    def start(self, key: str, label: str, steps: int) -> None:
        """A cell begins its training of so many steps."""
        self._labels[key] = (label, steps)
        if self._bars is not None:
            self._rows[key] = self._bars.add_task(label, total=steps, tell=lambda _: "begins")

    def update(self, key: str, step: int, loss: float | None, tokens_per_second: float) -> None:
        """A running cell's step, its mean loss since the last update (None: not read), and its speed."""
        label, steps = self._labels[key]
        self.left.step(key, step / steps)
        if self._bars is not None:
            row = self._rows[key]
            told = "" if loss is None else f", loss {loss:.3f}"
            told += f", {tokens_per_second:,.0f} tokens/s" if self.console.width >= WIDE else ""

            def tell(task: Task) -> str:
                left = "" if task.time_remaining is None else f", {in_words(task.time_remaining)} left"
                return f"{step}/{steps}{told}{left}"

            self._bars.update(row, completed=step, tell=tell)
        else:
            now = time.monotonic()
            if now - self._spoke > min(HEARTBEAT, max(SOON, (now - self._began) / 10)):
                told = "" if loss is None else f"loss {loss:.3f}, "
                self._say(f"{label}: step {step}/{steps}, {told}{tokens_per_second:,.0f} tokens/s{self._all_left()}")

    def phase(self, key: str, text: str) -> None:
        """A running cell has done its steps; text: what it is at."""
        if self._bars is not None and key in self._rows:
            self._bars.update(self._rows[key], tell=lambda _: text)

    def _all_left(self) -> str:
        words = self.left.words().removeprefix(", ").removesuffix(" left")
        return f"; all {self.what}: {words} left" if words else ""

    def drop(self, key: str, text: str) -> None:
        """A cell stopped without an outcome and is tried again; text: why."""
        if key in self._labels:
            label = self._labels[key]
            self._say(f"{self._remove(key)}: {text}")
            self._labels[key] = label

    def finish(self, key: str, text: str, failed: bool = False) -> None:
        """A cell ended, here or in another process; text: what came out of it."""
        self.done += 1
        self.failed += failed
        self.left.end(key, not failed)
        label = self._remove(key)
        if self._bars is not None:
            self._bars.update(self._study, completed=self.done)
        self._say(f"[{self.done}/{self.total}] {label}: {text}{'' if self._bars is not None else self._all_left()}")

    def _remove(self, key: str) -> str:
        """Take a cell off the screen; its label, or its id if it has not begun here."""
        if self._bars is not None and key in self._rows:
            self._bars.remove_task(self._rows.pop(key))
        return self._labels.pop(key, (key[:12], 0))[0]

    def _say(self, line: str) -> None:
        self._spoke = time.monotonic()
        if self._bars is not None:
            self._bars.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self.console.file if self.console.file is not None else sys.stderr, flush=True)
