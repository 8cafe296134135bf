"""Pictures or sounds with a class each, from any data set that ``datasets`` can load or a local folder."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bench.config import LARGEST
from bench.data.classes import ClassOptions, stratified
from bench.data.rows import SPLITS, Rows, saved
from bench.errors import UserError, first_line, unknown
from bench.tables import counted

SHARES = {"valid": 0.1, "test": 0.1}  # of the train split, for splits that are not there
SPLIT = 0  # the seed of that division
LISTS = {"valid": "validation_list.txt", "test": "testing_list.txt"}
"""Of files that are held out, as Speech Commands has them, whose speakers are in one split each (arXiv 1804.03209)."""


class LabelledOptions(ClassOptions):
    """Which data set is read. A split that it lacks is taken from its train split, a tenth of every class.

    Attributes:
        dataset: as for ``datasets.load_dataset``: a name on the hub, or a local folder, with a folder for each class,
            in folders ``train``, ``validation`` (``valid``, ``val``, ``dev``) and ``test`` if they are divided, or the
            folder of what ``save_to_disk`` has written. ``LISTS`` may divide WAV files.
        config: likewise.
        label_column: the column that holds the class.
        max_documents: read at most so many rows of each split, drawn at random.
    """

    dataset: str = Field(min_length=1)
    config: str | None = None
    label_column: str = "label"
    max_documents: int | None = Field(None, ge=10, le=LARGEST)


Found = dict[str, tuple[NDArray[Any], NDArray[np.int64]]]


def _wav(path: Path) -> bool:
    return path.suffix.lower() == ".wav"


def _shown(name: str) -> bool:
    return name[0] not in "_."


def _folders(root: Path, column: str, label: str, where: str) -> tuple[dict[str, Any], list[str]]:
    """The WAV files of a folder as splits of a data set, which reads no such folders without a decoder of its own; and
    what was left out, in words.

    Raises UserError, which begins with ``where``, where there is no folder for each class, for one without a WAV file
    and for a class that the train split lacks.
    """
    from datasets import ClassLabel, Dataset, Features, Value  # start-up
    from datasets.data_files import SPLIT_KEYWORDS  # start-up

    called = {str(split): [root / name for name in names] for split, names in SPLIT_KEYWORDS.items()}
    parts = {ours: [path for path in called[theirs] if path.is_dir()] for theirs, ours in SPLITS.items()}
    parts = {name: paths for name, paths in parts.items() if paths} if parts["train"] else {"train": [root]}
    files = {
        name: sorted(path for folder in folders for path in folder.glob("*/*") if _shown(path.parent.name))
        for name, folders in parts.items()
    }
    sounds = {name: [path for path in paths if _wav(path)] for name, paths in files.items()}
    others = [p for paths in files.values() for p in paths if not _wav(p) and _shown(p.name) and p.is_file()]
    if not any(sounds.values()):
        raise UserError(f"{where} holds no WAV file in a folder for each class (allowed: FOLDER/CLASS/FILE.wav)")
    classes = {
        path for folders in parts.values() for folder in folders for path in folder.iterdir() if _shown(path.name)
    }
    used = {path for paths in sounds.values() for path in paths}
    if bare := sorted({path for path in classes if path.is_dir()} - {path.parent for path in used}):
        kinds = {path.suffix or path.name for path in bare[0].iterdir() if _shown(path.name)}
        held = ", ".join(sorted(kinds)) or "nothing"
        raise UserError(f"{where}: the folder {str(bare[0].relative_to(root))!r} holds {held} (allowed: WAV files)")
    if stray := sorted(
        path for path in {*root.rglob("*")} - used if _wav(path) and all(map(_shown, path.relative_to(root).parts))
    ):
        raise UserError(
            f"{where}: {counted(len(stray), 'WAV file')} such as {str(stray[0].relative_to(root))!r} in no folder of a "
            "class (allowed: FOLDER/CLASS/FILE.wav)"
        )
    suffixes = ", ".join(sorted({path.suffix or path.name for path in others}))
    notes = [f"{counted(len(others), 'file')} beside the WAV files left out: {suffixes}"] if others else []
    for name, listing in LISTS.items():
        if parts["train"] == [root] and (root / listing).is_file():
            listed = {line.strip() for line in (root / listing).read_text(encoding="utf-8").splitlines()}
            held_out = [path for path in sounds["train"] if path.relative_to(root).as_posix() in listed]
            sounds = {**sounds, "train": sorted({*sounds["train"]} - {*held_out}), name: held_out}
    names = sorted({path.parent.name for path in sounds["train"]})
    kind = Features({column: {"bytes": Value("binary"), "path": Value("string")}, label: ClassLabel(names=names)})
    found = {}
    for name, paths in sounds.items():
        if strange := sorted({path.parent.name for path in paths} - {*names}):
            raise unknown(f"{where}: class in {name}:", strange[0], names)
        values = [{"bytes": None, "path": str(path)} for path in paths]
        found[name] = Dataset.from_dict({column: values, label: [path.parent.name for path in paths]}, kind)
    return found, notes


def labelled_rows(
    task: str,
    options: LabelledOptions,
    column: tuple[str, str],
    plain: Any,
    read: Callable[[Any], NDArray[Any]],
    wav: bool = False,
) -> tuple[Found, list[str], list[str]]:
    """Values, read and stacked, and classes of train, valid and test; the classes' names; notes for the users.

    Args:
        task: its name, for errors.
        options: what its users have chosen.
        column: the option that names the values' column, and that name.
        plain: the feature that the column is read as, files by their bytes or path.
        read: an array of one value; what it raises is told with the row.
        wav: local folders that hold WAV files are read here.

    Raises:
        UserError: one line, for whatever is not as it should be.
    """
    rows, where, label = Rows(task, options), f"{task}.options", options.label_column
    folder = Path(options.dataset)
    told = f"{where}.dataset: {options.dataset!r}"
    splits, notes = dict[str, Any](), list[str]()
    if wav and not saved(options.dataset) and any(map(_wav, folder.rglob("*"))):
        splits, notes = _folders(folder, column[1], label, told)
    splits = splits or rows.splits()
    names: list[str] | None = None
    found: Found = {}
    for name, split in splits.items():
        for option, wanted in ((column[0], column[1]), ("label_column", label)):
            if wanted == label and split.column_names == [column[1]] and folder.is_dir():
                raise UserError(f"{told} tells no classes (allowed: a folder for each class, {options.dataset}/CLASS)")
            if wanted not in split.column_names:
                raise unknown(f"{where}.{option}", wanted, split.column_names)
        given, classes = getattr(split.features[label], "names", None), split.with_format(None)[label]
        if (
            given
        ):  # the numbers of a split are its own: one may lack a class; a number that none has stays, and is refused
            called = [given[v] if v is not None and 0 <= v < len(given) else None for v in classes]
        else:
            called = [None if v is None else str(v) for v in classes]
        names = names or given or sorted({one for one in called if one is not None})
        chosen = np.arange(len(split))
        if options.max_documents is not None and options.max_documents < len(split):
            chosen = np.sort(np.random.default_rng(SPLIT).permutation(len(split))[: options.max_documents])
            split = split.select(chosen)
        split = split.cast_column(column[1], plain)
        places: dict[str | None, int] = {name: place for place, name in enumerate(names)}
        numbers, values = list[int](), list[NDArray[Any]]()
        for place, row in zip(chosen.tolist(), split, strict=True):
            number = places.get(called[place])
            if number is None:
                value = classes[place] if called[place] is None else called[place]
                raise rows.refused(name, place, label, value, "a class of the train split")
            try:
                values.append(read(row[column[1]]))
            except Exception as error:  # whatever a damaged file makes its reader say
                raise UserError(f"{told}, split {name!r}, row {place}: {first_line(error)}") from None
            numbers.append(number)
        found[name] = np.stack(values) if values else np.empty(0), np.array(numbers, np.int64)
    missing = {name: share for name, share in SHARES.items() if name not in found}
    if not found["train"][0].size:
        raise UserError(f"{told} has no rows to train on")
    whole, labels = found["train"]
    if len(one := np.unique(labels)) < 2:
        raise UserError(
            f"{told} has rows of the class {(names or [])[one[0]]!r} alone to train on (allowed: two or more)"
        )
    for name, at in stratified(labels, missing, SPLIT).items():
        found[name] = whole[at], labels[at]
    for name, (vectors, classes) in found.items():
        if not len(classes):
            raise UserError(f"{told} leaves no sequence for {name} (allowed: more rows)")
        # They often come sorted by class, and validation while training looks at the first ones alone.
        order = np.random.default_rng(SPLIT).permutation(len(classes))
        found[name] = vectors[order], classes[order]
    return found, names or [], [*notes, *_twice(found)]


def _twice(found: Found) -> list[str]:
    """How many values of a held-out split stand in another as well, in words."""
    seen = {
        name: [
            blake2b(value.tobytes(), digest_size=16).digest() for value in values
        ]  # the values would take room twice
        for name, (values, _) in found.items()
    }
    pairs = [("valid", "train"), ("test", "train"), ("test", "valid")]
    counts = {(name, other): sum(map({*seen[other]}.__contains__, seen[name])) for name, other in pairs}
    return [
        f"{count:,} of {len(seen[name]):,} values of {name} stand in {other} as well"
        for (name, other), count in counts.items()
        if count
    ]
