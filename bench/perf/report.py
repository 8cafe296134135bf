"""``python -m bench.perf.report STUDY``: how long the report of thousands of stored cells takes, reading included.

The cells are those of a study that has been run, stored again under more seeds, each with noise of its own on its
scores, so that no interval and no bootstrap has less to do than with cells that were trained.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.errors import first_line
from bench.perf.resident import peak_bytes
from bench.run.upgrade import open_store
from bench.store.digests import sealed
from bench.store.store import Store
from bench.store.versions import TRACES

NOISE = 0.01
SCORES = ("loss", "accuracy", "bits_per_byte", "area", "gain", "mean", "threshold", "signal", "rank")


def multiplied(store: Store, study: str, cells: int, root: Path) -> None:
    """Write the study into the folder ``root`` with at least ``cells`` cells, all done, by giving it more seeds."""
    manifest = store.manifest(study)
    if manifest is None:
        raise SystemExit(f"study {study!r} has not been run: nothing to multiply")
    results = store.results(cell.id for cell in manifest.cells)
    templates = [cell for cell in manifest.cells if cell.id in results and results[cell.id].status == "done"]
    kinds = {(cell.variant, cell.task): cell for cell in templates}
    seeds = range(-(-cells // len(kinds)))
    rng = np.random.default_rng(0)
    written = []
    for seed in seeds:
        for number, template in enumerate(kinds.values()):
            cell = template.but(seed=seed, id=f"{seed:032x}{number:032x}")
            record = _noisy(results[template.id].dump(), -abs(float(rng.normal(0, NOISE))))  # no accuracy is above 1
            folder = root / cell.id
            folder.mkdir(parents=True)
            (folder / "result.json").write_bytes(sealed({**record, "id": cell.id}))
            for name in TRACES:
                shutil.copyfile(store.folder(template.id) / name, folder / name)
            written.append(cell)
    Store(root).write_manifest(study, manifest.but(seeds=list(seeds), cells=written))


def _noisy(value: Any, shift: float, name: str = "") -> Any:
    """The record with every score moved by the same share."""
    if isinstance(value, dict):
        return {key: _noisy(part, shift, key) for key, part in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [_noisy(part, shift) for part in value]
    if not name.removeprefix("test_").removeprefix("valid_").startswith(SCORES):
        return value
    if isinstance(value, list):
        return [part * (1 + shift) if isinstance(part, float) else part for part in value]
    return value * (1 + shift) if isinstance(value, float) else value


def _busy() -> float:
    """Seconds of CPU so far, those of finished child processes included."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main() -> None:
    """Print the seconds of reading and of writing."""
    from reports.page import write_report  # start-up: of the processes that render
    from reports.read import read  # start-up

    parser = argparse.ArgumentParser(prog="python -m bench.perf.report", description=first_line(__doc__ or ""))
    parser.add_argument("study", help="a study that has been run")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the results")
    parser.add_argument("--cells", type=int, default=5000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        multiplied(open_store(arguments.runs), arguments.study, arguments.cells, Path(folder))
        start, busy = time.perf_counter(), _busy()
        store = Store(Path(folder))
        manifest = store.manifest(arguments.study)
        assert manifest is not None
        results = read(store, manifest)
        reading, reading_busy = time.perf_counter() - start, _busy() - busy
        paths = write_report(manifest, results, Path(folder) / "report")
        whole, whole_busy = time.perf_counter() - start, _busy() - busy
    peak = peak_bytes() / 2**30
    shape = f"{len(manifest.tasks)} tasks x {len(manifest.variants)} variants x {len(manifest.seeds)} seeds"
    print(f"{len(results):,} cells ({shape}), {len(paths)} files, peak {peak:.1f} GiB")
    print(f"{'':<10}{'seconds':>10}{'CPU s':>10}")
    for name, *numbers in (
        ("reading", reading, reading_busy),
        ("writing", whole - reading, whole_busy - reading_busy),
        ("whole", whole, whole_busy),
    ):
        print(f"{name:<10}" + "".join(f"{number:>10.1f}" for number in numbers))


if __name__ == "__main__":
    main()
