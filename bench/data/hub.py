"""Any text data set that ``datasets`` can load, from the hub, its cache or a local folder."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

from pydantic import Field

from bench.config import LARGEST
from bench.data.task import Task, TaskData, register
from bench.data.text import TextOptions, text_data
from bench.data.text_files import SHARES
from bench.errors import UserError, first_line, unknown


@register("hub")
class Hub(Task):
    """Text from any data set known to ``datasets``: a hub name (streamed or cached) or a local folder."""

    class Options(TextOptions):
        """Which data set is read. A split that it lacks is cut off the end of its train split.

        Attributes:
            dataset, config: as for ``datasets.load_dataset``.
            text_column: the column that holds the text.
            streaming: read without downloading the whole.
            max_documents: read at most so many of each split.
        """

        dataset: str = Field(min_length=1)
        config: str | None = None
        text_column: str = "text"
        streaming: bool = False
        max_documents: int | None = Field(None, ge=3, le=LARGEST)

    def build(self) -> TaskData:
        found = self._load()
        documents = {}
        for name, ours in (("train", "train"), ("validation", "valid"), ("test", "test")):
            if name in found:
                documents[ours] = self._texts(found[name])
        if "train" not in documents:
            raise UserError(
                f"hub.options.dataset: {self.options.dataset!r} has no train split (it has: {', '.join(found)})"
            )
        for ours in ("test", "valid"):
            if ours not in documents:
                cut = max(1, int(len(documents["train"]) * SHARES[ours]))
                documents[ours] = documents["train"][-cut:]
                documents["train"] = documents["train"][:-cut]
        return text_data(documents, self.options)

    def _load(self) -> Any:
        import datasets  # start-up

        chosen = self.options
        try:
            return datasets.load_dataset(chosen.dataset, chosen.config, streaming=chosen.streaming)
        except Exception as error:  # datasets raises many kinds, from offline mode to a wrong config name
            raise UserError(f"hub.options.dataset: cannot load {chosen.dataset!r}: {first_line(error)}") from None

    def _texts(self, split: Any) -> list[str]:
        column = self.options.text_column
        names = split.column_names or []
        if names and column not in names:
            raise unknown("hub.options.text_column", column, names)
        examples: Iterable[dict[str, Any]] = islice(split, self.options.max_documents)
        return [str(example[column]) + "\n" for example in examples]
