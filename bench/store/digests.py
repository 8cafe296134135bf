"""Digests, by which a file says that it is no longer what was written: one flipped bit is enough.

A JSON file of the store tells its own digest in its first line; any program may still read it. The digests of other
files (traces, weights) stand in such a file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from bench.store.files import atomic_write

RESULT = "result.json"
KEY = "digest"
HEAD = f'{{\n "{KEY}": "'.encode()  # then 64 digits, and the rest, which they are the SHA-256 of
END = len(HEAD) + 64
CARD = ("README.md", "cyclebench.json")  # of a model, with what it is written from: they gain scores later


class DamagedError(ValueError):
    """A file is not what was written."""


def sealed(value: Mapping[str, Any]) -> bytes:
    """A JSON object as a file that tells its digest. Raises ValueError for numbers that JSON has not."""
    text = json.dumps(value, indent=1, allow_nan=False).encode()
    rest = b'",' + text[1:] if value else b'"\n}'
    return HEAD + hashlib.sha256(rest).hexdigest().encode() + rest


def write_sealed(path: Path, value: Mapping[str, Any], room: Path | None = None) -> None:
    """Write a JSON object with its digest. room: as of ``atomic_write``."""
    atomic_write(path, sealed(value), room)


def read_sealed(path: Path) -> dict[str, Any]:
    """What a JSON file holds. Raises FileNotFoundError if there is none, DamagedError if a byte has changed."""
    data = path.read_bytes()
    if not is_sealed(data) or hashlib.sha256(memoryview(data)[END:]).hexdigest().encode() != data[len(HEAD) : END]:
        raise DamagedError(f"{path}: its digest is not that of its contents")
    value: dict[str, Any] = orjson.loads(data)  # twice as fast as pydantic's own reader
    del value[KEY]
    return value


def is_sealed(data: bytes) -> bool:
    """Whether a file begins as those do that tell their digest. Files of earlier versions do not."""
    return data.startswith(HEAD)


def digest_of(path: Path) -> str:
    """SHA-256 of a file. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_model(folder: Path) -> None:
    """Raises DamagedError if a folder is the model of a finished cell and holds a file that is not as it was written;
    of other folders nothing is known.
    """
    try:
        files = read_sealed(folder.parent / RESULT).get("files", {})
    except (OSError, DamagedError):
        return
    for name, digest in without_card(files).items():
        path = folder.parent / name
        if path.is_relative_to(folder) and path.is_file() and digest_of(path) != digest:
            raise DamagedError(
                f"{path.name} is damaged (`cyclebench verify STUDY` sets it aside, `run` makes it again)"
            )


def without_card(files: Mapping[str, str]) -> dict[str, str]:
    """Digests by path but for those of a model's card: nothing is computed from it, and it is no damage if scores were
    written there.
    """
    return {name: digest for name, digest in files.items() if name.rpartition("/")[2] not in CARD}


def digests_in(folder: Path) -> dict[str, str]:
    """SHA-256 by path of all files in a folder and those below."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): digest_of(path) for path in paths}
