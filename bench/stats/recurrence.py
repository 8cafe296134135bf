"""The recurrence-equivalence exponent phi: r cycles of a block are worth r^phi blocks of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from bench.stats.intervals import Array, Interval, has_spread, over_seeds

LEAST, MOST = -0.5, 1.5  # phi is looked for here: 0 is a cycle worth nothing, 1 one worth a block of its own
STEP = 0.01


@dataclass(frozen=True)
class Recurrence:
    """phi, with its interval over the seeds; score = intercept + slope x log(fixed + cycled x r^phi).

    phi is NaN (and note says why) where the rows cannot tell it, or tell that blocks do harm. r2: share of the variance
    between configurations that the curve explains; a low one says that this form does not hold. configurations:
    distinct (fixed, cycled, cycles).
    """

    phi: Interval
    intercept: float
    slope: float
    r2: float
    configurations: int
    note: str


def fit_phi(
    fixed: ArrayLike,
    cycled: ArrayLike,
    cycles: ArrayLike,
    score: ArrayLike,
    seed: ArrayLike,
    higher_is_better: bool = True,
) -> Recurrence:
    """Fit phi to scores of models of one width and one amount of data that differ in blocks and cycles.

    The effective number of blocks is fixed + cycled x cycles^phi, as in the iso-depth scaling law of arXiv 2604.21106
    (L = E + A (N_once + r^phi N_rec)^-alpha + B D^-beta; phi = 0.46 there, 1 where a cycle is worth a block of its own,
    0 where it is worth nothing). There 116 runs fit six parameters; a study has a few configurations, so that the power
    law is replaced by its first order, a score that is linear in the logarithm of the effective blocks. That is
    monotone, needs three parameters, and holds for accuracies and losses over the narrow range of depths of a study.
    Least squares on the configurations' means; the interval is that of ``over_seeds``.

    Args:
        fixed: blocks passed once (prelude and coda) of each run [N].
        cycled: blocks in the cycle.
        cycles: number of cycles r, 1 for a plain stack.
        score: of each run, finite.
        seed: of each run.
        higher_is_better: of the score. Where it becomes worse with blocks, there is no phi: a cycle that is worth much
            would be one that does much harm.

    Raises:
        ValueError: a configuration stands twice for one seed.
    """
    columns = np.stack([np.asarray(column, dtype=float) for column in (fixed, cycled, cycles)], axis=1).reshape(-1, 3)
    shapes, which = np.unique(columns, axis=0, return_inverse=True)
    seeds, place = np.unique(np.asarray(seed), return_inverse=True)
    scores = np.full((len(shapes), len(seeds)), math.nan)
    which = which.reshape(-1)
    if len(set(zip(which.tolist(), place.tolist(), strict=True))) < len(which):
        raise ValueError("a configuration stands twice for one seed")
    scores[which, place] = np.asarray(score, dtype=float)
    means = _means(scores)
    nothing = Interval(math.nan, math.nan, math.nan, len(seeds), "none")
    note = _untold(shapes, means)
    if note:
        return Recurrence(nothing, math.nan, math.nan, math.nan, len(shapes), note)
    phi = _phi(shapes, means)
    x = _log_blocks(shapes, phi)
    slope, intercept = np.polyfit(x, means, 1)
    if (slope > 0) != higher_is_better:
        note = "more blocks and cycles score worse here: phi would compare harms"
        return Recurrence(nothing, float(intercept), float(slope), math.nan, len(shapes), note)
    left, whole = (float((gap**2).sum()) for gap in (means - intercept - slope * x, means - means.mean()))
    r2 = 1 - left / whole
    found = over_seeds(lambda some: _phi(shapes, _means(some)), scores, (LEAST, MOST))
    notes = []
    if len(shapes) == 3:
        r2 = math.nan
        notes.append("as many parameters as configurations: the form is not tested")
    if not LEAST < phi < MOST:
        notes.append(f"at an end of the range looked at, {LEAST:g} to {MOST:g}")
    elif found.kind != "none" and not LEAST < found.low <= found.high < MOST:
        notes.append(f"the interval ends where the range looked at does, {LEAST:g} to {MOST:g}")
    return Recurrence(found, float(intercept), float(slope), r2, len(shapes), "; ".join(notes))


def _untold(shapes: Array, means: Array) -> str:
    """Why the means [C] of configurations [C, 3] cannot tell phi; empty if they can."""
    if len(shapes) < 3:
        return "fewer than three configurations"
    if np.ptp(shapes[:, 2]) == 0:
        return "the number of cycles does not vary"
    ends = np.array([LEAST, MOST])
    if (np.ptp(shapes[:, :2], axis=0) == 0).all() or abs(
        np.atleast_2d(np.corrcoef(_log_blocks(shapes, ends)))[0, -1]
    ) > 1 - 1e-9:
        return "blocks and cycles do not vary by themselves: slope and phi cannot be told apart"
    if not np.isfinite(means).all():
        return "a configuration has no score"
    return "" if has_spread(means) else "all configurations score the same"


def _log_blocks(shapes: Array, phi: Array) -> Array:
    """log of the effective blocks [..., C] for every phi [...]."""
    fixed, cycled, cycles = shapes.T
    return np.asarray(np.log(fixed + cycled * cycles ** phi[..., None]))


def _means(scores: Array) -> Array:
    """Mean over the seeds of scores [..., C, n]; NaN where a configuration has none."""
    count = np.isfinite(scores).sum(axis=-1)
    return np.divide(np.nansum(scores, axis=-1), count, out=np.full(count.shape, math.nan), where=count > 0)


def _phi(shapes: Array, means: Array) -> Array:
    """The phi [...] whose curve explains most of the means [..., C]: on a grid, refined by a parabola at its best."""
    grid = np.arange(LEAST, MOST + STEP / 2, STEP)
    x = _log_blocks(shapes, grid)
    x = x - x.mean(axis=1, keepdims=True)
    norm = np.sqrt((x**2).sum(axis=1, keepdims=True))
    norm[norm < 1e-12] = math.nan  # all configurations alike at this phi
    explained = ((means - means.mean(axis=-1, keepdims=True)) @ (x / norm).T) ** 2
    best = np.clip(np.where(np.isnan(explained), -1.0, explained).argmax(axis=-1), 1, len(grid) - 2)
    left, middle, right = (np.take_along_axis(explained, (best + by)[..., None], -1)[..., 0] for by in (-1, 0, 1))
    bend = 2 * middle - left - right
    shift = np.divide(right - left, 2 * bend, out=np.zeros_like(bend), where=np.abs(bend) > 0)
    return np.where(np.isnan(middle), math.nan, grid[best] + STEP * np.clip(shift, -1, 1))
