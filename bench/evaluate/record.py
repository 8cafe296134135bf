"""What is stored of a trained model's exits, and the keys it is stored under.

``exits`` of a record (None with a single exit point), scores being ``flops_per_token`` (executed, forward),
``mean_cycles``, ``loss``, ``accuracy`` and, for text, ``bits_per_byte``:

``points``  test scores when all sequences leave after cycle 1, 2, ... C (with ``cycles`` for ``mean_cycles``), with the
            validation scores there as ``valid``
``rules``   by ``Rule.key`` (and ``oracle``, ``oracle.loss``), what ``rule_record`` says

``cycles`` of a record: test scores of the model run for 1, 2, ... cycles (``cycles``, ``flops_per_token``, ``loss``,
...), beyond those it was trained with as far as ``evaluation.max_cycles`` says, and as far as the loss is finite.

``loops`` of a record: what happens to the state over those cycles (``bench.evaluate.loops``), on the first
``evaluation.loop_sequences`` sequences of the test data.

Beside the record lie the whole traces, of the test data (``trace.npz``) and of the validation data
(``trace_valid.npz``), from which every number here can be made again (``bench.evaluate.trace.Trace``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np
import torch
from numpy.typing import NDArray

from bench.config import EvalConfig
from bench.data.batches import arrays
from bench.data.task import Metric, TaskData
from bench.evaluate.evaluation import by_cycles, evaluate
from bench.evaluate.examples import examples
from bench.evaluate.loops import loop_points
from bench.evaluate.rules import ORACLES, all_rules, get_rule
from bench.evaluate.trace import Curve, Trace, with_bits
from bench.model.network import Network
from bench.store.records import Calibration, ExitsRecord, LoopPoint, Point, RuleRecord, TunedThreshold

POINTS = 65  # of a stored curve
BINS = 10  # of the calibration
ITERATIONS = 8  # for each spectral radius: a few percent of what all tests of a cell take
BUDGETS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # shares of the FLOPs at full depth


@dataclass(frozen=True)
class Examined:
    """A trained model on validation and test data: the traces, and the record's ``exits``, ``cycles``, ``loops``."""

    test: Trace
    valid: Trace
    exits: ExitsRecord | None
    cycles: list[Point]
    loops: list[LoopPoint]


def examine(lm: Network, data: TaskData, evaluation: EvalConfig) -> Examined:
    """Trace a trained model under every rule it can be used with, and run it for other numbers of cycles."""
    rules = all_rules() if lm.schedule.n_cycles > 1 else []
    most = (evaluation.max_cycles or 2 * lm.model_shape.n_cycles) if lm.variant.cycled else 1
    per_byte = data.bytes_of("test")
    valid = replace(evaluate(lm, *arrays(data.valid), rules=rules), bytes_per_token=data.bytes_of("valid"))
    test, cycles = by_cycles(lm, *arrays(data.test), most, rules)
    test = replace(test, bytes_per_token=per_byte)
    finite = takewhile(lambda scores: math.isfinite(scores["loss"]), cycles)  # of more cycles than it was trained with
    exits = exits_record(valid, test, data.metric) if rules else None
    if exits is not None and (shown := examples(data, test, exits)) is not None:
        exits.examples = shown
    points = [Point.model_validate(with_bits(scores, per_byte)) for scores in finite]
    return Examined(test, valid, exits, points, _loops(lm, data, most, evaluation.loop_sequences))


def _loops(lm: Network, data: TaskData, most: int, sequences: int) -> list[LoopPoint]:
    """The state over so many cycles, of an elastic variant over those it was trained with, as more would go the same
    way; empty if the schedule does not pass its shared part once a cycle.
    """
    if lm.variant.elastic:
        most = min(most, lm.model_shape.n_cycles)
    if not sequences or most == 1 or lm.schedule_at(most).n_cycles != most:
        return []
    ids, _ = arrays(data.test, sequences)
    return loop_points(lm, torch.from_numpy(ids).to(lm.device), most, ITERATIONS)


def exits_record(valid: Trace, test: Trace, metric: Metric) -> ExitsRecord:
    """``exits`` of a record, from the traces."""
    points = [
        Point(cycles=number, flops_per_token=float(flops), **test.leaving(number), valid=valid.leaving(number))
        for number, flops in enumerate(test.mean_flops(), 1)
    ]
    return ExitsRecord(points=points, rules={key: rule_record(key, valid, test, metric) for key in test.rules})


def rule_record(key: str, valid: Trace, test: Trace, metric: Metric) -> RuleRecord:
    """What is stored of a rule.

    ``leave``   on which side of the threshold it leaves
    ``curve``   at most 65 points of the exact test curve, evenly spread over its FLOPs, as columns: scores,
                ``threshold`` (null: none leaves early) and ``share`` (of sequences leaving after cycle 1, 2, ... C);
                of ``random`` what is to be expected, not one draw
    ``gain``    mean over the curve's range of mean cycles of what the metric is better than with as many sequences
                leaving after each cycle, but drawn at random: what the choice is worth, whatever it costs
    ``area``    mean over the FLOPs per token from one cycle to all of what the metric is better than that of ``random``
                at the same FLOPs, over the part of that range that the rule reaches: what it is worth after its costs
    ``tuned``   for each ``budget`` (share of the FLOPs at full depth): the ``threshold`` whose validation metric is the
                best within it, with its scores on ``valid`` and ``test`` and the ``share`` of test sequences that leave
                after each cycle; oracles and random are not tuned
    ``rank``    of each exit point: rank correlation, over the sequences, of how much the signal speaks for staying with
                by how much the loss is lower at full depth than here (null where one of them is the same for all)
    ``calibration``  of the confidence (``confidence.last`` where each sequence has one target, else ``confidence``):
                ``signal`` and ``accuracy``, means in tenths of the sequences at all exit points, by rising signal
    """
    above = key in ORACLES or get_rule(key).leave == "above"
    chance = test.at_random()
    if key == "random":
        curve, share = chance, None
    else:
        whole = test.curve(key)
        kept = _spread(whole["flops_per_token"])
        curve = {name: column[kept] for name, column in whole.items()}
        share = test.shares(key, curve["threshold"])
    sign = 1 if metric.higher_is_better else -1
    better = np.zeros(len(curve["threshold"]))
    if share is not None:
        better = sign * (curve[metric.name] - test.expected(share)[metric.name])
    found = RuleRecord(
        leave="above" if above else "below",
        curve={name: _listed(column) for name, column in curve.items()},
        gain=_mean_over(curve["mean_cycles"], better),
        area=_area(curve, chance, metric.name, sign, test.mean_flops()),
    )
    if share is not None:
        found.curve["share"] = share.round(6).tolist()
    if key not in ORACLES and key != "random":
        found.tuned = tune(key, valid, test, metric)
    if key in test.signals and key not in ("fixed", "random"):
        found.rank = rank(key, test)
    if key == ("confidence.last" if test.scored.max() == 1 else "confidence") and key in test.signals:
        found.calibration = calibration(key, test)
    return found


def rank(key: str, trace: Trace) -> list[float | None]:
    """See ``rule_record``; Spearman's, for every exit point [C - 1]."""
    from scipy.stats import spearmanr  # start-up

    stay = trace.signals[key] * (-1 if get_rule(key).leave == "above" else 1)
    gain = (trace.loss - trace.loss[:, -1:]) / trace.scored[:, None]
    found = []
    for column in range(trace.n_cycles - 1):
        same = np.ptp(stay[:, column]) == 0 or np.ptp(gain[:, column]) == 0
        found.append(None if same else float(spearmanr(stay[:, column], gain[:, column]).statistic))
    return found


def calibration(key: str, trace: Trace) -> Calibration:
    """See ``rule_record``."""
    signal, accuracy = trace.signals[key].ravel(), (trace.correct / trace.scored[:, None]).ravel()
    bins = np.array_split(np.argsort(signal, kind="stable"), min(BINS, len(signal)))
    means = {"signal": signal, "accuracy": accuracy}
    found = {name: [float(values[rows].mean(dtype=float)) for rows in bins] for name, values in means.items()}
    return Calibration(**found)


def tune(key: str, valid: Trace, test: Trace, metric: Metric) -> list[TunedThreshold]:
    """For every budget that the rule can keep on the validation data: the threshold chosen there, and what it gives."""
    curve, full, found = valid.curve(key), float(valid.mean_flops()[-1]), []
    values = curve[metric.name] * (1 if metric.higher_is_better else -1)
    for budget in BUDGETS:
        within = curve["flops_per_token"] <= budget * full * (1 + 1e-9)
        if within.any():
            best = int(np.where(within, values, -np.inf).argmax())  # the first, hence the cheapest, of the best
            threshold = curve["threshold"][best]
            scores = {name: float(column[best]) for name, column in curve.items() if name != "threshold"}
            found.append(
                TunedThreshold(
                    budget=budget,
                    threshold=_listed(curve["threshold"][[best]])[0],
                    valid=scores,
                    test=test.score(key, threshold),
                    share=test.shares(key, np.array([threshold]))[0].round(6).tolist(),
                )
            )
    return found


def _spread(flops: NDArray[np.float64]) -> NDArray[np.int64]:
    """Positions of at most ``POINTS`` entries, the first and the last among them, evenly spread over the FLOPs."""
    wanted = np.linspace(flops[0], flops[-1], POINTS)
    return np.unique(np.append(np.searchsorted(flops, wanted).clip(max=len(flops) - 1), [0, len(flops) - 1]))


def _mean_over(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Mean of the line through (x, y), x rising, over its range; 0 where it has none."""
    span = float(x[-1] - x[0])
    return float(np.trapezoid(y, x)) / span if span > 0 else 0.0


def _area(curve: Curve, chance: Curve, metric: str, sign: int, plain: NDArray[np.float64]) -> float:
    """See ``rule_record``; the grid holds every corner of both lines."""
    low, high = max(curve["flops_per_token"][0], plain[0]), min(curve["flops_per_token"][-1], plain[-1])
    grid = np.unique(np.concatenate([curve["flops_per_token"], chance["flops_per_token"], [low, high]]))
    grid = grid[(grid >= low) & (grid <= high)]
    if len(grid) < 2:
        return 0.0
    rule, random = (np.interp(grid, line["flops_per_token"], line[metric]) for line in (curve, chance))
    return _mean_over(grid, sign * (rule - random))


def _listed(column: NDArray[np.float64]) -> list[float | None]:
    return [None if np.isinf(value) else float(value) for value in column]
