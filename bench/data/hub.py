"""Any text data set that ``datasets`` can load, from the hub, its cache or a local folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.data.prepared import kept
from bench.data.rows import RowOptions, Rows
from bench.data.task import Task, TaskData, register
from bench.data.text import text_data
from bench.data.text_files import SHARES
from bench.data.tokenizers import identity

if TYPE_CHECKING:
    import pyarrow as pa


@register("hub")
class Hub(Task):
    """Text from any data set known to ``datasets``: a hub name (streamed or cached), a local folder or file."""

    class Options(RowOptions):
        """Which data set is read. A split that it lacks is cut off the end of its train split.

        Rows without text (null) are left out and counted; what is not text is refused.

        Attributes:
            text_column: the column that holds the text.
            streaming: read without downloading the whole, and without holding it in memory: it is tokenised once, into
                files in the cache of ``datasets``, however long it is.
        """

        text_column: str = "text"
        streaming: bool = False

    def build(self) -> TaskData:
        rows, options = Rows("hub", self.options), self.options
        if not options.streaming:
            return self._made(rows, None)
        told = options.model_dump(mode="json", exclude_defaults=True)
        of = {"task": self.name, "options": told, "source": rows.source(), "tokenizer": identity(options.tokenizer)}
        return kept(of, lambda room: self._made(rows, room))

    def _made(self, rows: Rows, room: Path | None) -> TaskData:
        found = rows.splits(self.options.streaming)
        documents = {name: self._documents(rows, name, split, room) for name, split in found.items()}
        for name in ("test", "valid"):
            if name not in documents:
                cut = max(1, int(len(documents["train"]) * SHARES[name]))
                documents[name] = documents["train"].part(-cut, None)
                documents["train"] = documents["train"].part(0, -cut)
        return text_data(documents, self.options, rows.notes(), room)

    def _documents(self, rows: Rows, name: str, split: Any, room: Path | None) -> Documents:
        """The texts of a split, in memory or in a file in ``room``."""
        import pyarrow as pa  # start-up

        column = self.options.text_column
        parts = (
            rows.texts(name, first, column, table[column]).drop_null()
            for first, table in rows.read(name, split, {"text_column": column})
        )
        if room is None:
            return Documents(pa.chunked_array(parts, pa.large_string()))
        path, schema = room / f"{name}.arrow", pa.schema({"text": pa.large_string()})
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for part in parts:
                writer.write_batch(pa.record_batch([part], schema=schema))
        return Documents(pa.ipc.open_file(pa.memory_map(str(path))).read_all()["text"])


class Documents:
    """Texts in Arrow's memory, or mapped from a file, each with a line end behind it."""

    def __init__(self, texts: pa.ChunkedArray) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def __iter__(self) -> Iterator[str]:
        for chunk in self._texts.chunks:
            for text in chunk.to_pylist():
                yield f"{text}\n"

    def part(self, start: int, stop: int | None) -> Documents:
        """Those from one place to another, which count from the end where they are negative."""
        start, stop, _ = slice(start, stop).indices(len(self))
        return Documents(self._texts.slice(start, stop - start))
