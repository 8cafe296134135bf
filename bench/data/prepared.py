"""Task data as the processes of a study share it: token arrays in files that are mapped into memory.

What makes the data (reads text, trains a BPE, tokenises, draws sequences) is done once for a store. After that a cell's
tokens are read from the disk as its batches ask for them, and the memory that holds them is one for all processes of a
machine. The files have digests: a damaged one is never trained on, but made again. Text that is streamed is prepared
when a study is planned, in the cache of ``datasets``; a store then has the same files under another name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from bench.config import Cell
from bench.data.task import SPLITS, Metric, Processor, TaskData, dataset, get_task, task_data, with_augmentation
from bench.errors import CellError, UserError
from bench.form import TEXT, Form
from bench.store.digests import digests_in, read_sealed, write_sealed
from bench.store.files import atomic_write, whole_folder
from bench.store.store import Store
from bench.store.versions import read

if TYPE_CHECKING:
    import pyarrow as pa

ABOUT, TOKENIZER = "data.json", "tokenizer"
KEPT = 1  # raise it when the same task makes other data


def prepare(cells: Iterable[Cell], store: Store) -> None:
    """Store the data of all of the cells. What cannot be made or written, the cells themselves will tell."""
    for cell in {cell.fingerprint: cell for cell in cells}.values():
        with suppress(CellError, UserError, OSError):
            cell_data(cell, store)


def cell_data(cell: Cell, store: Store) -> TaskData:
    """The data of a cell, mapped from the store; made and stored first where they are not there whole.

    Raises CellError if they are not those that the cell was planned with, UserError if they cannot be made.
    """
    folder, room = store.data(cell.fingerprint), store.folder(cell.id)
    found = load_prepared(folder)
    if found is not None:
        return with_augmentation(found, get_task(cell.task, cell.task_options))
    made = task_data(cell.task, cell.task_options)
    if made.fingerprint != cell.fingerprint:
        raise CellError(f"the data have changed: fingerprint {made.fingerprint[:12]}, planned {cell.fingerprint[:12]}")
    return with_augmentation(_stored(made, folder, room), get_task(cell.task, cell.task_options))


def kept(of: Mapping[str, Any], make: Callable[[Path], TaskData]) -> TaskData:
    """Data that are made once for a machine, in files, since they may not fit into memory.

    They lie in the cache of ``datasets``, which may be removed: they are made again then.

    Args:
        of: all that they are made of.
        make: makes them in an empty folder, where it may put what takes room meanwhile.
    """
    import datasets  # start-up

    root = Path(datasets.config.HF_DATASETS_CACHE) / "cyclebench"
    name = hashlib.sha256(json.dumps([KEPT, of], sort_keys=True).encode()).hexdigest()
    index = root / f"{name}.json"
    with suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads(index.read_text())
        found = load_prepared(root / known["fingerprint"])
        if found is not None:
            return replace(found, notes=tuple(known["notes"]))
    root.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=root) as room:
        made = make(Path(room))
        found = _stored(made, root / made.fingerprint, Path(room))
    told = {"fingerprint": made.fingerprint, "notes": made.notes, "of": of}  # other rows may make the same data
    atomic_write(index, json.dumps(told, indent=1).encode())
    return replace(found, notes=made.notes)


def _stored(made: TaskData, folder: Path, room: Path) -> TaskData:
    """The data as they are in a folder, mapped; put there first where they are not there whole."""
    room.mkdir(parents=True, exist_ok=True)
    if not _saved(made, folder, room):
        found = load_prepared(folder)
        if found is not None:  # of a process that has been faster
            return found
        aside = room / f".damaged.{os.getpid()}"
        with suppress(FileNotFoundError):  # another one has found the same damage
            os.rename(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)
        _saved(made, folder, room)
    found = load_prepared(folder)
    if found is None and made.folder is not None:
        raise CellError(f"the data in {made.folder} are damaged: they are made again when they are next wanted")
    return found or made


def _saved(made: TaskData, folder: Path, room: Path) -> bool:
    """Whether the data could be saved; not if there is something already."""
    try:
        save(made, folder, room)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            return False
        raise
    return True


def save(data: TaskData, folder: Path, room: Path) -> None:
    """Write data to a folder, which is filled in another, ``room``, and appears when it is complete. Raises OSError if
    it is there already.
    """
    import pyarrow as pa  # start-up

    with whole_folder(folder, room) as target:
        if data.folder is not None and data.folder.is_dir():
            shutil.copytree(data.folder, target, copy_function=_link, dirs_exist_ok=True)
            return
        for name, split in data.splits.items():
            table = split.data.table
            with (
                pa.OSFile(str(target / f"{name}.arrow"), "wb") as file,
                pa.ipc.new_file(file, table.schema) as writer,
            ):
                writer.write_table(table)
        if (processor := data.tokenizer()) is not None:
            processor.save_pretrained(target / TOKENIZER)
        about = {
            "vocab_size": data.vocab_size,
            "length": data.length,
            "fingerprint": data.fingerprint,
            "metric": asdict(data.metric),
            "bytes_per_token": data.bytes_per_token,
            "tests": list(data.tests),
            **({} if data.form == TEXT else {"form": data.form.model_dump(mode="json", exclude_defaults=True)}),
            "digests": digests_in(target),
        }
        write_sealed(target / ABOUT, about)


def load_prepared(folder: Path) -> TaskData | None:
    """The data in a folder of the name of their fingerprint, mapped into memory, without notes; None if they are
    missing or damaged. Nothing of the folder is needed by name afterwards. Raises OSError if it cannot be read.
    """
    try:
        about = read_sealed(folder / ABOUT)
        found = digests_in(folder)
        del found[ABOUT]
        if about.pop("digests") != found or about["fingerprint"] != folder.name:
            return None
        tests, metric, form = about.pop("tests"), Metric(**about.pop("metric")), Form(**about.pop("form", {}))
        splits = {name: dataset(_mapped(folder / f"{name}.arrow"), name, folder.name) for name in (*SPLITS, *tests)}
        main, tokenizer = {name: splits.pop(name) for name in SPLITS}, _tokenizer(folder / TOKENIZER)
    except OSError as error:
        if error.errno in (None, errno.ENOENT):  # moved away meanwhile; transformers' own has no number
            return None
        raise
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return TaskData(**main, **about, metric=metric, tokenizer=lambda: tokenizer, tests=splits, folder=folder, form=form)


def prepared_shape(folder: Path) -> tuple[int, int] | None:
    """Vocabulary and length of the data in a folder, by what is told of them alone; None if that is missing."""
    try:
        about = read(folder / ABOUT) or {}
        return int(about["vocab_size"]), int(about["length"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _link(source: str, target: str) -> None:
    """The same file under another name, a copy where that is on another disk: no file of prepared data is changed."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _mapped(path: Path) -> pa.Table:
    import pyarrow as pa  # start-up

    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _tokenizer(folder: Path) -> Processor | None:
    from transformers import AutoImageProcessor, AutoTokenizer  # start-up

    if not folder.exists():
        return None
    auto: Any = AutoImageProcessor if (folder / "preprocessor_config.json").exists() else AutoTokenizer
    found: Processor = auto.from_pretrained(folder)
    return found
