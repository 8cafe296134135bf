"""The exit trace: one evaluation pass that tells exactly what every rule gives at every threshold.

A sequence that leaves after cycle c gets the scores recorded there and has cost what c cycles cost, so the means over
the sequences change only where a threshold passes a signal that some sequence would leave by: no grid is needed.
"""

from __future__ import annotations

import io
import math
from bisect import bisect_left
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.errors import unknown
from bench.evaluate.rules import ORACLES, get_rule

Array = NDArray[Any]
Curve = dict[str, NDArray[np.float64]]
"""Columns, one entry for each threshold: ``threshold``, ``flops_per_token``, ``mean_cycles``, ``loss``, ``accuracy``
and, for text, ``bits_per_byte``; from the cheapest threshold to the one at which no sequence leaves early."""

CHANCES = 65  # points of the curve of leaving at random


class Moves(NamedTuple):
    """Sequences changing their exit as a threshold falls, in that order, E of them.

    level: [E], the threshold at which sequence row [E] changes its exit from column start [E] to end [E]; begin: the
    column at which all leave before the first move.
    """

    begin: int
    level: Array
    row: Array
    start: Array
    end: Array


@dataclass(frozen=True)
class Trace:
    """Scores of every sequence at every exit point, N sequences and C cycles.

    Attributes:
        loss: [N, C], summed over the scored targets, nats.
        correct: [N, C], targets predicted right.
        scored: [N], targets scored.
        zero_attention: [S], mean of each step in the schedule, NaN where a step has no zero token.
        signals: [N, C] by rule (``Rule.key``).
        flops: [C] by rule (``Rule.name``), executed forward FLOPs per token of a sequence that leaves after cycle 1, 2,
            ..., the rule's own included; [N, C] where a variant's sequences decide on how many tokens a cycle runs.
        bytes_per_token: of the targets' text, None without text.
        ran: [N, C], these numbers of tokens; None where the sequences decide nothing.
    """

    loss: Array
    correct: Array
    scored: Array
    zero_attention: Array
    signals: dict[str, Array] = field(default_factory=dict)
    flops: dict[str, Array] = field(default_factory=dict)
    bytes_per_token: float | None = None
    ran: Array | None = None

    @property
    def n_cycles(self) -> int:
        return self.loss.shape[1]

    @property
    def rules(self) -> list[str]:
        """What there is a curve of: every rule with its aggregates, and the bounds."""
        return [*sorted(self.signals), *ORACLES] if self.signals else []

    def leaving(self, cycle: NDArray[np.int64] | int) -> dict[str, float]:
        """Mean loss (nats per scored target), accuracy and, for text, bits per byte when sequence n leaves after cycle
        ``cycle[n]`` (1..C).
        """
        rows = np.arange(len(self.loss))
        column = np.broadcast_to(np.asarray(cycle) - 1, rows.shape)
        found = self._means(self.loss[rows, column].sum(dtype=float), self.correct[rows, column].sum(dtype=float))
        return {name: float(value) for name, value in found.items()}

    def leave(self, key: str, threshold: float | Array) -> NDArray[np.int64]:
        """The cycle [N], 1..C, after which each sequence leaves: the first at which the rule says so, else C.

        threshold: one, or one for each exit point [C - 1]; for an oracle: the gain in right predictions (or nats) that
        further cycles must bring for every FLOP per token. Raises UserError if the trace has no such rule.
        """
        if key in ORACLES:
            moves = self._moves(key)
            column = np.zeros(len(self.loss), dtype=np.int64)
            done = moves.level >= threshold
            np.maximum.at(column, moves.row[done], moves.end[done])
            return column + 1
        leaves = np.ones(self.loss.shape, dtype=bool)  # the last cycle ends the recurrent part whatever the signal says
        signal = self._signal(key)[:, :-1]
        # In the signals' own precision, as a model in it decides.
        leaves[:, :-1] = get_rule(key).leaves(signal, np.asarray(threshold, signal.dtype))
        return leaves.argmax(1) + 1

    def score(self, key: str, threshold: float | Array) -> dict[str, float]:
        """The curve's columns at one threshold, looked up there, or at one for each exit point."""
        if np.ndim(threshold) == 0:
            levels, curve = self._lookup(key)
            at = bisect_left(levels, self._level(key, float(threshold)))
            return {name: column[at] for name, column in curve.items()}
        cycle = self.leave(key, threshold)
        flops = float(self._cost(key)[np.arange(len(cycle)), cycle - 1].mean())
        return {"flops_per_token": flops, "mean_cycles": float(cycle.mean()), **self.leaving(cycle)}

    def _level(self, key: str, threshold: float) -> float:
        """A threshold as the moves' levels are: at which at or above what it is a sequence moves."""
        return threshold if key in ORACLES else float(self._signal(key).dtype.type(threshold)) * _sign(key)

    def _lookup(self, key: str) -> tuple[list[float], dict[str, list[float]]]:
        """The curve's levels, rising, and its other columns in that order."""
        if key not in self._lookups:
            curve = {name: column.tolist() for name, column in self.curve(key).items()}
            levels = [_sign(key) * threshold for threshold in curve.pop("threshold")]
            turned = key in ORACLES
            found = {name: column[::-1] if turned else column for name, column in curve.items()}
            self._lookups[key] = (levels[::-1] if turned else levels), found
        return self._lookups[key]

    @cached_property
    def _lookups(self) -> dict[str, tuple[list[float], dict[str, list[float]]]]:
        return {}

    def curve(self, key: str) -> Curve:
        """What every threshold gives, exactly: an entry for each at which a sequence changes its exit.

        ``oracle`` (by right predictions) and ``oracle.loss`` are bounds: no way of leaving gives more at the same or
        fewer FLOPs, whatever it knows.
        """
        moves = self._moves(key)
        last = np.flatnonzero(np.diff(moves.level, append=-np.inf))  # of the moves at the same level
        n, cost = len(self.loss), self._cost(key)

        def total(values: Array) -> NDArray[np.float64]:
            """Over the sequences, of what they have in the column they leave at; values: [N, C] or [C]."""
            table = np.broadcast_to(values, self.loss.shape)
            gains = table[moves.row, moves.end].astype(float) - table[moves.row, moves.start]
            return table[:, moves.begin].sum(dtype=float) + np.append(0.0, gains.cumsum()[last])

        found = {
            "threshold": np.append(np.inf, moves.level[last]) * _sign(key),
            "flops_per_token": total(cost) / n,
            "mean_cycles": total(np.arange(1, self.n_cycles + 1)) / n,
            **self._means(total(self.loss), total(self.correct)),
        }
        return found if key in ORACLES else {name: column[::-1] for name, column in found.items()}

    def at_random(self) -> Curve:
        """To be expected of the rule ``random`` at thresholds from 0 (all leave at the first exit point) to 1."""
        threshold = np.linspace(0, 1, CHANCES)
        stay = threshold[:, None] ** np.arange(self.n_cycles)
        return {"threshold": threshold, **self.expected(np.append(stay[:, :-1] - stay[:, 1:], stay[:, -1:], 1))}

    def expected(self, shares: Array) -> Curve:
        """What is to be expected if shares [K, C] of the sequences, drawn at random, leave after cycle 1, 2, ..."""
        return {
            "flops_per_token": shares @ self.mean_flops("random"),
            "mean_cycles": shares @ np.arange(1.0, self.n_cycles + 1),
            **self._means(shares @ self.loss.sum(0, dtype=float), shares @ self.correct.sum(0, dtype=float)),
        }

    def shares(self, key: str, thresholds: Array) -> NDArray[np.float64]:
        """Shares [K, C] of the sequences that leave after cycle 1, 2, ... at thresholds [K]."""
        moves = self._moves(key)
        found = np.zeros((len(thresholds), self.n_cycles))
        found[:, moves.begin] = len(self.loss)
        for column in range(self.n_cycles):
            for ends, sign in ((moves.end, 1), (moves.start, -1)):
                rising = -moves.level[ends == column]
                found[:, column] += sign * np.searchsorted(rising, -_sign(key) * thresholds, side="right")
        return found / len(self.loss)

    def to_bytes(self) -> bytes:
        """The trace as an ``.npz`` file: the arrays by their names, ``signals/<key>`` and ``flops/<name>``."""
        arrays: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, dict):
                arrays |= {f"{item.name}/{key}": array for key, array in value.items()}
            elif value is not None:
                arrays[item.name] = value
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Trace:
        """The trace stored by ``to_bytes``."""
        found: dict[str, Any] = {"signals": {}, "flops": {}}
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            for name in arrays.files:
                group, _, key = name.partition("/")
                if key:
                    found[group][key] = arrays[name]
                else:
                    found[name] = arrays[name]
        if "bytes_per_token" in found:
            found["bytes_per_token"] = float(found["bytes_per_token"])
        return cls(**found)

    def _means(self, loss: Any, correct: Any) -> dict[str, Any]:
        scored = self.scored.sum(dtype=float)
        return with_bits({"loss": loss / scored, "accuracy": correct / scored}, self.bytes_per_token)

    def _signal(self, key: str) -> Array:
        if key not in self.signals:
            raise unknown("exit rule of the trace", key, self.rules)
        return self.signals[key]

    def mean_flops(self, rule: str = "fixed") -> NDArray[np.float64]:
        """``flops`` of a rule [C], means over the sequences."""
        return np.atleast_2d(self.flops[rule]).mean(0)

    def _cost(self, key: str) -> Array:
        """``flops`` of the rule with that key, [N, C]."""
        return np.broadcast_to(self.flops["fixed" if key in ORACLES else get_rule(key).name], self.loss.shape)

    def _moves(self, key: str) -> Moves:
        return self._oracle_moves(key) if key in ORACLES else self._rule_moves(key)

    def _rule_moves(self, key: str) -> Moves:
        """From none leaving early. A sequence can leave only where its signal is above all those before, its records:
        at the level of a record it moves there from its next one.
        """
        signal = self._signal(key)[:, :-1] * _sign(key)
        n, width = signal.shape
        highest = np.fmax.accumulate(np.concatenate([np.full((n, 1), -np.inf, signal.dtype), signal], 1), axis=1)
        record = signal > highest[:, :-1]
        here = np.where(record, np.arange(width), width)
        after = np.minimum.accumulate(np.append(here, np.full((n, 1), width), 1)[:, ::-1], axis=1)[:, ::-1][:, 1:]
        row, end = np.nonzero(record)
        return _falling(width, signal[row, end], row, after[row, end], end)

    def _oracle_moves(self, key: str) -> Moves:
        """From all leaving at the first exit point: each sequence climbs the upper hull of its scores against FLOPs,
        the steepest step first; the best use of a budget takes the steepest steps of all sequences.
        """
        value = self.correct.astype(float) if ORACLES[key] == "correct" else -self.loss.astype(float)
        cost = self._cost(key)
        rows, at = np.arange(len(value)), np.zeros(len(value), dtype=np.int64)
        found = []
        while len(rows):
            rise = value[rows] - value[rows, at][:, None]
            run = cost[rows] - cost[rows, at][:, None]
            slope = np.where(run > 0, rise / np.where(run > 0, run, 1.0), -np.inf)
            best = slope.max(1, initial=-np.inf)
            end = slope.shape[1] - 1 - slope[:, ::-1].argmax(1)  # of equal slopes the farthest
            up = best > 0
            found.append((best[up], rows[up], at[up], end[up]))
            rows, at = rows[up], end[up]
        return _falling(0, *(np.concatenate(column) for column in zip(*found, strict=True)))


def _sign(key: str) -> int:
    """-1 for a rule that leaves below its threshold: with the signs turned it leaves above."""
    return -1 if key not in ORACLES and get_rule(key).leave == "below" else 1


def _falling(begin: int, level: Array, row: Array, start: Array, end: Array) -> Moves:
    order = np.argsort(-level, kind="stable")
    return Moves(begin, level[order], row[order], start[order], end[order])


def with_bits(scores: dict[str, Any], bytes_per_token: float | None) -> dict[str, Any]:
    """The scores with bits per byte beside the loss, where the data are text."""
    if bytes_per_token is None:
        return scores
    return {**scores, "bits_per_byte": scores["loss"] / math.log(2) / bytes_per_token}
