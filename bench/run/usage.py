"""What a cell takes of the machine while it runs: samples of this process's memory and processor time."""

from __future__ import annotations

import threading
import time

import psutil
import torch

INTERVAL = 10.0  # seconds between samples at first
MOST = 512  # samples; when there are as many, every other one is dropped and the interval doubles


class Usage:
    """Samples taken by a thread while the context lasts; ``samples`` holds them."""

    def __init__(self, interval: float = INTERVAL) -> None:
        self.interval, self.samples = interval, list[dict[str, float]]()
        self._process, self._began = psutil.Process(), time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="usage", daemon=True)

    def __enter__(self) -> Usage:
        self._process.cpu_percent()  # the first call only sets the start of what the next one measures
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.take()

    def _sample(self) -> None:
        while not self._stop.wait(self.interval):
            self.take()
            if len(self.samples) >= MOST:
                self.samples, self.interval = self.samples[1::2], 2 * self.interval

    def take(self) -> None:
        """One more sample, now."""
        machine = psutil.virtual_memory()
        self.samples.append(
            {
                "seconds": time.monotonic() - self._began,
                "cpu_percent": self._process.cpu_percent(),  # of one core
                "resident_bytes": float(self._process.memory_info().rss),
                "machine_memory_percent": machine.percent,
                **_gpu(),
            }
        )


def _gpu() -> dict[str, float]:
    if not torch.cuda.is_initialized():
        return {}
    return {
        "gpu_allocated_bytes": float(torch.cuda.memory_allocated()),
        "gpu_peak_bytes": float(torch.cuda.max_memory_allocated()),
    }
