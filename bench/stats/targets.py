"""What it costs to reach a score, and how good a run was along its way: statistics of learning curves."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from bench.stats.contrasts import Paired, paired
from bench.stats.intervals import Array


@dataclass(frozen=True)
class CostContrast:
    """Costs of a against b over n pairs, of which some never reached the target.

    log_ratio: the paired contrast of log(b / a), positive where a is cheaper; its interval and exp of its mean are of
    the costs within the budget that a pair shares. censored_a, censored_b: runs that did not reach the target within
    their own budget. a_cheaper, b_cheaper, unknown: pairs by what is known; a pair is unknown where neither reached it
    within the shared budget, or both at the same cost.
    """

    log_ratio: Paired
    censored_a: int
    censored_b: int
    a_cheaper: int
    b_cheaper: int
    unknown: int


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


def paired_costs(a: ArrayLike, b: ArrayLike, budget_a: ArrayLike, budget_b: ArrayLike) -> CostContrast:
    """Compare the costs of a and b by the seeds they share; arguments and errors as of ``restricted``."""
    gap = restricted(a, b, budget_a, budget_b)
    there = ~np.isnan(gap)
    gap = gap[there]
    missed_a, missed_b = (int(np.isinf(np.asarray(costs, dtype=float)[there]).sum()) for costs in (a, b))
    cheaper, dearer = int((gap > 0).sum()), int((gap < 0).sum())
    return CostContrast(paired(gap), missed_a, missed_b, cheaper, dearer, len(gap) - cheaper - dearer)


def area_under_curve(x: ArrayLike, y: ArrayLike, log_x: bool = False) -> float:
    """Mean height of a learning curve over its x range, by trapezoids: its area divided by its width, in y's unit.

    NaN for fewer than two points or a NaN among the values.

    Args:
        x: [P], rising; tokens or FLOPs.
        y: [P]; the score.
        log_x: widths are measured on a log axis, so that early progress counts more. Needs x above 0.

    Raises:
        ValueError: x does not rise, or is not above 0 where its logarithm is taken.
    """
    place, height = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if log_x and (place <= 0).any():
        raise ValueError("x must be above 0 for a log axis")
    if (np.diff(place) <= 0).any():
        raise ValueError("x must rise")
    if len(place) < 2:
        return math.nan
    place = np.log(place) if log_x else place
    return float(np.trapezoid(height, place) / (place[-1] - place[0]))
