"""A part of a store in one file: a zip that is laid out as a store is, with a digest of everything in it.

Because it is laid out as a store, one of an earlier version is brought up to date as a store is.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from pydantic import BaseModel, Field

from bench.errors import UserError, first_line
from bench.store.files import whole_file
from bench.store.versions import ABOUT, ID, VERSION

INDEX = "index.json"
DENSE = (".npz", ".safetensors")  # what does not become smaller
PIECE = 1 << 20  # bytes
MOST = 1 << 26  # bytes that an index may have


class Packed(BaseModel):
    """A file of an archive. size: bytes."""

    sha256: str
    size: int


class Index(BaseModel):
    """What an archive says of itself.

    Attributes:
        version: of the store it is from.
        study: what the run is called that it holds.
        files: by their paths in the store.
    """

    version: int
    study: str = Field(pattern=r"^[a-z0-9][a-z0-9_+-]*$")
    files: dict[str, Packed]


def write_archive(file: Path, study: str, root: Path, paths: Iterable[Path]) -> Index:
    """Write files of a store into an archive, which appears when it is whole.

    Args:
        file: the archive.
        study: what the run is called.
        root: of the store, which is not changed meanwhile: each file is written as it is when its turn comes.
        paths: of the files.
    """
    index = Index(version=VERSION, study=study, files={})
    with whole_file(file) as partial, ZipFile(partial, "w", ZIP_DEFLATED) as archive:
        for path in paths:
            name, digest, size = path.relative_to(root).as_posix(), hashlib.sha256(), 0
            about = _about(name)
            about.compress_type = ZIP_STORED if path.suffix in DENSE else ZIP_DEFLATED
            with path.open("rb") as source, archive.open(about, "w", force_zip64=True) as target:
                while piece := source.read(PIECE):
                    digest.update(piece)
                    size += len(piece)
                    target.write(piece)
            index.files[name] = Packed(sha256=digest.hexdigest(), size=size)
        archive.writestr(_about(INDEX), index.model_dump_json(indent=1), ZIP_DEFLATED)
    return index


def _about(name: str) -> ZipInfo:
    """Without a time: the same files make the same archive."""
    found = ZipInfo(name)
    found.external_attr = 0o644 << 16
    return found


def unpack(file: Path, room: Path) -> tuple[Index, dict[str, str]]:
    """Unpack an archive into a folder, as a store.

    Returns:
        The index, and by path why a file is not to be used: it is then not there.

    Raises:
        UserError: in one line, if it is no archive of this suite, or one of a later version.
    """
    try:
        with ZipFile(file) as archive:
            index = _index(archive)
            if index.version > VERSION:
                raise UserError(f"{file}: of a store of version {index.version} (allowed: up to {VERSION})")
            return index, {name: why for name in index.files if (why := _unpacked(archive, index, name, room))}
    except UserError:
        raise
    except OSError as error:
        if error.errno != errno.EINVAL:  # which places outside of the file are, in a damaged archive
            raise
        raise UserError(f"{file}: not a whole archive of `cyclebench export`") from None
    except Exception as error:  # whatever zipfile, zlib and pydantic say of a damaged file
        raise UserError(f"{file}: not a whole archive of `cyclebench export`: {first_line(error)}") from None


def _index(archive: ZipFile) -> Index:
    """Raises KeyError where there is none."""
    if archive.getinfo(INDEX).file_size > MOST:
        raise BadZipFile("its index is too long")
    return Index.model_validate_json(archive.read(INDEX))


def _unpacked(archive: ZipFile, index: Index, name: str, room: Path) -> str:
    """Write one file; why that cannot be done, or ''."""
    if not _belongs(name, index.study):
        return "a store has no such file"
    packed, digest, left = index.files[name], hashlib.sha256(), index.files[name].size
    target = room / name
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with archive.open(name) as source, target.open("wb") as written:
            while left >= 0 and (piece := source.read(min(PIECE, left + 1))):
                digest.update(piece)
                left -= len(piece)
                written.write(piece)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        left = -1
    except Exception:  # see above
        left = -1
    if left or digest.hexdigest() != packed.sha256:
        target.unlink(missing_ok=True)
        return "it is damaged"
    return ""


def _belongs(name: str, study: str) -> bool:
    """Whether an archive may hold a file of that path: none leads out of the store, or is a running process's."""
    path = PurePosixPath(name)
    parts = path.parts
    if path.as_posix() != name or any(part.startswith((".", "lease.")) or set(part) & set("\\/:\0") for part in parts):
        return False
    return name in (ABOUT, f"studies/{study}.json") or (len(parts) > 1 and ID.fullmatch(parts[0]) is not None)
