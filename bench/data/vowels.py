"""Japanese vowels: who speaks? The files come with the packages aeon and sktime."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from bench.data.classes import ClassOptions, Labelled, class_data, standardised, stratified
from bench.data.task import Task, TaskData, TaskSize, register
from bench.errors import UserError

PACKAGES = ("aeon", "sktime")
FILES = "datasets/data/JapaneseVowels"
LONGEST = 29  # frames
VALID, SPLIT = 0.2, 0  # the share of the train set that is for validation, and the seed of that division, fixed


@register("vowels")
class Vowels(Task):
    """Japanese vowels (Kudo, Toyama and Shimbo 1999; UCI repository): 640 times one of nine men says /ae/, told by 12
    LPC cepstra a frame, in 7 to 29 frames. The class is the speaker.

    The test set is the one published, of 370; of the 270 others every fifth of each speaker is for validation.
    """

    class Options(ClassOptions):
        """The options of every task of one class a sequence."""

    def size(self) -> TaskSize:
        return TaskSize(640 * LONGEST * 12 * 8 * 3, 1.0)

    def build(self) -> TaskData:
        folder = _folder()
        known, test = (read_ts(folder / f"JapaneseVowels_{name}.ts", LONGEST) for name in ("TRAIN", "TEST"))
        places = stratified(known.classes, {"valid": VALID}, SPLIT)
        splits = {name: Labelled(known.vectors[at], known.classes[at]) for name, at in places.items()}
        found, _, _ = standardised({**splits, "test": test}, (0, 1))
        return class_data(found, [f"speaker {number}" for number in range(1, 10)], self.options)


def _folder() -> Path:
    """Where the files are. The packages are not imported: they need much that is not needed here."""
    for name in PACKAGES:
        package = find_spec(name)
        for place in (package.submodule_search_locations or ()) if package is not None else ():
            if (Path(place) / FILES).is_dir():
                return Path(place) / FILES
    raise UserError("task vowels needs the files of the package aeon (pip install --no-deps aeon)")


def read_ts(path: Path, longest: int) -> Labelled:
    """The series of a file of the UEA archive's ``.ts`` form: dimensions with ``:`` between them, the class behind.

    Raises UserError if it cannot be read so, or has a series of more than ``longest`` frames.
    """
    vectors, classes = list[np.ndarray](), list[int]()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        for line in lines[[one.strip().lower() for one in lines].index("@data") + 1 :]:
            *dimensions, label = line.split(":")
            series = np.array([[float(number) for number in one.split(",")] for one in dimensions]).T
            whole = np.full((longest, series.shape[1]), np.nan)
            whole[: len(series)] = series
            vectors.append(whole)
            classes.append(int(label) - 1)
        return Labelled(np.stack(vectors).astype(np.float32), np.array(classes, np.int64))
    except (OSError, ValueError) as error:
        raise UserError(f"task vowels: cannot read {str(path)!r}: {error}") from None
