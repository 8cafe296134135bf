"""How many seeds a study's comparisons need, from the variance of the paired differences seen so far."""

from __future__ import annotations

import math
from typing import Any

from bench.errors import UserError
from bench.stats import SIGNIFICANT, detectable, paired, sd_interval, seeds_needed
from bench.store.manifest import Manifest
from bench.store.records import Outcome
from reports.table import Row
from reports.verdicts import Claim, contrasts, detectable_text, hypotheses


def power_rows(manifest: Manifest, results: dict[str, Outcome], effect: float | None, power: float) -> list[Row]:
    """A row for each hypothesis, or for each contrast to the reference where the study declares none.

    effect: to be shown, beyond a hypothesis's margin, in the metric's unit; None takes the one seen so far. power: the
    probability of showing it. The level is 0.05 / family, Holm's first step. Raises UserError if there is nothing to
    compare, or no comparison has two pairs of seeds.
    """
    if effect is not None and not (math.isfinite(effect) and effect > 0):
        raise UserError(f"--effect = {effect:g} must be above 0, in the metric's unit")
    if not SIGNIFICANT < power < 1:
        raise UserError(f"--power = {power:g} must be between {SIGNIFICANT:g} and 1")
    declared = hypotheses(manifest, results)
    families = [declared] if declared else list(contrasts(manifest, results).values())
    if not families:
        raise UserError(f"study {manifest.study!r} has neither hypotheses nor a reference: nothing to compare")
    rows = [_row(claim, len(family), effect, power) for family in families for claim in family]
    if all(row["sd"] == "-" for row in rows):
        raise UserError(f"study {manifest.study!r}: no comparison has two pairs of finished seeds yet")
    return rows


def _row(claim: Claim, family: int, effect: float | None, power: float) -> dict[str, str]:
    data, alpha = claim.contrast.differences, SIGNIFICANT / family
    sd, n = sd_interval(data), len(data)
    shown = abs(paired(data).difference.mean - claim.contrast.margin) if effect is None else effect
    row: dict[str, Any] = {"comparison": claim.text, "task": claim.task, "metric": claim.unit}
    row |= {"pairs": f"{n}/{claim.contrast.planned}", "level": f"{alpha:.3g}"}
    if n < 2:
        unknown = ("sd", "sd 95 % interval", "detectable now", "effect", "seeds", "seeds, sd high")
        return row | dict.fromkeys(unknown, "-")
    return row | {
        "sd": f"{sd.mean:.3g}",
        "sd 95 % interval": f"[{sd.low:.3g}, {sd.high:.3g}]",
        "detectable now": detectable_text(detectable(sd.mean, n, alpha, power)),
        "effect": f"{shown:.3g}" if effect is not None else f"{shown:.3g} (seen)",
        "seeds": _seeds(seeds_needed(shown, sd.mean, alpha, power)),
        "seeds, sd high": _seeds(seeds_needed(shown, sd.high, alpha, power)),
    }


def _seeds(n: int | None) -> str:
    return "more than 10,000" if n is None else f"{n:,}"
