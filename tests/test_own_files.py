"""Pictures, sounds and texts of a user's own: what is read of them, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from scipy.io import wavfile

from bench.data.batches import arrays
from bench.data.classes import LINEAR
from bench.data.pictures import _pixels
from bench.data.task import TaskData, get_task
from bench.errors import UserError

WAVE = np.sin(np.arange(800)).astype(np.float32)
SOUNDS = {"rate": 8000, "seconds": 0.1, "bands": 10}


def made(name: str, options: dict[str, Any]) -> TaskData:
    """The data as they are in the files now."""
    return get_task(name, options).build()


def test_half_of_a_split_has_every_class(tmp_path: Path) -> None:
    """Files come sorted by class; validation while training looks at the first sequences alone."""
    for name in ("a", "b"):
        for place in ("sounds", "pictures"):
            (tmp_path / place / name).mkdir(parents=True)
        for number in range(40):
            wavfile.write(tmp_path / "sounds" / name / f"{number}.wav", 8000, WAVE * number)
            Image.new("L", (4, 4), number).save(tmp_path / "pictures" / name / f"{number}.png")
    heard = made("audio", {**SOUNDS, "dataset": str(tmp_path / "sounds")})
    for data in (heard, made("image", {"dataset": str(tmp_path / "pictures"), "size": 4})):
        for split in data.splits.values():
            classes = arrays(split)[1].ravel()
            assert len(np.unique(classes[: len(classes) // 2])) == 2


def test_sounds_of_any_spelling_are_read_and_no_class_is_passed_over(tmp_path: Path) -> None:
    for split, name, suffix in (
        ("train", "a", "wav"),
        ("train", "b", "WAV"),
        ("test", "a", "wav"),
        ("test", "b", "Wav"),
    ):
        (tmp_path / split / name).mkdir(parents=True)
        for number in range(10):
            wavfile.write(tmp_path / split / name / f"{number}.{suffix}", 8000, WAVE)
    options = {**SOUNDS, "dataset": str(tmp_path)}
    assert [len(split) for split in made("audio", options).splits.values()] == [18, 2, 20]
    (tmp_path / "test" / "z").mkdir()
    wavfile.write(tmp_path / "test" / "z" / "0.wav", 8000, WAVE)
    with pytest.raises(UserError, match=r"audio.options.dataset: .*class in test: 'z' .*allowed: a, b"):
        made("audio", options)
    shutil.rmtree(tmp_path / "test" / "z")
    wavfile.write(tmp_path / "test" / "a" / "0.wav", 8000, np.append(WAVE, np.nan).astype(np.float32))
    with pytest.raises(UserError, match=r"split 'test', row 0: it holds samples that are no numbers"):
        made("audio", options)
    wavfile.write(tmp_path / "test" / "a" / "0.wav", 8000, WAVE)
    for path in (tmp_path / "train" / "b").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"the folder 'train/b' holds nothing .allowed: WAV files"):
        made("audio", options)
    for split in ("train", "test"):
        shutil.rmtree(tmp_path / split / "b")
    with pytest.raises(UserError, match=r"has rows of the class 'a' alone to train on .allowed: two or more"):
        made("audio", options)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("low/speaker/1.wav", "1 WAV file such as 'low/speaker/1.wav' in no folder of a class"),
        ("1.wav", "1 WAV file such as '1.wav' in no folder of a class"),
        ("deep/speaker/1.wav", "the folder 'deep' holds speaker .allowed: WAV files"),
        ("empty/", "the folder 'empty' holds nothing .allowed: WAV files"),
        ("_noise_/1.wav", None),
        (".cache/deep/1.wav", None),
    ],
)
def test_no_sound_is_passed_over(tmp_path: Path, place: str, message: str | None) -> None:
    for name in ("low", "high"):
        (tmp_path / name).mkdir()
        for number in range(10):
            wavfile.write(tmp_path / name / f"{number}.wav", 8000, WAVE)
    options = {**SOUNDS, "dataset": str(tmp_path)}
    plain = made("audio", options).fingerprint
    path = tmp_path / place
    (path if place.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
    if path.suffix:
        shutil.copy(tmp_path / "low" / "1.wav", path)
    if message is None:
        assert made("audio", options).fingerprint == plain
    else:
        with pytest.raises(UserError, match=message):
            made("audio", options)


def test_classes_are_those_of_that_name_in_every_split(tmp_path: Path) -> None:
    """Splits that were numbered apart: the test split lacks the first class."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features
    from datasets import Image as Pictures

    colours = {"a": (255, 0, 0), "b": (0, 255, 0), "c": (0, 0, 255)}

    def rows(names: list[str], each: int) -> Dataset:
        kind = Features({"image": Pictures(), "label": ClassLabel(names=names)})
        pictures = [Image.new("RGB", (4, 4), colours[name]) for name in names for _ in range(each)]
        return Dataset.from_dict({"image": pictures, "label": [name for name in names for _ in range(each)]}, kind)

    DatasetDict({"train": rows(["a", "b", "c"], 20), "test": rows(["b", "c"], 5)}).save_to_disk(tmp_path)
    data = made("image", {"dataset": str(tmp_path), "size": 4, "patch": 2})
    assert sorted(arrays(data.test)[1][:, 0].tolist()) == [1] * 5 + [2] * 5
    assert data.metric.solvers[LINEAR] == 1.0


def test_lists_of_the_files_that_are_held_out_are_followed(tmp_path: Path) -> None:
    """As Speech Commands has them, so that no speaker is in two splits."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(10):
            wave = np.sin(np.arange(800) * (number + 1)).astype(np.float32)
            wavfile.write(tmp_path / name / f"s{number}_nohash_0.wav", 8000, wave)
    (tmp_path / "testing_list.txt").write_bytes(b"a/s0_nohash_0.wav\r\nb/s0_nohash_0.wav\r\nb/s1_nohash_0.wav\r\n")
    options = {**SOUNDS, "dataset": str(tmp_path)}
    assert [len(split) for split in made("audio", options).splits.values()] == [15, 2, 3]
    (tmp_path / "validation_list.txt").write_text("a/s1_nohash_0.wav\n")
    data = made("audio", options)
    assert [len(split) for split in data.splits.values()] == [16, 1, 3]
    assert sorted(data.test["class"]) == ["a", "b", "b"]


def test_a_picture_without_a_class_is_refused_with_its_row(tmp_path: Path) -> None:
    lines = []
    for number in range(60):
        Image.new("L", (4, 4), number).save(tmp_path / f"{number}.png")
        lines.append(f"{tmp_path / f'{number}.png'},{'' if number == 50 else 'ab'[number % 2]}")
    (tmp_path / "x.csv").write_text("\n".join(["image,label", *lines]))
    with pytest.raises(UserError, match=r"split 'train', row 50, column 'label' holds None .allowed: a class"):
        made("image", {"dataset": str(tmp_path / "x.csv"), "size": 4})


def test_sixteen_bits_of_grey_are_as_dark_as_eight(tmp_path: Path) -> None:
    ramp = (np.arange(64 * 64) * 16).reshape(64, 64)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "x.png")
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "x.tiff")
    for mode, channels in (("L", 1), ("RGB", 3)):
        found = _pixels({"bytes": None, "path": str(tmp_path / "x.png")}, 64, mode)
        np.testing.assert_array_equal(found, np.repeat((ramp >> 8)[None], channels, 0))
    with pytest.raises(ValueError, match=r"mode 'F' .allowed: at most 16 bits"):
        _pixels({"bytes": (tmp_path / "x.tiff").read_bytes(), "path": None}, 64, "L")


def test_no_class_of_sounds_is_left_out_and_other_files_are_told(tmp_path: Path) -> None:
    """A class whose files are of another kind would be missing without a word."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(10):
            wavfile.write(tmp_path / name / f"{number}.wav", 8000, WAVE * (number + 1))
    options = {**SOUNDS, "dataset": str(tmp_path)}
    assert not any("beside" in note for note in made("audio", options).notes)
    (tmp_path / "a" / "list.txt").write_text("0.wav")
    (tmp_path / "b" / "x.flac").write_bytes(b"fLaC")
    assert "2 files beside the WAV files left out: .flac, .txt" in made("audio", options).notes
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.mp3").write_bytes(b"ID3")
    with pytest.raises(UserError, match=r": the folder 'c' holds .mp3 .allowed: WAV files.$"):
        made("audio", options)
    with pytest.raises(UserError, match=r"/a' holds no WAV file in a folder for each class"):
        made("audio", {**options, "dataset": str(tmp_path / "a")})


def test_a_folder_of_tables_of_sounds_is_read(tmp_path: Path) -> None:
    sounds = []
    for number in range(20):
        wavfile.write(tmp_path / "x.wav", 8000, WAVE * (number + 1))
        sounds.append({"bytes": (tmp_path / "x.wav").read_bytes(), "path": None})
    (tmp_path / "x.wav").unlink()
    table = Dataset.from_dict({"audio": sounds, "label": ["a", "b"] * 10})
    (tmp_path / "tables").mkdir()
    table.to_parquet(tmp_path / "tables" / "train.parquet")
    table.save_to_disk(tmp_path / "saved")
    found = [made("audio", {**SOUNDS, "dataset": str(tmp_path / name)}) for name in ("tables", "saved")]
    assert found[0].fingerprint == found[1].fingerprint and len(found[0].train) == 16


def test_pictures_without_classes_are_told(tmp_path: Path) -> None:
    for number in range(10):
        Image.new("L", (4, 4), number).save(tmp_path / f"{number}.png")
    with pytest.raises(UserError, match=r"' tells no classes .allowed: a folder for each class, .*/CLASS"):
        made("image", {"dataset": str(tmp_path), "size": 4})


def test_files_that_are_not_there_are_looked_for_where_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.tsv").write_text("text\n")
    for task, options, told in (
        ("text", {"files": ["."]}, r"text.options.files: '\.' is a folder \(allowed: \./\*\.txt\)"),
        ("text", {"files": ["no.txt"]}, f"text.options.files: no file matches 'no.txt' in {tmp_path}$"),
        ("text", {"files": ["~nobody-of-that-name/x"]}, "text.options.files: '~nobody.*: nobody has that home"),
        (
            "hub",
            {"dataset": "no"},
            f"hub.options.dataset: cannot load 'no', neither a file nor a folder in {tmp_path}: ",
        ),
        (
            "hub",
            {"dataset": "x.tsv"},
            r"'x.tsv' is a file of a kind that is not read \(allowed: \.json, \.jsonl, \.csv",
        ),
    ):
        with pytest.raises(UserError, match=told):
            made(task, options)
    (tmp_path / "a.txt").write_text(" ".join(map(str, range(3000))))
    found = [made("text", {"files": [f"{home}a.txt"], "length": 8}).fingerprint for home in ("", "~/")]
    assert found[0] == found[1]
