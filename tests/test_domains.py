"""Pictures and speech: the data, and what is trained on them."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import wavfile

from bench.config import ModelConfig, TrainConfig
from bench.data.audio import Audio, frames_of, log_mel, mel_bands
from bench.data.batches import Batches, arrays
from bench.data.classes import LINEAR, ClassOptions, Labelled, class_data, stratified
from bench.data.pictures import HELD_OUT, SPLIT, Images, augmented, patches
from bench.data.prepared import load_prepared, save
from bench.data.task import TaskData, get_task, task_data
from bench.errors import UserError
from bench.evaluate.examples import examples
from bench.model.language_model import build_model, load_model
from bench.model.variant import get_variant
from bench.pretrained.share import save_checkpoint
from bench.run.going import run_cell
from bench.run.initial import initial_model
from bench.run.upgrade import open_store
from bench.study.load import study_from
from bench.study.plan import make_plan
from bench.train.loop import train
from reports.pictures import picture

COLOURS = {"blue": (20, 30, 220), "red": (210, 40, 30)}
TONES = {"high": 1800.0, "low": 300.0}


@pytest.fixture(scope="module")
def digits() -> TaskData:
    return task_data("digits", {})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures of two colours and different sizes, 40 a class, with a test set of 5 a class."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 5)):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(np.array(colour) + rng.normal(0, 20, (10, 8 + number % 5, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of WAV files of two tones, of several lengths, rates, channels and sample types."""
    root, rng = tmp_path_factory.mktemp("sounds"), np.random.default_rng(0)
    kinds: list[Any] = [np.int16, np.uint8, np.int32, np.float32]
    for name, tone in TONES.items():
        (root / name).mkdir()
        for number in range(30):
            rate = (8000, 16000)[number % 2]
            at = np.arange(round((0.08 + 0.002 * number) * rate)) / rate
            wave = 0.5 * np.sin(2 * np.pi * tone * at + rng.random()) + rng.normal(0, 0.02, len(at))
            kind = kinds[number % 4]
            if kind is np.uint8:
                wave = (wave * 127 + 128).clip(0, 255)
            elif kind is not np.float32:
                wave = wave * np.iinfo(kind).max
            samples = wave.astype(kind)
            wavfile.write(
                root / name / f"{number}.wav", rate, np.stack([samples] * 2, 1) if number % 3 == 0 else samples
            )
    return root


def rows(data: TaskData) -> set[bytes]:
    return {row.tobytes() for split in data.splits.values() for row in arrays(split)[0]}


def test_digits_are_all_there_once_and_stratified(digits: TaskData) -> None:
    from sklearn.datasets import load_digits

    assert sum(len(split) for split in digits.splits.values()) == 1797 == len(rows(digits))
    shares = {name: np.bincount(arrays(split)[1][:, 0]) / len(split) for name, split in digits.splits.items()}
    assert all(abs(share - 0.1).max() < 0.015 for share in shares.values())
    vectors, targets = arrays(digits.train)
    assert vectors.shape[1:] == (16, 4) and abs(vectors.mean()) < 1e-5 and vectors.std() == pytest.approx(1, abs=1e-4)
    assert targets.shape == (len(vectors), 1)
    # A picture put together from its patches is one of those that were read.
    known = {image.tobytes() for image in load_digits().images.astype(np.float32)}
    whole = vectors[0].reshape(4, 4, 2, 2).transpose(0, 2, 1, 3).reshape(8, 8)
    low, high = whole.min(), whole.max()
    assert np.rint((whole - low) / (high - low) * 16).astype(np.float32).tobytes() in known
    assert digits.metric.levels["majority class"] == pytest.approx(0.1, abs=0.01)
    assert 0.93 < digits.metric.solvers[LINEAR] < 0.98


def test_data_are_prepared_and_come_back(digits: TaskData, tmp_path: Path) -> None:
    folder = tmp_path / digits.fingerprint
    save(digits, folder, tmp_path)
    found = load_prepared(folder)
    assert found is not None and found.form == digits.form and found.metric == digits.metric
    for name, split in digits.splits.items():
        for one, other in zip(arrays(split), arrays(found.splits[name]), strict=True):
            np.testing.assert_array_equal(one, other)
    assert found.max_length == digits.length == 16
    processor = found.tokenizer()
    pixels = np.arange(64, dtype=np.uint8).reshape(1, 8, 8) % 17
    assert type(processor).__name__ == "ViTImageProcessorPil"
    made = processor(pixels, return_tensors="np")
    mean, spread = processor.image_mean[0], processor.image_std[0]
    np.testing.assert_allclose(made["pixel_values"][0], (pixels / 16 - mean) / spread, rtol=1e-5, atol=1e-6)


def test_another_reading_is_another_fingerprint(digits: TaskData) -> None:
    token = task_data("digits", {"readout": "class_token"})
    causal = task_data("digits", {"attention": "causal"})
    assert len({digits.fingerprint, token.fingerprint, causal.fingerprint}) == 3
    vectors, plain = arrays(token.test)[0], arrays(digits.test)[0]
    np.testing.assert_array_equal(vectors[:, :-1, :-1], plain)
    assert (vectors[:, :-1, -1] == 0).all() and (vectors[:, -1] == [0, 0, 0, 0, 1]).all()


@pytest.mark.parametrize("readout", ["mean", "class_token"])
def test_vowels(readout: str) -> None:
    find_spec("aeon") or pytest.skip("needs the files of aeon")
    data = task_data("vowels", {"readout": readout})
    assert [len(split) for split in data.splits.values()] == [216, 54, 370]
    assert np.bincount(arrays(data.train)[1][:, 0]).tolist() == [24] * 9
    vectors = np.concatenate([arrays(split)[0] for split in data.splits.values()])
    if readout == "class_token":
        assert (vectors[:, -1] == [*[0.0] * 12, 1.0]).all()
        vectors = vectors[:, :-1]
    lengths = (~np.isnan(vectors[..., 0])).sum(1)
    assert (lengths.min(), lengths.max()) == (7, 29)
    assert data.form.padded and data.form.features == 12 + (readout == "class_token")
    assert data.metric.solvers[LINEAR] > 0.9


def test_stratified_shares() -> None:
    classes = np.repeat([0, 1, 2], [10, 20, 40])
    found = stratified(classes, {"test": 0.2, "valid": 0.1}, 0)
    assert sorted(np.concatenate(list(found.values()))) == list(range(70))
    assert np.bincount(classes[found["test"]]).tolist() == [2, 4, 8]
    assert np.bincount(classes[found["valid"]]).tolist() == [1, 2, 4]


def test_a_folder_of_pictures(pictures: Path) -> None:
    options = {"dataset": str(pictures), "size": 8, "patch": 4}
    data = task_data("image", options)
    assert data.length == 4 and data.form.features == 48 and data.form.patch == 4
    assert [len(split) for split in data.splits.values()] == [72, 8, 10]
    mean = arrays(data.train)[0].reshape(72, 4, 3, 16).mean((0, 1, 3))
    assert abs(mean).max() < 0.01
    assert data.metric.solvers[LINEAR] == 1.0 and set(data.test["class"]) == set(COLOURS)
    grey = task_data("image", {**options, "channels": 1, "normalisation": "half"})
    assert grey.form.features == 16 and abs(arrays(grey.train)[0]).max() <= 1
    fewer = task_data("image", {**options, "max_documents": 20})
    assert len(fewer.train) + len(fewer.valid) == 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_column": "picture"}, "image.options.image_column"),
        ({"label_column": "labels"}, "image.options.label_column"),
        ({"dataset": "/no/such/folder"}, "image.options.dataset: cannot load"),
        ({"patch": 3}, "size = 8 must be a multiple of patch = 3"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_line(pictures: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        task_data("image", {"dataset": str(pictures), "size": 8, **changes})
    assert "\n" not in str(error.value)


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    for name in COLOURS:
        (tmp_path / name).mkdir()
        for number in range(10):
            Image.new("RGB", (4, 4), COLOURS[name]).save(tmp_path / name / f"{number}.png")
    (tmp_path / "red" / "3.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"image.options.dataset: .*split 'train'"):
        task_data("image", {"dataset": str(tmp_path), "size": 4})


@pytest.mark.parametrize("readout", ["mean", "class_token"])
def test_augmentation_turns_and_shifts_what_is_trained_on_alone(pictures: Path, readout: str) -> None:
    options = {"dataset": str(pictures), "size": 8, "patch": 2, "augmentation": "flip+crop", "readout": readout}
    data, plain = task_data("image", options), task_data("image", {**options, "augmentation": "none"})
    assert data.fingerprint == plain.fingerprint and data.augment is not None
    first, again, other = (Batches(data.train, 16, seed, data.augment).batch(3)[0] for seed in (0, 0, 1))
    before = Batches(plain.train, 16, 0).batch(3)[0]
    assert np.array_equal(first, again) and not np.array_equal(first, other) and not np.array_equal(first, before)
    if readout == "class_token":
        assert np.array_equal(first[:, -1], before[:, -1]) and np.array_equal(first[..., -1], before[..., -1])


def test_augmentation_by_hand() -> None:
    """Every picture is the one before, or it turned, moved by at most an eighth with zeros moved in."""
    picture = np.arange(1, 65, dtype=np.float32).reshape(1, 1, 8, 8)
    options = Images.Options(dataset="-", size=8, channels=1, patch=2, augmentation="flip+crop")
    found = augmented(np.repeat(patches(picture, 2), 60, 0), np.random.default_rng(0), options)
    wide = [np.pad(one, 1) for one in (picture[0, 0], picture[0, 0, :, ::-1])]
    moved = [one[y : y + 8, x : x + 8] for one in wide for y in range(3) for x in range(3)]
    allowed = {patches(np.ascontiguousarray(one)[None, None], 2).tobytes() for one in moved}
    seen = {one.tobytes() for one in found}
    assert len(allowed) == 18 and seen <= allowed and len(seen) > 10


def test_a_folder_of_sounds(sounds: Path) -> None:
    data = task_data("audio", {"dataset": str(sounds), "rate": 8000, "seconds": 0.2, "bands": 12})
    assert data.form.padded and data.form.features == 12 and data.length == 1 + (1600 - 200) // 80
    assert [len(split) for split in data.splits.values()] == [48, 6, 6]
    assert data.metric.solvers[LINEAR] == 1.0 and data.tokenizer() is None
    for changes in ({"rate": 1000, "window": 0.002, "bands": 1}, {"rate": 1000, "bands": 64}):
        with pytest.raises(
            UserError, match=r"bands = .* is too many for window = .* at rate = 1000 .allowed: fewer, or"
        ):
            get_task("audio", {"dataset": str(sounds), **changes})
    with pytest.raises(UserError, match=r"seconds = 0.01 must not be less than window"):
        get_task("audio", {"dataset": str(sounds), "seconds": 0.01})


@pytest.mark.parametrize("held_out", ["validation", "valid", "val", "dev"])
def test_sounds_in_folders_of_splits(sounds: Path, tmp_path: Path, held_out: str) -> None:
    for split, wanted in (("train", slice(0, 8)), (held_out, slice(8, 11))):
        for kind in (path for path in sounds.iterdir() if path.is_dir()):
            (tmp_path / split / kind.name).mkdir(parents=True)
            for path in sorted(kind.iterdir())[wanted]:
                shutil.copy(path, tmp_path / split / kind.name)
    data = task_data("audio", {"dataset": str(tmp_path), "rate": 8000, "seconds": 0.2, "bands": 12})
    assert len(data.valid) == 3 * data.vocab_size and len(data.train) + len(data.test) == 8 * data.vocab_size


def test_sounds_are_the_same_whatever_their_type(tmp_path: Path) -> None:
    """As float, 8, 16 and 32 bits, two channels, and at twice the rate."""
    options = Audio.Options(dataset="-", rate=8000, seconds=0.1, bands=10)
    at = np.arange(1600) / 16000
    wave = 0.5 * np.sin(2 * np.pi * 440 * at)
    kinds = {
        "float": wave[::2].astype(np.float32),
        "16": (wave[::2] * 32767).astype(np.int16),
        "32": (wave[::2] * (2**31 - 1)).astype(np.int32),
        "two": np.stack([wave[::2], wave[::2]], 1).astype(np.float32),
    }
    found = {}
    for name, samples in kinds.items():
        wavfile.write(tmp_path / f"{name}.wav", 8000, samples)
        found[name] = frames_of({"bytes": None, "path": str(tmp_path / f"{name}.wav")}, options)
        loud = found[name] > -5
        np.testing.assert_allclose(found[name][loud], found["float"][loud], atol=0.02)
    wavfile.write(tmp_path / "fast.wav", 16000, wave.astype(np.float32))
    fast = frames_of({"bytes": (tmp_path / "fast.wav").read_bytes(), "path": None}, options)
    assert (fast.argmax(1) == found["float"].argmax(1)).all()


def test_a_tone_is_loudest_in_its_band() -> None:
    options = Audio.Options(dataset="-", rate=16000, bands=40)
    weights = mel_bands(400, 16000, 40)
    assert weights.shape == (40, 201) and (weights.max(1) > 0).all() and weights.max() <= 1
    for tone in (250.0, 1000.0, 4000.0):
        frames = log_mel(np.sin(2 * np.pi * tone * np.arange(16000) / 16000), options)
        assert frames.shape == (98, 40)
        band = int(np.argmax(weights[:, round(tone / 40)]))
        assert (frames.argmax(1) == band).all()


def test_pictures_are_kept_by_the_cycle_they_leave_after(digits: TaskData) -> None:
    """Those of scikit-learn, pixel by pixel, each with what the trace says of it."""
    from sklearn.datasets import load_digits

    from bench.config import EvalConfig
    from bench.evaluate.record import examine

    model = ModelConfig(d_model=16, n_blocks=3, n_cycles=2, form=digits.form)
    lm = build_model(get_variant("ztt"), model, digits.vocab_size, digits.max_length)
    lm.reset_parameters(0)
    found = examine(lm, digits, EvalConfig(max_cycles=2))
    assert found.exits is not None and found.exits.examples
    tuned = next(one for one in found.exits.rules["zero_attention"].tuned if one.budget == 0.8)
    left = found.test.leave("zero_attention", tuned.threshold)
    known = load_digits()
    places = stratified(known.target, HELD_OUT, SPLIT)["test"]
    counts = {cycle: min(12, int((left == cycle).sum())) for cycle in (1, 2)}
    assert [one.cycle for one in found.exits.examples] == [1] * counts[1] + [2] * counts[2]
    for cycle in (1, 2):
        mine = [one for one in found.exits.examples if one.cycle == cycle]
        for one, row in zip(mine, np.flatnonzero(left == cycle), strict=False):
            pixels = known.images[places[row]]
            np.testing.assert_array_equal(picture(one), np.rint(pixels * 255 / 16).astype(np.uint8))
            assert one.label == str(known.target[places[row]])
            assert one.right == bool(found.test.correct[row, cycle - 1])
    assert examples(digits, found.test, found.exits.but(rules={})) is None
    upper = {}
    for name, split in digits.splits.items():
        vectors, classes = arrays(split)
        upper[name] = Labelled(vectors[:40, :8], classes[:40, 0])
    halves = class_data(upper, list("0123456789"), ClassOptions(), 2)
    lm = build_model(get_variant("ztt"), model, halves.vocab_size, halves.max_length)
    lm.reset_parameters(0)
    wide = examine(lm, halves, EvalConfig(max_cycles=2))
    assert wide.exits is not None and wide.exits.examples is None, "how wide pictures of 8 patches are, nobody says"


@pytest.mark.torture
@pytest.mark.long
def test_a_ztt_on_digits_exceeds_the_linear_model(digits: TaskData) -> None:
    """As ``studies/vision.yaml`` trains it, with one seed of its pilots."""
    import yaml

    from bench.evaluate.evaluation import evaluate

    study = yaml.safe_load((Path(__file__).parent.parent / "studies" / "vision.yaml").read_text())
    model, config = ModelConfig(**study["model"], form=digits.form), TrainConfig(**study["train"])
    lm = build_model(get_variant("ztt"), model, digits.vocab_size, digits.max_length)
    lm.reset_parameters(10_000)
    train(lm, digits, config, 10_000)
    accuracy = evaluate(lm, *arrays(digits.test)).leaving(1)["accuracy"]
    print(json.dumps({"ztt": accuracy, LINEAR: digits.metric.solvers[LINEAR]}))
    assert accuracy > digits.metric.solvers[LINEAR]


@pytest.mark.parametrize("name", ["digits", "vowels"])
def test_a_few_steps_learn_something(name: str) -> None:
    if name == "vowels":
        pytest.importorskip("importlib.util").find_spec("aeon") or pytest.skip("needs the files of aeon")
    data = task_data(name, {})
    lm = build_model(
        get_variant("ztt"),
        ModelConfig(d_model=16, n_blocks=3, n_cycles=1, form=data.form),
        data.vocab_size,
        data.max_length,
    )
    lm.reset_parameters(0)
    torch.manual_seed(0)
    history = train(lm, data, TrainConfig(steps=30, batch_size=32, lr=1e-2, eval_every=30), 0)
    assert history[-1]["valid_accuracy"] > data.metric.levels["majority class"] + 0.1


def test_a_saved_classifier_names_its_classes(digits: TaskData, pictures: Path, tmp_path: Path) -> None:
    from transformers import pipeline

    data = task_data("image", {"dataset": str(pictures), "size": 8, "patch": 4})
    lm = build_model(get_variant("ztt"), ModelConfig(d_model=16, n_heads=2, n_blocks=3, form=data.form), 2, 4)
    lm.reset_parameters(0)
    save_checkpoint(lm, tmp_path, data.tokenizer(), {}, 4, names=data.class_names)
    told = pipeline("image-classification", model=str(tmp_path))(str(pictures / "test" / "red" / "0.png"))
    assert {one["label"] for one in told} == {"blue", "red"}
    assert sum(one["score"] for one in told) == pytest.approx(1)
    assert [digits.class_names[digit] for digit in range(10)] == list("0123456789")
    assert task_data("p_hop", {"n_train": 20, "n_test": 20}).class_names == {}


def test_pictures_that_stand_in_two_splits_are_told(tmp_path: Path, pictures: Path) -> None:
    for split in ("train", "test"):
        shutil.copytree(pictures / "train", tmp_path / split)
    notes = task_data("image", {"dataset": str(tmp_path), "size": 8, "patch": 4}).notes
    assert "72 of 80 values of test stand in train as well" in notes
    assert "8 of 80 values of test stand in valid as well" in notes
    assert not any("as well" in note for note in task_data("image", {"dataset": str(pictures), "size": 8}).notes)


def test_a_model_of_pictures_starts_from_anothers_cell(tmp_path: Path) -> None:
    study = {
        "name": "pictures",
        "question": "Does it go on?",
        "model": {"d_model": 16, "n_heads": 2, "n_blocks": 3, "n_cycles": 2},
        "train": {"steps": 3, "batch_size": 4},
        "tasks": [{"name": "digits", "options": {"patch": 4}}],
        "variants": ["htc", {"name": "ztt", "init": "cell:htc"}],
        "seeds": 1,
    }
    store, plan = open_store(tmp_path, begin=True), make_plan(study_from(study, [], "study"), "", None)
    first, second = (run_cell(planned.cell, store) for planned in plan.cells)
    assert first.status == second.status == "done"
    data = task_data("digits", {"patch": 4})
    one, other = (initial_model(planned.cell, data, store) for planned in plan.cells)
    trained = load_model(store.model(first.id))
    assert (other.blocks[1].mlp.up.weight == trained.blocks[1].mlp.up.weight).all()
    assert (one.blocks[1].mlp.up.weight != trained.blocks[1].mlp.up.weight).any()
