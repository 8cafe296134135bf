"""The exit trace: one evaluation pass that tells what leaving at each exit point would have given."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
GRID = 33  # thresholds of the default grid


@dataclass(frozen=True)
class Trace:
    """Scores of every test sequence at every exit point, N sequences and C cycles.

    loss: [N, C], summed over the scored targets, nats; correct: [N, C], targets predicted right; scored: [N], targets
    scored; signal: [N, C], zero attention averaged over the cycle's steps, heads and queries, NaN without zero tokens;
    zero_attention: [S], mean of each step in the schedule, NaN where a step has no zero token.
    """

    loss: Array
    correct: Array
    scored: Array
    signal: Array
    zero_attention: Array

    @property
    def n_cycles(self) -> int:
        return self.loss.shape[1]

    def leaving(self, cycle: NDArray[np.int64] | int) -> dict[str, float]:
        """Mean loss (nats per scored target) and accuracy when sequence n leaves after cycle ``cycle[n]`` (1..C)."""
        rows = np.arange(len(self.loss))
        column = np.broadcast_to(np.asarray(cycle) - 1, rows.shape)
        scored = self.scored.sum()
        return {
            "loss": float(self.loss[rows, column].sum() / scored),
            "accuracy": float(self.correct[rows, column].sum() / scored),
        }

    def leave_above(self, threshold: float) -> NDArray[np.int64]:
        """The cycle [N] after which each sequence leaves: the first whose signal exceeds the threshold, else C."""
        above = self.signal > threshold
        above[:, -1] = True  # the last cycle ends the recurrent part whatever the signal says
        return above.argmax(1) + 1

    def thresholds(self) -> list[float]:
        """A grid over the signals seen, from 0 (all leave after the first cycle) to 1 (none leaves early)."""
        early = self.signal[:, :-1]
        if early.size == 0 or np.isnan(early).any():
            return []
        inner = np.quantile(early, np.linspace(0, 1, GRID))
        return [0.0, *sorted({float(value) for value in inner}), 1.0]

    def curve(self, flops_per_token: tuple[float, ...]) -> list[dict[str, Any]]:
        """What every threshold of the grid gives; flops_per_token: executed, when leaving after cycle 1, 2, ..."""
        cost, found = np.asarray(flops_per_token), []
        for threshold in self.thresholds():
            cycle = self.leave_above(threshold)
            share = np.bincount(cycle - 1, minlength=self.n_cycles) / len(cycle)
            found.append(
                {
                    "threshold": threshold,
                    "flops_per_token": float(cost[cycle - 1].mean()),
                    "mean_cycles": float(cycle.mean()),
                    **self.leaving(cycle),
                    "share": share.tolist(),
                }
            )
        return found

    def to_bytes(self) -> bytes:
        """The arrays as an ``.npz`` file."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **{item.name: getattr(self, item.name) for item in fields(self)})
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Trace:
        """The trace stored by ``to_bytes``."""
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return cls(**{item.name: arrays[item.name] for item in fields(cls)})


def with_bits(scores: dict[str, Any], bytes_per_token: float | None) -> dict[str, Any]:
    """The scores with bits per byte beside the loss, where the data are text."""
    if bytes_per_token is None:
        return scores
    return {**scores, "bits_per_byte": scores["loss"] / math.log(2) / bytes_per_token}
