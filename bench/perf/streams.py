"""``python -m bench.perf.streams``: the memory and the time that it takes to prepare a text which is streamed.

The text is made of verses of the King James Bible in random order, as JSON lines in a folder, and read as any data set
is. Memory is that of a process of its own, above what it took before it began: its own, and with the pages of mapped
files that the system could take back at any time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bench.errors import first_line

VERSES = 20  # of a document
SHARD = 100_000_000  # bytes of a file
MIB = 1 << 20


def write_text(folder: Path, size: int) -> None:
    """Write JSON lines of about ``size`` bytes of text into the folder."""
    from bench.data.kjv import books  # start-up: of the process that is measured

    verses, rng, written = "\n".join(books().values()).split("\n"), np.random.default_rng(0), 0
    for shard in range(-(-size // SHARD)):
        with (folder / f"train-{shard:05d}.jsonl").open("w") as file:
            while written < min(size, (shard + 1) * SHARD):
                text = "\n".join(verses[at] for at in rng.integers(len(verses), size=VERSES))
                file.write(json.dumps({"text": text}) + "\n")
                written += len(text)


class Peak:
    """The most memory that this process has taken since a moment ago, in MiB; a context manager that looks often.

    own: what is of no file; resident: with the pages of files that are in memory.
    """

    def __enter__(self) -> Peak:
        self._process, self._over = psutil.Process(), threading.Event()
        self._before, self.own, self.resident = self._now(), 0.0, 0.0
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            own, resident = (now - before for now, before in zip(self._now(), self._before, strict=True))
            self.own, self.resident = max(self.own, own / MIB), max(self.resident, resident / MIB)

    def _now(self) -> tuple[int, int]:
        info = self._process.memory_info()
        return info.rss - getattr(info, "shared", 0), info.rss


def prepare(folder: Path, cache: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Prepare the text in a folder, twice: what it took the first time, and how long to find it the second time."""
    import datasets  # start-up

    from bench.data.task import get_task  # start-up

    datasets.config.HF_DATASETS_CACHE = cache
    task = get_task("hub", {"dataset": str(folder), "streaming": True, **options})
    with Peak() as peak:
        start = time.perf_counter()
        data = task.build()
        seconds = time.perf_counter() - start
    start = time.perf_counter()
    task.build()
    return {
        "tokens": sum(len(split) * data.length for split in data.splits.values()),
        "seconds": seconds,
        "own": peak.own,
        "resident": peak.resident,
        "again": time.perf_counter() - start,
        "disk": sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) / MIB,
    }


def measured(size: int, options: dict[str, Any], room: Path | None) -> dict[str, Any]:
    """What it takes to prepare so many bytes, in a process of its own; whatever is written in ``room`` is removed."""
    with tempfile.TemporaryDirectory(dir=room) as made:
        folder, cache = Path(made) / "text", Path(made) / "cache"
        folder.mkdir()
        write_text(folder, size)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(prepare, folder, cache, options).result()


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each size."""
    parser = argparse.ArgumentParser(prog="python -m bench.perf.streams", description=first_line(__doc__ or ""))
    parser.add_argument("--megabytes", type=float, nargs="+", default=[100.0, 500.0], help="of text; one line each")
    parser.add_argument("--tokenizer", default="bytes")
    parser.add_argument("--length", type=int, default=128, help="tokens of a window")
    parser.add_argument("--room", type=Path, default=None, help="folder for the text and the data, removed afterwards")
    given = parser.parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    keys = {"tokens": 15, "seconds": 10, "own": 12, "resident": 14, "again": 10, "disk": 10}
    names = ("tokens", "seconds", "own MiB", "resident MiB", "again s", "disk MiB")
    print(f"{'text MB':>10}" + "".join(f"{name:>{width}}" for name, width in zip(names, keys.values(), strict=True)))
    for size in given.megabytes:
        options = {"tokenizer": given.tokenizer, "length": given.length}
        found = measured(int(size * 1e6), options, given.room)
        print(f"{size:>10,.0f}" + "".join(f"{found[key]:>{width},.0f}" for key, width in keys.items()))


if __name__ == "__main__":
    main()
