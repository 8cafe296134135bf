"""Rows of any data set that ``datasets`` can load: from the hub, its cache, a local folder or a local file."""

from __future__ import annotations

import glob
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import Field

from bench.config import LARGEST
from bench.data.text import TextOptions, looked_in
from bench.errors import UserError, first_line, unknown

if TYPE_CHECKING:
    import pyarrow as pa

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}
ROWS = 1000  # at a time
SPLITS = {"train": "train", "validation": "valid", "test": "test"}  # our names by those of most data sets
SAVED = ("state.json", "dataset_dict.json")  # files in the folder of what ``save_to_disk`` of ``datasets`` has written
SHOWN = 60  # characters of a wrong value


class RowOptions(TextOptions):
    """Which data set is read. A split that it lacks is cut off the end of its train split.

    Attributes:
        dataset: as for ``datasets.load_dataset``, a local file, or the folder of what ``save_to_disk`` has written.
        config: likewise.
        max_documents: read at most so many rows of each split.
    """

    dataset: str = Field(min_length=1)
    config: str | None = None
    max_documents: int | None = Field(None, ge=3, le=LARGEST)


class Source(Protocol):
    """What options tell of the data set to be read."""

    @property
    def dataset(self) -> str: ...
    @property
    def config(self) -> str | None: ...
    @property
    def max_documents(self) -> int | None: ...


def saved(dataset: str) -> bool:
    """Whether it is the folder of what ``save_to_disk`` of ``datasets`` has written."""
    return any((Path(dataset) / name).is_file() for name in SAVED)


class Rows:
    """The rows of a data set as a task reads them: what is no text is refused, what is missing is left out."""

    def __init__(self, task: str, options: Source) -> None:
        """task: whose options errors name."""
        self.where, self.options = f"{task}.options", options
        self._left = Counter[tuple[str, str]]()

    def source(self) -> str:
        """What tells this data set, in this state, from every other: the folder that ``datasets`` caches it in.

        Raises UserError if it cannot be found.
        """
        import datasets  # start-up

        if saved(self.options.dataset):
            states = {name: split._fingerprint for name, split in self._saved().items()}
            return f"{Path(self.options.dataset).resolve()} {json.dumps(states, sort_keys=True)}"
        try:
            return str(datasets.load_dataset_builder(**self._arguments()).cache_dir)
        except Exception as error:
            raise self._unloadable(error) from None

    def splits(self, streaming: bool = False) -> dict[str, Any]:
        """The data set's splits by our names. Raises UserError if there is no such data set, or none to train on."""
        import datasets  # start-up

        try:
            read = partial(datasets.load_dataset, **self._arguments(), streaming=streaming)
            found = self._saved() if saved(self.options.dataset) else read()
        except Exception as error:  # datasets raises many kinds, from offline mode to a wrong config name
            raise self._unloadable(error) from None
        if "train" not in found:
            raise UserError(
                f"{self.where}.dataset: {self.options.dataset!r} has no train split (it has: {', '.join(found)})"
            )
        return {ours: found[name] for name, ours in SPLITS.items() if name in found}

    def read(self, name: str, split: Any, columns: Mapping[str, str]) -> Iterator[tuple[int, pa.Table]]:
        """A split's rows, some at a time, with the number of the first.

        columns: those that are wanted, by the option that names each. Raises UserError if one is missing, or if the
        rows cannot be read.
        """
        wanted, first = list(dict.fromkeys(columns.values())), 0
        if split.column_names:  # not known of every stream
            self._check(columns, split.column_names)
            split = split.select_columns(wanted)
        if self.options.max_documents is not None:
            split = split.take(min(self.options.max_documents, len(split) if hasattr(split, "__len__") else 1 << 62))
        parts = iter(split.with_format("arrow").iter(ROWS))
        while True:
            try:
                table: pa.Table = next(parts)
            except StopIteration:
                return
            except Exception as error:
                raise self._error(f"cannot read split {name!r} from row {first} on, of", error) from None
            self._check(columns, table.column_names)
            yield first, table.select(wanted)
            first += len(table)

    def texts(self, name: str, first: int, column: str, values: pa.ChunkedArray) -> pa.Array:
        """The texts of a column, null where a row has none that can be used, which is counted.

        name: of the split; first: the number of the first row. Raises UserError for what is no text, with its row.
        """
        import pyarrow as pa  # start-up
        import pyarrow.compute as pc  # start-up

        if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
            found = values.to_pylist()
            if isinstance(values.type, pa.JsonType):  # of values of several kinds, each written out
                found = [None if value is None else json.loads(value) for value in found]
            for place, value in enumerate(found):
                if value is not None and not isinstance(value, str):
                    raise self.refused(name, first + place, column, value, "text, or null, which is left out")
            values = pa.chunked_array([found], pa.string())
        try:
            values.validate(full=True)
        except pa.ArrowInvalid as error:
            raise self._error(f"split {name!r}, rows from {first} on, column {column!r} of", error) from None
        array = values.cast(pa.large_string()).combine_chunks()
        nul = pc.fill_null(pc.match_substring(array, "\0"), False)
        self.leave_out(name, f"no text in column {column!r}", array.null_count)
        self.leave_out(name, f"the character NUL in column {column!r}", nul.true_count)
        return pc.if_else(nul, None, array)

    def leave_out(self, name: str, why: str, count: int = 1) -> None:
        """Count rows of a split that are left out, for the notes."""
        self._left[name, why] += count

    def notes(self) -> list[str]:
        """How many rows were left out, and why, in words."""
        return [f"{count:,} rows of {name} left out: {why}" for (name, why), count in self._left.items() if count]

    def refused(self, name: str, row: int, column: str, value: Any, allowed: str) -> UserError:
        """The error for a value that is not allowed."""
        shown = repr(value)
        shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
        return UserError(
            f"{self.where}.dataset: {self.options.dataset!r}, split {name!r}, row {row}, column {column!r} holds "
            f"{shown} (allowed: {allowed})"
        )

    def _check(self, columns: Mapping[str, str], names: list[str]) -> None:
        for option, column in columns.items():
            if column not in names:
                raise unknown(f"{self.where}.{option}", column, names)

    def _saved(self) -> dict[str, Any]:
        """What ``save_to_disk`` has written, by the names that ``datasets`` gives splits: mapped from its files."""
        import datasets  # start-up
        from datasets.data_files import SPLIT_KEYWORDS  # start-up

        if self.options.config is not None:
            raise UserError(f"{self.where}.config: {self.options.config!r} (allowed: none, of what save_to_disk wrote)")
        found = datasets.load_from_disk(self.options.dataset)
        called = {name: str(split) for split, names in SPLIT_KEYWORDS.items() for name in names}
        splits = found if isinstance(found, dict) else {"train": found}
        return {called.get(name, name): split for name, split in splits.items()}

    def _arguments(self) -> dict[str, Any]:
        path = Path(self.options.dataset)
        reader = next((READERS[suffix] for suffix in path.suffixes[::-1] if suffix in READERS), None)
        if path.is_file() and not path.stat().st_size:
            raise UserError(f"{self.where}.dataset: {self.options.dataset!r} is empty (allowed: a file with rows)")
        if path.is_file() and reader is None:
            raise UserError(
                f"{self.where}.dataset: {self.options.dataset!r} is a file of a kind that is not read (allowed: "
                f"{', '.join(READERS)}, or compressed: .json.gz)"
            )
        if path.is_file() and self.options.config is not None:
            raise UserError(f"{self.where}.config: {self.options.config!r} with a local file (allowed: none)")
        if path.is_file():
            # escaped: `datasets` takes a name with brackets for a pattern
            return {"path": reader, "data_files": glob.escape(str(path))}
        return {"path": self.options.dataset, "name": self.options.config}

    def _unloadable(self, error: Exception) -> UserError:
        given = Path(self.options.dataset)
        looked = "" if given.exists() else f", neither a file nor a folder{looked_in(given)}"
        return self._error("cannot load", error, looked)

    def _error(self, what: str, error: Exception, more: str = "") -> UserError:
        if isinstance(error, UserError):
            return error
        # What datasets says of a damaged file is in the error that its own comes from.
        reason = first_line(error.__cause__ or error)
        return UserError(f"{self.where}.dataset: {what} {self.options.dataset!r}{more}: {reason}")
