"""Progress of a study: bars on a terminal, a line for each cell elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

HEARTBEAT = 30.0  # seconds between signs of life where there is no terminal


class Progress:
    """One bar for the study and one for each running cell, with loss, tokens/s and the time left; a context manager.

    Written to stderr. Where that is no terminal: a line when a cell ends, and a sparse line in between.
    """

    def __init__(self, total: int, console: Console | None = None) -> None:
        """total: cells in the study."""
        self.console = console or Console(stderr=True)
        self.total, self.done, self.failed = total, 0, 0
        self._labels: dict[str, tuple[str, int]] = {}
        self._rows: dict[str, TaskID] = {}
        self._spoke = time.monotonic()
        self._bars: Bars | None = None
        if self.console.is_terminal:
            self._bars = Bars(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._study = self._bars.add_task("study", total=total, text="")

    def __enter__(self) -> Progress:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def skip(self, count: int) -> None:
        """Count cells that were done before."""
        self.done += count
        if count:
            self._say(
                f"{count} of {self.total} cells are done already{'; nothing to run' if count == self.total else ''}"
            )
        if self._bars is not None:
            self._bars.update(self._study, completed=self.done)

    def start(self, key: str, label: str, steps: int) -> None:
        """A cell begins its training of so many steps."""
        self._labels[key] = (label, steps)
        if self._bars is not None:
            self._rows[key] = self._bars.add_task(label, total=steps, text="")

    def update(self, key: str, step: int, loss: float, tokens_per_second: float) -> None:
        """A running cell's step, its mean loss since the last update, and its speed."""
        text = f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s"
        if self._bars is not None:
            self._bars.update(self._rows[key], completed=step, text=text)
        elif time.monotonic() - self._spoke > HEARTBEAT:
            label, steps = self._labels[key]
            self._say(f"{label}: step {step}/{steps}, {text}")

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
        label = self._remove(key)
        if self._bars is not None:
            self._bars.update(self._study, completed=self.done, text=f"{self.failed} failed" if self.failed else "")
        self._say(f"[{self.done}/{self.total}] {label}: {text}")

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
