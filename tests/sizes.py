"""How many studies a simulation draws: a fifth of them by default, all in ``make torture``."""

from __future__ import annotations

import os

SHARE = float(os.environ.get("CYCLEBENCH_SIMULATIONS", "0.2"))


def drawn(whole: int) -> int:
    """Of so many, the number to draw."""
    return max(20, round(whole * SHARE))
