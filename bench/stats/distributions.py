"""The distributions behind intervals and tests, by name. scipy's functions are imported where they are first called:
they take longer to import than the command line, most of which computes nothing.
"""

from __future__ import annotations

from typing import Any


def normal_below(x: Any) -> Any:
    """The chance that a standard normal variable lies below x."""
    from scipy import special  # start-up (not scipy.stats: it takes longer to import than a report to read its cells)

    return special.ndtr(x)


def student_quantile(freedom: Any, share: Any) -> Any:
    """Below which a Student's t of so many degrees of freedom lies with a probability of ``share``."""
    from scipy import special  # start-up

    return special.stdtrit(freedom, share)


def chi_square_above(freedom: Any, share: Any) -> Any:
    """Above which a chi-square of so many degrees of freedom lies with a probability of ``share``."""
    from scipy import special  # start-up

    return special.chdtri(freedom, share)


def binomial_up_to(k: Any, n: int, share: float) -> Any:
    """The chance of at most k successes among n, each of which comes with a probability of ``share``."""
    from scipy import special  # start-up

    return special.bdtr(k, n, share)


def log_gamma(x: float) -> float:
    """The logarithm of the gamma function."""
    from scipy import special  # start-up

    return float(special.gammaln(x))
