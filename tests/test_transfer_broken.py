"""Archives that are damaged, tampered with or no archives, and imports that are killed: nothing wrong gets in.

``CYCLEBENCH_ARCHIVE_FLIPS`` sets in how many places a bit of an archive is turned (40 by default; ``make torture``:
400).
"""

from __future__ import annotations

import io
import json
import os
import random
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from stored import content, here, made, packed, plan, record_of, sound, stored, taken  # noqa: F401 - fixtures

from bench.errors import UserError
from bench.run.transfer import import_archive
from bench.run.upgrade import open_store
from bench.store.archive import INDEX
from bench.store.store import Store
from bench.store.versions import VERSION
from bench.study.plan import Plan

FLIPS = int(os.environ.get("CYCLEBENCH_ARCHIVE_FLIPS", "40"))


def repacked(file: Path, target: Path, change: Callable[[dict[str, bytes], dict[str, Any]], object]) -> Path:
    """The archive with other files, and digests that are right unless the change says otherwise."""
    with zipfile.ZipFile(file) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    index = json.loads(files.pop(INDEX))
    change(files, index)
    known = index["files"]
    index["files"] = {
        name: known[name]
        if name in known and known[name].get("kept")
        else {"sha256": sha256(d).hexdigest(), "size": len(d)}
        for name, d in files.items()
    }
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in {**files, INDEX: json.dumps(index).encode()}.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return target


def test_every_id_is_computed_again(tmp_path: Path, here: Store, made: Plan) -> None:
    there = stored(tmp_path / "there", made)
    one, two, three = (planned.cell.id for planned in made.cells[:3])
    for planned, part in zip(made.cells, ({"lr": 0.5}, {"newest": 1}), strict=False):
        record = record_of(planned)
        (there.folder(record.id) / "result.json").unlink()
        there.write_result(record.id, record.but(cell=record.cell.but(train={**record.cell.train, **part})))
    file = repacked(
        packed(there, tmp_path / "a.zip"), tmp_path / "b.zip", lambda files, _: files.pop(f"{three}/result.json")
    )
    manifest, found, why = import_archive(file, here)
    assert len(manifest.cells) == 4 and not why
    notes = {taken.id: taken.note.partition(":")[0] for taken in found if taken.fate == "refused"}
    assert notes[one].startswith("its configuration has the id ") and notes.keys() == {one, two, three}
    assert notes[two] == "this version has no such cell" and notes[three] == "its record is missing or damaged"
    assert [here.folder(id).exists() for id in (one, two, three)] == [False] * 3


@pytest.mark.parametrize(
    "name",
    [
        "../out",
        "/tmp/cyclebench-out",
        "{id}/../../out",
        "{id}/lease.9",
        "{id}/.result.json.x",
        "{id}",
        "optuna.db",
        "{id}/a\\b",
        "studies/x.json",
        "studies/../../out",
    ],
)
def test_nothing_gets_out_of_the_store_or_beside_it(
    tmp_path: Path, here: Store, made: Plan, sound: Path, name: str
) -> None:
    name = name.format(id=made.cells[0].cell.id)

    def change(files: dict[str, bytes], _: Any) -> None:
        files[name] = b"x"

    before = {path for path in tmp_path.iterdir()}
    file = repacked(sound, tmp_path / "a.zip", change)
    taken(file, here)
    assert {*tmp_path.iterdir()} == {*before, file} and not Path("/tmp/cyclebench-out").exists()
    assert not any(data == b"x" for data in content(here.root).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda files, index: index.update(version=VERSION + 1),
            f"of a store of version {VERSION + 1} .allowed: up to {VERSION}",
        ),
        (lambda files, index: index.update(study="../x"), "not a whole archive of `cyclebench export`"),
        (lambda files, index: index.update(study="other"), "its study 'other' is missing or damaged"),
        (lambda files, index: files.pop("studies/stored.json"), "its study 'stored' is missing or damaged"),
        (lambda files, index: files.pop("store.json"), "store.json is missing or damaged, which tells the version"),
    ],
)
def test_what_is_no_archive_is_one_line(tmp_path: Path, here: Store, sound: Path, change: Any, message: str) -> None:
    file = repacked(sound, tmp_path / "a.zip", change)
    with pytest.raises(UserError, match=message) as caught:
        taken(file, here)
    assert "\n" not in str(caught.value) and not list(here.root.glob("*[0-9a-f]"))


def test_other_files_are_told_in_one_line(tmp_path: Path, here: Store, sound: Path) -> None:
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("a", b"b")
    for data in (b"", b"no archive", b"PK\5\6" + bytes(18), other.getvalue(), sound.read_bytes()[:-99]):
        (tmp_path / "a.zip").write_bytes(data)
        with pytest.raises(UserError, match="not a whole archive") as caught:
            taken(tmp_path / "a.zip", here)
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match="not a whole archive"):
            import_archive(tmp_path / "a.zip", open_store(tmp_path / "new"))
        assert not (tmp_path / "new").exists(), "no store is left behind"


def test_a_flipped_bit_is_never_imported(tmp_path: Path, made: Plan, sound: Path) -> None:
    data, draw, expected = bytearray(sound.read_bytes()), random.Random(0), None
    fates: Counter[str] = Counter()
    for number in range(FLIPS):
        place, bit = draw.randrange(len(data)), 1 << draw.randrange(8)
        data[place] ^= bit
        (tmp_path / "a.zip").write_bytes(data)
        data[place] ^= bit
        store = open_store(tmp_path / f"runs{number}", begin=True)
        try:
            _, found, _, _ = taken(tmp_path / "a.zip", store)
        except (UserError, OSError):
            found = Counter({"whole": 1})
        fates += found
        expected = expected or content(stored(tmp_path / "sound", made).root)
        for path, there in content(store.root).items():
            assert there == expected[path], f"byte {place}, bit {bit}: {path}"
    assert fates["refused"] > FLIPS / 4 and fates["imported"] > 2 * FLIPS, fates


def test_killed_at_any_moment_the_next_import_ends_the_same(tmp_path: Path, made: Plan, sound: Path) -> None:
    whole = open_store(tmp_path / "whole", begin=True)
    moments = _killed(whole.root, sound, 0)
    expected = _kept(whole.root)
    assert moments > 50
    for number, moment in enumerate(random.Random(1).sample(range(1, moments), 6)):
        store = open_store(tmp_path / f"runs{number}", begin=True)
        assert _killed(store.root, sound, moment) == -9
        for planned in made.cells:
            if store.done(planned.cell.id):
                one, other = (
                    {k: v for k, v in files.items() if planned.cell.id in k} for files in (_kept(store.root), expected)
                )
                assert one == other, "done means whole"
        taken(sound, store)
        assert _kept(store.root) == expected


def _kept(root: Path) -> dict[str, bytes]:
    """What a store holds, without what the next run, or `cyclebench clean`, removes."""
    return {k: v for k, v in content(root).items() if not k.startswith(".import.") and "/lease." not in k}


def _killed(root: Path, file: Path, moment: int) -> int:
    """Import in a child that dies at so many touches of files (0: never); their number, or -9."""
    told = root.parent / f"{root.name}.moments"
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and str(root) in str(arguments[0]):
                seen += 1
                if seen == moment:
                    os._exit(9)

        code = 1
        try:
            sys.addaudithook(count)
            import_archive(file, Store(root))
            told.write_text(str(seen))
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return int(told.read_text()) if code == 0 else -code
