"""Pictures of one class each: scikit-learn's digits, and any data set of pictures."""

from __future__ import annotations

import io
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from bench.data.classes import ClassOptions, Labelled, class_data, stratified
from bench.data.labelled_rows import LabelledOptions, labelled_rows
from bench.data.task import Augment, Processor, Task, TaskData, TaskSize, register
from bench.form import Form

HELD_OUT = {"test": 0.25, "valid": 0.15}  # shares of the digits
SPLIT = 0  # the seed of their division, fixed


@register("digits")
class Digits(Task):
    """Handwritten digits: the 1,797 pictures of 8 x 8 pixels that come with scikit-learn, from the test set of the UCI
    repository's "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998).

    Of every digit a quarter is for the test and 15 % for validation, always the same.
    """

    class Options(ClassOptions):
        """patch: pixels on a side of the squares that a picture is cut into: 64, 16, 4 or 1 of them."""

        patch: Literal[1, 2, 4, 8] = 2

    def size(self) -> TaskSize:
        return TaskSize(1797 * 64 * 8 * 3, 1.0)

    def build(self) -> TaskData:
        from sklearn.datasets import load_digits  # start-up

        found = load_digits()
        pixels = found.images[:, None].astype(np.float32) / 16
        places = stratified(found.target, HELD_OUT, SPLIT)
        splits = {name: (pixels[at], found.target[at].astype(np.int64)) for name, at in places.items()}
        mean, spread = float(splits["train"][0].mean()), float(splits["train"][0].std())
        labelled = {
            name: Labelled(patches((pictures - mean) / spread, self.options.patch), classes)
            for name, (pictures, classes) in splits.items()
        }
        processor = partial(image_processor, 8, [mean], [spread], 1 / 16)
        return class_data(labelled, [str(digit) for digit in range(10)], self.options, self.options.patch, processor)


@register("image")
class Images(Task):
    """Pictures from any data set known to ``datasets`` (MNIST, CIFAR-10), or from a local folder with a folder of
    pictures for each class.
    """

    class Options(LabelledOptions):
        """How pictures become patches.

        Attributes:
            image_column: the column that holds the picture.
            size: pixels on a side that pictures are brought to.
            channels: 1 (grey) or 3 (red, green, blue).
            patch: pixels on a side of the squares that a picture is cut into; divides size.
            normalisation: ``data`` gives every channel mean 0 and deviation 1 over the train split, ``half`` brings
                numbers from 0 .. 1 to -1 .. 1.
            augmentation: what is done to a picture each time that it is trained on: ``flip`` turns half of them left to
                right, ``crop`` shifts them by up to an eighth of their size in each direction.
        """

        image_column: str = "image"
        size: int = Field(32, ge=1, le=1024)
        channels: Literal[1, 3] = 3
        patch: int = Field(4, ge=1, le=1024)
        normalisation: Literal["data", "half"] = "data"
        augmentation: Literal["none", "flip", "crop", "flip+crop"] = "none"

        @model_validator(mode="after")
        def _whole(self) -> Images.Options:
            if self.size % self.patch:
                raise ValueError(f"size = {self.size} must be a multiple of patch = {self.patch}")
            return self

    @property
    def augment(self) -> Augment | None:
        chosen = self.options
        return None if chosen.augmentation == "none" else partial(augmented, options=chosen)

    def build(self) -> TaskData:
        from datasets import Image  # start-up

        chosen = self.options
        mode, column = "L" if chosen.channels == 1 else "RGB", ("image_column", chosen.image_column)
        read = partial(_pixels, size=chosen.size, mode=mode)
        found, names, notes = labelled_rows("image", chosen, column, Image(decode=False), read)
        mean = spread = np.full(chosen.channels, 0.5)
        if chosen.normalisation == "data":
            pixels = found["train"][0]
            mean = pixels.mean((0, 2, 3), dtype=np.float64) / 255
            spread = np.maximum(pixels.std((0, 2, 3), dtype=np.float64) / 255, 1e-6)
        labelled = {}
        for name, (pixels, classes) in found.items():
            pictures = (pixels.astype(np.float32) / 255 - mean[:, None, None]) / spread[:, None, None]
            labelled[name] = Labelled(patches(pictures, chosen.patch), classes)
        processor = partial(image_processor, chosen.size, mean.tolist(), spread.tolist())
        return class_data(labelled, names, chosen, chosen.patch, processor, notes)


def _pixels(value: dict[str, Any], size: int, mode: str) -> NDArray[np.uint8]:
    """Bytes [C, size, size] of a picture's file, told by its bytes or its path."""
    from PIL import Image  # start-up

    file = value["path"] if value.get("bytes") is None else io.BytesIO(value["bytes"])
    picture: Image.Image = Image.open(file)
    if picture.mode in ("I", "F"):
        raise ValueError(f"a picture of mode {picture.mode!r} (allowed: at most 16 bits a channel)")
    if picture.mode.startswith("I;16"):  # Pillow would cut off what is above 255
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    picture = picture.convert(mode)
    if picture.size != (size, size):
        picture = picture.resize((size, size), resample=2)  # bilinear, as the saved processor does it
    pixels = np.asarray(picture)
    return pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)


def augmented(vectors: NDArray[Any], rng: np.random.Generator, options: Images.Options) -> NDArray[Any]:
    """Pictures as vectors [B, T, F], turned and shifted at random; a class token behind them stays."""
    patch, side, count = options.patch, options.size // options.patch, options.channels * options.patch**2
    grid = vectors[:, : side * side, :count].reshape(-1, side, side, options.channels, patch, patch)
    pictures = grid.transpose(0, 3, 1, 4, 2, 5).reshape(len(vectors), options.channels, options.size, options.size)
    if "flip" in options.augmentation:
        turned = rng.random(len(pictures)) < 0.5
        pictures = np.where(turned[:, None, None, None], pictures[..., ::-1], pictures)
    if "crop" in options.augmentation:
        most = max(1, options.size // 8)
        wide = np.pad(pictures, ((0, 0), (0, 0), (most, most), (most, most)))
        down, right = rng.integers(0, 2 * most + 1, (2, len(pictures)))
        inside = np.arange(options.size)
        rows, columns = (down[:, None] + inside)[:, None, :, None], (right[:, None] + inside)[:, None, None, :]
        at = np.arange(len(pictures))[:, None, None, None], np.arange(options.channels)[None, :, None, None]
        pictures = wide[at[0], at[1], rows, columns]
    found = vectors.copy()
    found[:, : side * side, :count] = patches(pictures, patch)
    return found


def patches(pictures: NDArray[Any], size: int) -> NDArray[np.float32]:
    """Pictures [N, C, H, W] as vectors [N, T, C p p], cut as the model that is saved cuts them."""
    import torch  # start-up

    from bench.model.forms import cut  # start-up

    form = Form(features=pictures.shape[1] * size * size, patch=size)
    found: NDArray[np.float32] = cut(torch.from_numpy(np.ascontiguousarray(pictures, np.float32)), form).numpy()
    return np.ascontiguousarray(found)


def image_processor(size: int, mean: list[float], spread: list[float], scale: float = 1 / 255) -> Processor:
    """What makes a model's pictures of those of users: of transformers, saved beside the model."""
    from transformers import ViTImageProcessorPil  # start-up

    found: Processor = ViTImageProcessorPil(
        size={"height": size, "width": size}, rescale_factor=scale, image_mean=mean, image_std=spread
    )
    return found
