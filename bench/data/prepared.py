"""Task data as the processes of a study share it: token arrays in files that are mapped into memory.

What makes the data (reads text, trains a BPE, tokenises, draws sequences) is done once for a store. After that a cell's
tokens are read from the disk as its batches ask for them, and the memory that holds them is one for all processes of a
machine.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from bench.config import Cell
from bench.data.task import Metric, TaskData, dataset
from bench.errors import CellError
from bench.store import Store, whole_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "valid", "test")
TOKENIZER = "tokenizer"


def cell_data(cell: Cell, store: Store) -> TaskData:
    """The data of a cell, mapped from the store; made and stored first where they are not there whole.

    Raises CellError if they are not those that the cell was planned with, UserError if they cannot be made.
    """
    from bench.plan import task_data

    folder = store.data(cell.fingerprint)
    found = load(folder)
    if found is not None:
        return found
    made = task_data(cell.task, cell.task_options)
    if made.fingerprint != cell.fingerprint:
        raise CellError(f"the data have changed: fingerprint {made.fingerprint[:12]}, planned {cell.fingerprint[:12]}")
    try:
        save(made, folder, store.folder(cell.id))
    except OSError:
        if not folder.is_dir():  # else another process has been faster
            raise
    return load(folder) or made


def save(data: TaskData, folder: Path, room: Path) -> None:
    """Write data to a folder, which is filled in another, ``room``, and appears when it is complete."""
    with whole_folder(folder, room) as target:
        for name, split in _splits(data).items():
            with pa.OSFile(str(target / f"{name}.arrow"), "wb") as file, pa.ipc.new_file(file, split.schema) as writer:
                writer.write_table(split)
        data.tokenizer().save_pretrained(target / TOKENIZER)
        about = {
            "vocab_size": data.vocab_size,
            "length": data.length,
            "fingerprint": data.fingerprint,
            "metric": asdict(data.metric),
            "bytes_per_token": data.bytes_per_token,
            "tests": list(data.tests),
        }
        (target / "data.json").write_text(json.dumps(about, indent=1))


def load(folder: Path) -> TaskData | None:
    """The data in a folder, mapped into memory; None if it is missing or damaged."""
    try:
        about = json.loads((folder / "data.json").read_text())
        tests, metric = about.pop("tests"), Metric(**about.pop("metric"))
        found = {
            name: dataset(_mapped(folder / f"{name}.arrow"), name, about["fingerprint"]) for name in (*SPLITS, *tests)
        }
        main = {name: found.pop(name) for name in SPLITS}
        return TaskData(**main, **about, metric=metric, tokenizer=partial(_tokenizer, folder / TOKENIZER), tests=found)
    except (OSError, ValueError, KeyError, TypeError):  # Arrow's own errors are of these kinds
        return None


def _mapped(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _splits(data: TaskData) -> dict[str, pa.Table]:
    splits = {**{name: getattr(data, name) for name in SPLITS}, **data.tests}
    return {name: split.data.table for name, split in splits.items()}


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return found
