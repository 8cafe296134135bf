"""What stands in more than one split: windows, which are left out, and long passages of text, which are counted.

Everything is compared by digests of 64 bits, in memory that does not grow with the text: of a long held-out split a
sample of the passages is looked for, chosen by their digests, so that the same ones are chosen in every split.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.data.columns import pieces

Digests = NDArray[np.uint64]

PASSAGE = 100  # bytes of UTF-8, about 18 words of English: longer than what two authors write by chance
KEPT = 1 << 20  # passages of a held-out split to look for at most
CHUNK = 1 << 17  # bytes at a time
TABLE = 24  # bits of the table that says at once that a passage is not among those looked for
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def in_others(ids: NDArray[Any], others: Sequence[NDArray[Any]]) -> NDArray[np.bool_]:
    """Which windows [N, T] stand in one of the other splits, of windows as long, as well."""
    held = np.unique(np.concatenate([np.concatenate(list(_windows(other))) for other in others]))
    found = [_among(digests, held)[1] for digests in _windows(ids)]
    return np.concatenate([np.empty(0, bool), *found])


def _windows(ids: NDArray[Any]) -> Iterator[Digests]:
    """Digests of windows [N, T], some at a time."""
    places = np.arange(1, ids.shape[1] + 1, dtype=np.uint64) * GOLDEN
    for part in pieces(*ids.shape):
        yield _mixed(ids[part].astype(np.uint64) + places).sum(1)


def _among(digests: Digests, held: Digests) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Where digests would stand among held ones, which are sorted, and which of them do."""
    at = np.searchsorted(held, digests).clip(max=max(0, len(held) - 1))
    return at, held[at] == digests if len(held) else np.zeros(len(digests), bool)


def shared_passages(documents: Mapping[str, Iterable[str]], n_bytes: Mapping[str, int]) -> list[str]:
    """For each pair of the splits train, valid and test that have passages of PASSAGE bytes in common, at whatever
    place, a sentence that says how many.

    documents: by split, each joined as it is; n_bytes: how long they are.
    """
    longest = max(n_bytes["valid"], n_bytes["test"])
    skipped = max(0, (longest // KEPT).bit_length())  # one in 2 ** skipped is looked for
    held = {name: _Held(_passages(documents[name], skipped), skipped) for name in ("valid", "test")}
    among = {("test", "valid"): held["test"].among([held["valid"].digests])}
    seen = {name: np.zeros(len(held[name].digests), bool) for name in held}
    for digests in _passages(documents["train"], skipped):
        for name, split in held.items():
            split.mark(digests, seen[name])
    among |= {(name, "train"): seen[name] for name in ("test", "valid")}
    return [text for (name, other), found in among.items() if (text := held[name].told(name, other, found))]


class _Held:
    """The passages of a held-out split that are looked for: their digests, sorted, and how often each stands there."""

    def __init__(self, passages: Iterable[Digests], skipped: int) -> None:
        found = np.concatenate([np.empty(0, np.uint64), *passages])
        self.skipped = np.uint64(skipped)
        self.digests, self.counts = np.unique(found, return_counts=True)
        self.table = np.zeros(1 << TABLE, bool)
        self.table[self._place(self.digests)] = True

    def _place(self, digests: Digests) -> Digests:
        return (digests << self.skipped) >> np.uint64(64 - TABLE)

    def mark(self, digests: Digests, seen: NDArray[np.bool_]) -> None:
        """Note in ``seen`` which of the held passages are among the digests."""
        at, there = _among(digests[self.table[self._place(digests)]], self.digests)
        seen[at[there]] = True

    def among(self, others: Iterable[Digests]) -> NDArray[np.bool_]:
        """Which of the held passages are among the others' digests."""
        seen = np.zeros(len(self.digests), bool)
        for digests in others:
            self.mark(digests, seen)
        return seen

    def told(self, name: str, other: str, found: NDArray[np.bool_]) -> str:
        """How many of the passages were found, in words; '' for none."""
        n, total = int(self.counts[found].sum()), int(self.counts.sum())
        if not n:
            return ""
        sample = f", in a sample of one in {1 << self.skipped:,}" if self.skipped else ""
        return (
            f"{n:,} of {total:,} passages of {PASSAGE} bytes in {name} stand in {other} too ({n / total:.2%}{sample})"
        )


def _passages(documents: Iterable[str], skipped: int) -> Iterator[Digests]:
    """Digests of the passages that begin at every byte, chunk by chunk; of one in ``2 ** skipped`` of them."""
    limit = np.uint64((1 << (64 - skipped)) - 1)
    for chunk in _chunks(documents):
        found = _rolling(chunk)
        yield found[found <= limit] if skipped else found


def _chunks(documents: Iterable[str]) -> Iterator[NDArray[np.uint8]]:
    """The documents' bytes in a row, each chunk beginning with the last PASSAGE - 1 bytes of the one before."""
    waiting = bytearray()
    for document in documents:
        waiting += document.encode()
        while len(waiting) >= CHUNK:
            yield np.frombuffer(bytes(waiting[:CHUNK]), np.uint8)
            del waiting[: CHUNK - PASSAGE + 1]
    if len(waiting) >= PASSAGE:
        yield np.frombuffer(bytes(waiting), np.uint8)


def _rolling(text: NDArray[np.uint8]) -> Digests:
    """A polynomial of every PASSAGE bytes in a row, modulo 2 ** 64: those of 1, 2, 4, ... bytes, put together."""
    power, width, done = GOLDEN, 1, 0
    digests = _mixed(np.arange(1, 257, dtype=np.uint64) * GOLDEN)[text]
    found = np.empty(0, np.uint64)
    while True:
        if PASSAGE & width:
            tail = digests[done:]
            found = found[: len(tail)] * power + tail if done else tail
            done += width
        if done == PASSAGE:
            return found[: len(text) - PASSAGE + 1]
        digests = digests[:-width] * power + digests[width:]
        with np.errstate(over="ignore"):
            power = power * power
        width *= 2


def _mixed(values: Digests) -> Digests:
    """Each value scrambled so that near ones have nothing in common (the finisher of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
