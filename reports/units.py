"""Numbers for people."""

from __future__ import annotations

import math

from bench.evaluate.targets import AREA, EXITS, target_of

SCALES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def human(value: float) -> str:
    """Three significant digits with a decimal unit prefix: 1234567 becomes ``1.23 M``."""
    for scale, prefix in SCALES:
        if abs(value) >= scale * 0.9995:
            return f"{value / scale:.3g} {prefix}"
    return f"{value:.3g}"


def tick(value: float, _: int) -> str:
    """``human`` of a place on an axis. Here, because a figure goes to another process with it."""
    return human(value)


def plain(value: float, digits: int = 3, plus: bool = False) -> str:
    """Fixed digits, a dash for what is not known. plus: numbers above zero have a sign, too; what looks like zero has
    none.
    """
    if math.isnan(value):
        return "-"
    seen = round(value, digits)
    return f"{seen or 0.0:{'+' if plus and seen else ''}.{digits}f}"


SHARES = ("accuracy", "acc", "acc_norm", "exact_match")  # metrics that are shares, ours and the harness's
METRICS = {
    "accuracy": ("accuracy", "share of scored tokens right"),
    "bits_per_byte": ("bits per byte", "bits per byte of text"),
    EXITS: ("gain by exits", "gain over leaving at random at the same FLOPs"),
    AREA: ("area under the learning curve", "mean validation score over training tokens"),
}


def metric_name(metric: str) -> str:
    """A metric as it is called in a sentence."""
    target = target_of(metric)
    if target is not None:
        return f"training {'FLOPs' if target.cost == 'flops' else 'tokens'} to {target.score:g}"
    name, at, split = metric.partition("@")
    return (METRICS[name][0] if name in METRICS else name.replace("_", " ")) + at + split


def bounds(metric: str) -> tuple[float, float] | None:
    """The least and the greatest value of a metric, also on a further test split; None: not known."""
    if _is_share(metric):
        return 0.0, 1.0
    return (0.0, math.inf) if metric.split("@")[0] in ("loss", "bits_per_byte") else None


def gap_bounds(metric: str) -> tuple[float, float] | None:
    """Those of a difference of two values of a metric; None: not known, or none."""
    return (-1.0, 1.0) if _is_share(metric) else None


def _is_share(metric: str) -> bool:
    return metric.split("@")[0].split(" (")[0] in SHARES
