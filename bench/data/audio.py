"""Sounds of one class each, as frames of a log-mel spectrogram."""

from __future__ import annotations

import io
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from bench.data.classes import Labelled, class_data, standardised
from bench.data.labelled_rows import LabelledOptions, labelled_rows
from bench.data.task import Task, TaskData, register

FLOOR = 1e-6  # of a band's energy before its logarithm


@register("audio")
class Audio(Task):
    """Sounds from any data set known to ``datasets`` whose files are WAV (Speech Commands, spoken digits), or from a
    local folder with a folder of WAV files for each class.
    """

    class Options(LabelledOptions):
        """How sounds become frames: short-time spectra in ``bands`` of equal width on the mel scale (O'Shaughnessy's
        ``2595 log10(1 + f / 700)``), whose logarithms have mean 0 and deviation 1 over the train split, band by band.

        Attributes:
            audio_column: the column that holds the sound.
            rate: samples a second; files of another rate are brought to it.
            seconds: what is longer is cut off; what is shorter is padded, which is never seen.
            bands: numbers of a frame.
            window: seconds of a frame.
            hop: seconds from one frame to the next.
        """

        audio_column: str = "audio"
        rate: int = Field(16000, ge=1000, le=192000)
        seconds: float = Field(1.0, ge=0.01, le=600.0)
        bands: int = Field(40, ge=1, le=512)
        window: float = Field(0.025, ge=0.001, le=1.0)
        hop: float = Field(0.01, ge=0.001, le=1.0)

        @model_validator(mode="after")
        def _room(self) -> Audio.Options:
            if self.seconds < self.window:
                raise ValueError(f"seconds = {self.seconds:g} must not be less than window = {self.window:g}")
            size, _ = _sizes(self)
            if size < 4 or not mel_bands(size, self.rate, self.bands).any(1).all():  # some would never hear anything
                raise ValueError(
                    f"bands = {self.bands} is too many for window = {self.window:g} at rate = {self.rate} (allowed: "
                    "fewer, or a longer window)"
                )
            return self

    def build(self) -> TaskData:
        from datasets import Audio as Sound  # start-up

        chosen = self.options
        read = partial(frames_of, options=chosen)
        column = ("audio_column", chosen.audio_column)
        found, names, notes = labelled_rows("audio", chosen, column, Sound(decode=False), read, wav=True)
        splits, _, _ = standardised({name: Labelled(*split) for name, split in found.items()}, (0, 1))
        return class_data(splits, names, chosen, notes=notes)


def frames_of(value: dict[str, Any], options: Audio.Options) -> NDArray[np.float32]:
    """Log-mel frames [T, bands] of a WAV file, told by its bytes or its path; not a number behind its end."""
    from scipy.io import wavfile  # start-up
    from scipy.signal import resample_poly  # start-up

    data = value["bytes"] if value.get("bytes") is not None else Path(value["path"]).read_bytes()
    rate, samples = wavfile.read(io.BytesIO(data))
    whole = np.issubdtype(samples.dtype, np.integer)
    wave = samples.astype(np.float64)
    if not np.isfinite(wave).all():
        raise ValueError("it holds samples that are no numbers (allowed: finite ones)")
    if whole:
        top = np.iinfo(samples.dtype)
        wave = (wave - (top.max + 1) / 2) / ((top.max + 1) / 2) if top.min == 0 else wave / (top.max + 1)
    if wave.ndim > 1:
        wave = wave.mean(1)
    if rate != options.rate:
        shared = math.gcd(rate, options.rate)
        wave = resample_poly(wave, options.rate // shared, rate // shared)
    found = log_mel(wave[: round(options.seconds * options.rate)], options)
    frames = np.full((_count(round(options.seconds * options.rate), options), options.bands), np.nan, np.float32)
    frames[: len(found)] = found
    return frames


def _sizes(options: Audio.Options) -> tuple[int, int]:
    """Samples of a frame and from one to the next."""
    return max(2, round(options.window * options.rate)), max(1, round(options.hop * options.rate))


def _count(samples: int, options: Audio.Options) -> int:
    """Frames of so many samples, at least one."""
    size, hop = _sizes(options)
    return 1 + max(0, samples - size) // hop


def log_mel(wave: NDArray[np.float64], options: Audio.Options) -> NDArray[np.float32]:
    """The log-mel frames [T, bands] of a wave, one frame at least."""
    size, hop = _sizes(options)
    wave = np.pad(wave, (0, max(0, size - len(wave))))
    parts = np.lib.stride_tricks.sliding_window_view(wave, size)[::hop]
    power = np.abs(np.fft.rfft(parts * np.hanning(size))) ** 2
    energy = power @ mel_bands(size, options.rate, options.bands).T
    return np.log(energy + FLOOR).astype(np.float32)


def mel_bands(size: int, rate: int, bands: int) -> NDArray[np.float64]:
    """Triangles [bands, size // 2 + 1] over the frequencies of a spectrum, evenly spread on the mel scale."""
    top = 2595 * math.log10(1 + rate / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, bands + 2) / 2595) - 1)
    at = np.linspace(0, rate / 2, size // 2 + 1)
    rising = (at - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    falling = (corners[2:, None] - at) / (corners[2:] - corners[1:-1])[:, None]
    return np.clip(np.minimum(rising, falling), 0, None)
