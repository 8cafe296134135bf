"""How many seeds an effect needs, and which effect some seeds can show."""

from __future__ import annotations

import math

from scipy import optimize, stats

MOST_SEEDS = 10_000


def attainable_level(n: int, alpha: float) -> float:
    """The greatest p below alpha that the sign-flip test on n pairs can give: k / 2^(n-1), 0 if there is none."""
    if n > 40:  # the steps are finer than any alpha
        return alpha
    patterns = 2.0 ** (n - 1)
    return max(0.0, math.ceil(alpha * patterns) - 1) / patterns


def power_of(effect: float, sd: float, n: int, alpha: float = 0.05) -> float:
    """Probability that n pairs show ``effect`` > 0 (beyond the margin), in its direction, at two-sided level alpha.

    For normal differences of the given sd. Where only "all differences have one sign" is significant it is exactly
    Phi(effect/sd)^n; otherwise the power of the paired t test (noncentral t) at the level the sign-flip test can
    attain, which it follows closely from above (tests/test_stats_power.py).
    """
    level = attainable_level(n, alpha) if n > 1 else 0.0
    if level == 0 or effect <= 0:
        return 0.0
    if sd == 0:
        return 1.0
    if n <= 40 and level == 2.0 ** (1 - n):
        return float(stats.norm.cdf(effect / sd) ** n)
    noncentrality = effect / sd * math.sqrt(n)
    if noncentrality > 35:  # beyond what scipy's noncentral t is good for, and certain anyway
        return 1.0
    return float(stats.nct.sf(stats.t.isf(level / 2, n - 1), n - 1, noncentrality))


def detectable(sd: float, n: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest effect that n pairs show with the given power; infinite if none can be, NaN without sd."""
    if math.isnan(sd):
        return math.nan
    if n < 2 or attainable_level(n, alpha) == 0:
        return math.inf
    if sd == 0:
        return 0.0
    high = sd
    while power_of(high, sd, n, alpha) < power:
        high *= 2
    return float(optimize.brentq(lambda effect: power_of(effect, sd, n, alpha) - power, 0.0, high, xtol=1e-12 * sd))


def seeds_needed(effect: float, sd: float, alpha: float = 0.05, power: float = 0.8) -> int | None:
    """The fewest pairs that show ``effect`` with the given power; None if more than MOST_SEEDS."""
    if power_of(effect, sd, MOST_SEEDS, alpha) < power:
        return None
    low, high = 1, MOST_SEEDS  # power rises with n but for the steps of the attainable level
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power_of(effect, sd, middle, alpha) >= power else (middle, high)
    return next(n for n in range(max(2, high - 12), high + 1) if power_of(effect, sd, n, alpha) >= power)
