"""How many seeds an effect needs, and which effect some seeds can show, by the sign-flip test that is really used.

For normal differences of mean m and standard deviation s, a one-sided sign-flip test on n pairs is a t test whose
critical value depends on how the residuals (the differences less m, divided by s) lie: it is the K-th greatest of the
negative means of all subsets of them (Hartigan 1969, JASA 64), where K patterns beside the one seen may be as extreme.
Residuals are independent of m and s, so that only they are simulated, and the power for each critical value is computed
(tests/test_stats_power.py holds it against the test itself at every level in use).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from bench.stats.contrasts import Array
from bench.stats.distributions import chi_square_above, normal_below, student_quantile

MOST_SEEDS = 10_000
ALL_SUBSETS = 12  # up to so many pairs every subset is looked at; beyond, the tail is found by a saddlepoint
LIKE_T = 100  # from here on the critical value is the t test's, to 0.01
COARSE = 18  # from here on the levels that a test can give are within 2 % of any alpha in use
NODES = 32  # of the distribution of s


def attainable_level(n: int, alpha: float) -> float:
    """The greatest two-sided p below alpha that the sign-flip test on n pairs can give; 0 if there is none."""
    if n > 40:  # the steps are finer than any alpha
        return alpha
    patterns = 2.0 ** (n - 1)
    return max(0.0, math.ceil(alpha * patterns) - 1) / patterns


def power_of(effect: float, sd: float, n: int, alpha: float = 0.05) -> float:
    """Probability that n pairs show ``effect`` > 0 (beyond the margin), in its direction, at two-sided level alpha.

    For normal differences of the given sd; effect and sd are in the metric's unit.
    """
    if n < 2 or attainable_level(n, alpha) == 0 or effect <= 0:
        return 0.0
    if sd == 0:
        return 1.0
    return float(normal_below(math.sqrt(n) * effect / sd - _cuts(n, alpha / 2)).mean())


def equivalence_power(effect: float, sd: float, n: int, within: float, alpha: float = 0.05) -> float:
    """Probability that two one-sided sign-flip tests at level alpha show that a true mean ``effect`` is within bounds.

    For normal differences.

    Args:
        effect: the true mean difference, of any sign.
        sd: standard deviation of the differences.
        n: pairs.
        within: the bounds are -within and within.
        alpha: level of each of the two tests, which is that of the whole.
    """
    if n < 2 or attainable_level(n, 2 * alpha) == 0 or abs(effect) >= within:
        return 0.0
    if sd == 0:
        return 1.0
    root, scales = math.sqrt(n) / sd, _scales(n)
    above, below = (critical_values(n, alpha)[:1024, side, None] * scales for side in (0, 1))
    chance = normal_below(root * (within - effect) - below) - normal_below(above - root * (within + effect))
    return float(np.maximum(chance, 0.0).mean())


def detectable(sd: float, n: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest effect that n pairs show with the given power; infinite if none can be, NaN without sd."""
    if math.isnan(sd):
        return math.nan
    if n < 2 or attainable_level(n, alpha) == 0:
        return math.inf
    if sd == 0:
        return 0.0
    from scipy import optimize  # start-up

    high = sd
    while power_of(high, sd, n, alpha) < power:
        high *= 2
    return float(optimize.brentq(lambda effect: power_of(effect, sd, n, alpha) - power, 0.0, high, xtol=1e-12 * sd))


def seeds_needed(effect: float, sd: float, alpha: float = 0.05, power: float = 0.8) -> int | None:
    """The fewest pairs that show ``effect`` with the given power; None if more than MOST_SEEDS, or sd is NaN."""
    return _fewest(lambda n: power_of(effect, sd, n, alpha), power, _guess(effect, sd, alpha / 2, power))


def seeds_for_equivalence(
    effect: float, sd: float, within: float, alpha: float = 0.05, power: float = 0.8
) -> int | None:
    """The fewest pairs that show a true mean ``effect`` to be within bounds (``equivalence_power``); None as above."""
    near = _guess(within - abs(effect), sd, alpha, power)
    return _fewest(lambda n: equivalence_power(effect, sd, n, within, alpha), power, near)


def critical_shift(noise: Array, level: float) -> Array:
    """By how much noise [R, n] has to be shifted upwards for the one-sided sign-flip test to give p < level, [R].

    Exact up to ALL_SUBSETS pairs. Beyond, p is taken from Robinson's (1982, JRSS B 44(1)) saddlepoint approximation of
    the test. Infinite where the test cannot give such a p.
    """
    n = noise.shape[1]
    count = _as_extreme(n, level)
    if count < 1:
        return np.full(len(noise), math.inf)
    if count == 1:  # all differences have to be above zero
        return np.asarray(-noise.min(axis=1))
    if n <= ALL_SUBSETS:
        return np.asarray(-np.partition(noise @ _subsets(n), count - 1, axis=1)[:, count - 1])
    low, high = -noise.mean(axis=1), -noise.min(axis=1)  # p is 1/2 there, and the least there is
    for _ in range(16):
        middle = (low + high) / 2
        significant = _saddlepoint(noise + middle[:, None]) < level
        low, high = np.where(significant, low, middle), np.where(significant, middle, high)
    return (low + high) / 2


@lru_cache(maxsize=1024)
def critical_values(n: int, level: float) -> Array:
    """Critical t values [R, 2] of simulated residuals for the one-sided test at a level: upwards and downwards."""
    if n >= LIKE_T:
        return np.full((1, 2), -student_quantile(n - 1, level))
    many = min(2048, max(128, 2**21 >> n))  # critical values differ most where pairs are few
    noise = np.random.default_rng(n).normal(size=(many, n))
    residuals = (noise - noise.mean(axis=1, keepdims=True)) / noise.std(axis=1, ddof=1, keepdims=True)
    return math.sqrt(n) * np.stack(_shifts(residuals, level), axis=1)


def _as_extreme(n: int, level: float) -> int:
    """How many of the 2^n patterns of signs may be as extreme as what is seen, itself included, where p < level."""
    return math.ceil(level * 2.0**n) - 1


def _shifts(noise: Array, level: float) -> tuple[Array, Array]:
    """``critical_shift`` of the noise and of its negative, [R] both: from one look at the means of all subsets."""
    n = noise.shape[1]
    count = _as_extreme(n, level)
    if count <= 1 or n > ALL_SUBSETS:
        return critical_shift(noise, level), critical_shift(-noise, level)
    least, most = count - 1, 2**n - 1 - count
    means = np.partition(noise @ _subsets(n), (least, most), axis=1)
    return -means[:, least], means[:, most]


def typical_shift(noise: Array, level: float) -> Array:
    """``critical_shift``, with the mean critical t value in place of each sample's own beyond 12 pairs: for
    simulations of many samples.
    """
    n = noise.shape[1]
    if n <= 12 or _as_extreme(n, level) <= 1:
        return critical_shift(noise, level)
    critical = critical_values(n, level).mean() / math.sqrt(n)
    return np.asarray(critical * noise.std(axis=1, ddof=1) - noise.mean(axis=1))


@lru_cache(maxsize=256)
def _cuts(n: int, level: float) -> Array:
    """Critical values times s over its true value, [NODES, NODES]: at the middles of equally probable parts of both."""
    critical = np.quantile(critical_values(n, level), (np.arange(NODES) + 0.5) / NODES)
    return np.asarray(critical[:, None] * _scales(n))


@lru_cache(maxsize=4)
def _subsets(n: int) -> Array:
    """Weights [n, 2^n - 1] that make the mean of every subset but the empty one; not to be changed."""
    members = (np.arange(1, 2**n)[:, None] >> np.arange(n) & 1).astype(float)
    return np.asarray((members / members.sum(axis=1, keepdims=True)).T)


def _saddlepoint(differences: Array) -> Array:
    """One-sided p [R] of the sign-flip test on differences [R, n] whose mean is above zero and least one below it.

    The sum of the flipped differences has the cumulants' function K(t) = sum log cosh(t d); p is a normal tail at
    Barndorff-Nielsen's r* (1986).
    """
    seen, tilt = differences.sum(axis=1), np.zeros(len(differences))
    for _ in range(12):  # Newton's steps to K'(tilt) = seen, from below since K' is concave
        slope = np.tanh(tilt[:, None] * differences)
        bend = (differences**2 * (1 - slope**2)).sum(axis=1)
        before = tilt
        tilt = np.minimum(tilt + (seen - (differences * slope).sum(axis=1)) / np.maximum(bend, 1e-300), 1e3)
        if (tilt - before <= 1e-9 * tilt).all():  # each step doubles the digits that are right
            break
    scaled = np.abs(tilt[:, None] * differences)
    cumulant = (scaled + np.log1p(np.exp(-2 * scaled)) - math.log(2)).sum(axis=1)
    bend = (differences**2 / np.cosh(np.minimum(scaled, 300)) ** 2).sum(axis=1)
    root = np.sqrt(np.maximum(2 * (tilt * seen - cumulant), 1e-12))
    return np.asarray(normal_below(-(root + np.log(np.maximum(tilt * np.sqrt(bend), 1e-300) / root) / root)))


@lru_cache(maxsize=256)
def _scales(n: int) -> Array:
    """s over its true value at the middles [NODES] of equally probable parts of its distribution."""
    return np.sqrt(chi_square_above(n - 1, 1 - (np.arange(NODES) + 0.5) / NODES) / (n - 1))


def _guess(effect: float, sd: float, level: float, power: float) -> int:
    """About how many pairs a one-sided test at the level needs, by the normal distribution."""
    if not (effect > 0 and sd > 0):
        return 2
    quantiles = student_quantile(MOST_SEEDS, 1 - level) + student_quantile(MOST_SEEDS, power)
    return round(min(MOST_SEEDS - 1.0, max(2.0, (quantiles * sd / effect) ** 2 + 2)))


def _fewest(power_at: Callable[[int], float], power: float, near: int) -> int | None:
    """The fewest pairs with the power. near: where they are looked for first, as every number of pairs takes time."""
    if not power_at(MOST_SEEDS) >= power:
        return None
    low, high = 1, MOST_SEEDS  # power rises with n but for the steps of the attainable level
    middle, step = near, 1
    while high - low > 1:
        enough = power_at(middle) >= power
        low, high = (low, middle) if enough else (middle, high)
        ahead = middle - step if enough else middle + step
        middle, step = (ahead, 2 * step) if low < ahead < high else ((low + high) // 2, step)
    fewer = range(max(2, high - 12), min(high, COARSE))
    return next((n for n in fewer if power_at(n) >= power), high)
