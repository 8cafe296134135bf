"""Figures as files, which say what they were made from: that is what a report spends its time on."""

from __future__ import annotations

import hashlib
import io
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from bench.errors import UserError, typed_line, unknown
from bench.store.files import check_folder

UNDATED: dict[str, dict[str, Any]] = {  # the same figure is the same file
    "png": {"Software": None},
    "svg": {"Date": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
SOURCE = {"png": "Description", "svg": "Description", "pdf": "Subject"}  # the field that a viewer shows
KINDS = tuple(UNDATED)
DPI = 200
LONGEST = 120  # bytes of a file's stem, without its digest


def file_names(named: Sequence[Sequence[str]]) -> list[str]:
    """The stem of a file for each name, which is one or several parts: the parts with ``_`` between them.

    Where a name has letters that a file should not have, is very long, or becomes another's file too (on a disk that
    does not tell upper from lower case, say), a digest of it follows. So different names are never the same file.
    """
    plain = [
        "_".join("".join(c if c.isalnum() or c in "-_" else "_" for c in part) for part in parts) for parts in named
    ]
    plain = [stem.encode()[:LONGEST].decode(errors="ignore") for stem in plain]
    same = Counter(map(_on_any_disk, plain))
    return [
        stem if stem == "_".join(parts) and same[_on_any_disk(stem)] == 1 else f"{stem}+{_digest(parts)}"
        for parts, stem in zip(named, plain, strict=True)
    ]


def _on_any_disk(stem: str) -> str:
    return unicodedata.normalize("NFKC", stem).casefold()


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).hexdigest()[:8]


def check_output(out: str | Path | None, formats: Sequence[str]) -> None:
    """Raises UserError for a folder that cannot be one, for a format that there is not, and without PNG."""
    check_folder(out)
    if isinstance(formats, str):
        raise UserError(f"formats: {formats!r} is one text (allowed: a list of {', '.join(KINDS)})")
    for kind in formats:
        if kind not in KINDS:
            raise unknown("format of figures:", kind, KINDS)
    if "png" not in formats:
        raise UserError(f"formats of figures: {', '.join(formats)} lack png, which the page shows")


def render(figure: Figure, source: str, kinds: tuple[str, ...]) -> dict[str, bytes]:
    """The figure's files by kind, in matplotlib's present style. It is laid out once, so that all of them are alike.
    source: what it was made from.
    """
    files = {}
    figure.dpi = DPI
    if engine := figure.get_layout_engine():
        engine.execute(figure)
    with mpl.rc_context({"figure.constrained_layout.use": False, "figure.autolayout": False}):
        figure.set_layout_engine(None)  # any engine, even one that does nothing, has every file drawn twice
    for kind in kinds:
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=DPI, metadata={**UNDATED[kind], SOURCE[kind]: source})
        files[kind] = buffer.getvalue()
    return files


@contextmanager
def without_glyph_warnings() -> Iterator[None]:
    """Matplotlib warns of every letter that its font lacks each time that it measures a text; a report says so once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def lacking(texts: Iterable[str]) -> list[str]:
    """The letters of texts that the figures' font lacks, and draws a box for."""
    font = get_font(findfont(FontProperties()))
    return sorted(letter for letter in {*"".join(texts)} if not font.get_char_index(ord(letter)))


def rendered(
    figures: Iterable[tuple[Figure, str]], kinds: tuple[str, ...], style: Any, pool: Executor | None
) -> Iterator[dict[str, bytes] | str]:
    """``render`` of each with its source, in their order and in a style of matplotlib's: here as they are asked for, or
    all of them at once in a pool's processes (``reports.pool``). Of a figure that cannot be rendered, why not.
    """
    one = partial(_one, kinds=kinds, style=style)
    if pool is None:
        yield from map(one, figures)
        return
    begun = [(sourced, pool.submit(one, sourced)) for sourced in figures]
    for sourced, future in begun:
        try:
            yield future.result()
        except Exception:  # it cannot be sent to another process, say since it holds a function
            yield one(sourced)


def _one(sourced: tuple[Figure, str], kinds: tuple[str, ...], style: Any) -> dict[str, bytes] | str:
    with mpl.rc_context(style), without_glyph_warnings():
        try:
            return render(*sourced, kinds)
        except Exception as error:  # a text that is no formula, say: the report has other figures
            return typed_line(error)
