"""What the seeds say about a claim: supported, refuted or inconclusive."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bench.stats.contrasts import Paired, holm, paired
from bench.stats.power import attainable_level, detectable

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Contrast:
    """Paired differences [n] of a claim "better by more than margin": positive is as claimed.

    planned: pairs of seeds that should be there; failed: those without a difference because a cell failed.
    """

    differences: NDArray[np.float64]
    margin: float = 0.0
    planned: int = 0
    failed: int = 0


@dataclass(frozen=True)
class Verdict:
    """A verdict with the numbers that say so. p_corrected: Holm over the family; detectable: the smallest effect beyond
    the margin that so many pairs show with power 0.8 at the first step of Holm (alpha / family); note: plain words.
    """

    verdict: Literal["supported", "refuted", "inconclusive"]
    found: Paired
    p_corrected: float
    detectable: float
    note: str


def judge(family: Sequence[Contrast]) -> list[Verdict]:
    """A verdict for every contrast of a family, corrected for all of them, those without data included.

    Supported: the corrected p of the test against the margin is below 0.05 and the whole 95 % interval, hence the mean,
    is beyond the margin. Refuted: the same on the other side of the margin. Else inconclusive.
    """
    found = [paired(contrast.differences, margin=contrast.margin) for contrast in family]
    corrected = holm([pair.p for pair in found])
    return [
        _verdict(contrast, pair, float(p), len(family))
        for contrast, pair, p in zip(family, found, corrected, strict=True)
    ]


def _verdict(contrast: Contrast, found: Paired, p: float, family: int) -> Verdict:
    gap, margin = found.difference, contrast.margin
    verdict: Literal["supported", "refuted", "inconclusive"] = "inconclusive"
    if p < SIGNIFICANT and gap.low > margin:
        verdict = "supported"
    elif p < SIGNIFICANT and gap.high < margin:
        verdict = "refuted"
    notes = []
    if gap.n < contrast.planned:
        failed = f", {contrast.failed} by a failed cell" if contrast.failed else ""
        notes.append(f"{contrast.planned - gap.n} of {contrast.planned} pairs missing{failed}")
    least = found.smallest_p * family
    if gap.n and verdict == "inconclusive" and least >= SIGNIFICANT:
        notes.append(_too_few(gap.n, found.smallest_p, family))
    elif verdict == "inconclusive" and p < SIGNIFICANT:
        notes.append("significant, but the interval reaches across the margin")
    if verdict == "refuted" and gap.low > 0:
        notes.append("better, but by less than the margin")
    if gap.n > 1 and not gap.method.startswith("BCa"):
        notes.append(f"interval by {gap.method}")
    smallest = detectable(found.sd, gap.n, SIGNIFICANT / family)
    return Verdict(verdict, found, p, smallest if gap.n else math.nan, "; ".join(notes))


def _too_few(n: int, least: float, family: int) -> str:
    """Why no difference, however large, can be significant here."""
    if n < 2:
        return "too few seeds: one pair cannot be tested"
    need = next(m for m in range(n, 200) if attainable_level(m, SIGNIFICANT / family) > 0)
    times = f" x {family} comparisons" if family > 1 else ""
    return (
        f"too few seeds: p cannot go below {least:.3g}{times}"
        f"{f' = {min(1.0, least * family):.3g}' if family > 1 else ''} with {n} pairs; {need} are the least that can"
    )
