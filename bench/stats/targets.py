"""What it costs to reach a score, and how good a run was along its way: statistics of learning curves."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from bench.stats.intervals import Array


def cost_to(cost: ArrayLike, score: ArrayLike, target: float, higher_is_better: bool) -> float:
    """The cost at which a learning curve first reaches the target; infinite if it never does.

    At the points where it was evaluated, with nothing interpolated; a NaN score reaches nothing.

    Args:
        cost: [P], rising.
        score: [P].
        target: to be reached or passed.
        higher_is_better: the direction of the score.
    """
    scores = np.asarray(score, dtype=float)
    reached = scores >= target if higher_is_better else scores <= target
    return float(np.asarray(cost, dtype=float)[reached.argmax()]) if reached.any() else math.inf


def restricted(a: ArrayLike, b: ArrayLike, budget_a: ArrayLike, budget_b: ArrayLike) -> Array:
    """log(b / a) of paired costs [n], each at most the budget that the pair shares; NaN where one of the pair is NaN.

    A run that did not reach the target costs at least its budget. Costs are therefore cut off at the smaller budget of
    the pair, as for a restricted mean survival time (Royston & Parmar 2013). Two equal variants give differences that
    lie symmetrically about 0 whatever the budgets are, so that the sign-flip test of them is exact, and it uses how
    much cheaper a run was, which a sign test or Gehan's (1965) scores do not. The difference is never exaggerated: what
    is beyond the shared budget counts nothing. A contrast of a verdict (``Contrast``) takes these differences.

    Args:
        a: costs to the target of one variant, by seed; infinite where it was not reached.
        b: those of the other, same seeds.
        budget_a: cost of each whole run of a, [n] or one for all.
        budget_b: those of b.

    Raises:
        ValueError: a cost or a budget is not above 0, or a finite cost is above its budget.
    """
    one, other = (np.asarray(costs, dtype=float) for costs in (a, b))
    limits = [np.broadcast_to(np.asarray(budget, dtype=float), one.shape) for budget in (budget_a, budget_b)]
    for costs, limit in zip((one, other), limits, strict=True):
        if (costs <= 0).any() or not (limit > 0).all() or (np.isfinite(costs) & (costs > limit)).any():
            raise ValueError("costs must be above 0 and at most their budget, or infinite")
    shared = np.minimum(*limits)
    return np.asarray(np.log(np.minimum(other, shared) / np.minimum(one, shared)))


def area_under_curve(x: ArrayLike, y: ArrayLike) -> float:
    """Mean height of a learning curve over its x range, by trapezoids: its area divided by its width, in y's unit.

    NaN for fewer than two points or a NaN among the values.

    Args:
        x: [P], rising; tokens or FLOPs.
        y: [P]; the score.

    Raises:
        ValueError: x does not rise.
    """
    place, height = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if (np.diff(place) <= 0).any():
        raise ValueError("x must rise")
    if len(place) < 2:
        return math.nan
    return float(np.trapezoid(height, place) / (place[-1] - place[0]))
