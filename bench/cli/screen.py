"""How commands write to the screen: tables that fit it, JSON for other programs, a word before a long start."""

from __future__ import annotations

import atexit
import json
import re
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

if TYPE_CHECKING:
    from rich.console import Console

Rows = Sequence[Mapping[str, str]]
"""Of a table, text by column."""
PIPE = 180  # letters in a line where there is no terminal to tell
PROSE = 26  # letters: text in words is broken into lines no shorter than this
TICK = 1.0  # seconds between two looks at the clock
_NUMBER = re.compile(r"[-+\[(<>]*\d|-?$")
Json = Annotated[bool, typer.Option("--json", help="Write JSON, for other programs.")]


def screen() -> Console:
    """Standard output, at a width that holds the tables where there is no terminal to tell one; what rich would take
    for its own in a label is shown as it is.
    """
    from rich.console import Console  # start-up

    return Console(width=None if sys.stdout.isatty() else PIPE, markup=False, emoji=False)


def tell_json(value: Any) -> None:
    """Print a value as JSON."""
    print(json.dumps(value, indent=2))


def starting(what: str) -> None:
    """Say on a terminal what is at work, and for how long, until anything else is written: libraries take seconds to
    be loaded.
    """
    if sys.stderr.isatty():
        _Waiting(f"{what} ...")


class _Waiting:
    """A line that counts seconds; whatever is written to the screen ends it."""

    def __init__(self, text: str) -> None:
        self.text, self.began, self.ended = text, time.monotonic(), threading.Event()
        self.before, self.lock = (sys.stdout, sys.stderr), threading.Lock()
        sys.stderr.write(text)
        sys.stderr.flush()
        self.ours = _Ending(sys.stdout, self), _Ending(sys.stderr, self)
        sys.stdout, sys.stderr = self.ours
        threading.Thread(target=self.count, daemon=True).start()
        atexit.register(self.end)

    def count(self) -> None:
        while not self.ended.wait(TICK):
            with self.lock:
                if not self.ended.is_set():
                    self.before[1].write(f"\r{self.text} {time.monotonic() - self.began:.0f} s")
                    self.before[1].flush()

    def end(self) -> None:
        with self.lock:
            if self.ended.is_set():
                return
            self.ended.set()
            self.before[1].write("\n")
            self.before[1].flush()
            if (sys.stdout, sys.stderr) == self.ours:  # else somebody has put others there, who write to these
                sys.stdout, sys.stderr = self.before


class _Ending:
    """A stream that ends a line which counts when it is written to."""

    def __init__(self, stream: TextIO, waiting: _Waiting) -> None:
        self._stream, self._waiting = stream, waiting

    def write(self, text: str) -> int:
        self._waiting.end()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def say(text: str) -> None:
    """Print a sentence: on a terminal in lines of whole words, elsewhere in one."""
    if sys.stdout.isatty():
        screen().print(text, highlight=False)
    else:
        print(text)


def show(title: str, rows: Rows, spare: Sequence[str] = (), below: str = "", by: str = "") -> None:
    """Print a table that fits the screen.

    Where it is too wide, columns are left out, and that is told; where it is then still too wide, each row is a block
    with a line for each column.

    Args:
        title: above it.
        rows: all with the same columns; none prints nothing.
        spare: columns that may be left out, the first one first.
        below: what is to be said of it.
        by: a column; a line is drawn where its value changes.
    """
    if not rows:
        return
    from rich.table import Table  # start-up

    console, columns, gone = screen(), list(rows[0]), []
    for name in spare:
        if _width(rows, columns) <= console.width:
            break
        if name in columns:
            columns.remove(name)
            gone.append(name)
    if _width(rows, columns) > console.width:
        _stack(console, title, rows)
    else:
        table = Table(title=title, title_justify="left", caption=below or None, caption_justify="left")
        for name in columns:
            number = all(_NUMBER.match(row[name]) for row in rows)
            prose = _prose(rows, name)
            justify: Any = "right" if number else "left"
            table.add_column(name, justify=justify, no_wrap=not prose and not number, overflow="fold")
        for row, after in zip(rows, [*rows[1:], None], strict=True):
            ends = bool(by) and after is not None and after[by] != row[by]
            table.add_row(*(row[name] for name in columns), end_section=ends)
        console.print(table)
        if gone:
            console.print(f"Left out for want of room: {', '.join(gone)}.")
        return
    if below:
        console.print(below)


def fits(rows: Rows) -> bool:
    """Whether ``show`` has room for all columns."""
    return _width(rows, list(rows[0])) <= screen().width


def _prose(rows: Rows, column: str) -> bool:
    """Whether a column is of text in words, which may be broken into lines."""
    return any(" " in line and len(line) > PROSE for row in rows for line in row[column].splitlines())


def _width(rows: Rows, columns: Sequence[str]) -> int:
    """Letters that a table takes at least."""
    return 1 + sum(3 + _least(rows, name) for name in columns)


def _least(rows: Rows, column: str) -> int:
    lines = [line for row in rows for line in row[column].splitlines()] or [""]
    head = max(map(len, column.split()), default=0)
    longest = max(map(len, lines))
    return max(head, PROSE if _prose(rows, column) else longest)


def _stack(console: Console, title: str, rows: Rows) -> None:
    """Each row as a block: a name and a value a line."""
    from rich.table import Table  # start-up

    console.print(title, style="italic")
    for row in rows:
        console.rule(style="dim")
        block = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        block.add_column(overflow="fold")
        block.add_column(overflow="fold")
        for name, value in row.items():
            if value:
                block.add_row(name, value)
        console.print(block)
    console.rule(style="dim")
