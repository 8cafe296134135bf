"""How many seeds a study's comparisons need, from the variance of the paired differences seen so far."""

from __future__ import annotations

import math
from typing import Any

from bench.errors import UserError
from bench.stats import (
    SIGNIFICANT,
    detectable,
    equivalence_power,
    paired,
    sd_interval,
    seeds_for_equivalence,
    seeds_needed,
)
from bench.stats.verdicts import present
from bench.store.manifest import Manifest
from bench.store.records import Outcome
from reports.claims import Claim, contrasts, hypotheses
from reports.table import Row
from reports.verdicts import detectable_text

EQUIVALENT, EQUIVALENT_SEEDS = "power of equivalence now", "seeds for equivalence"


def power_rows(manifest: Manifest, results: dict[str, Outcome], effect: float | None, power: float) -> list[Row]:
    """A row for each hypothesis, or for each contrast to the reference where the study declares none.

    The level is 0.05 / family, the first step of the correction.

    Args:
        manifest: of the study.
        results: records by cell id.
        effect: to be shown, beyond a hypothesis's margin, in the metric's unit; of a claim that two variants are the
            same, their true difference. None takes the one seen so far (0 for a claim of that kind). Where a hypothesis
            is over tasks of different units, an effect has a unit on each of them alone: it then has a row for each.
        power: the probability of showing it.

    Raises:
        UserError: if there is nothing to compare, or no comparison has two pairs of seeds.
    """
    if effect is not None and not (math.isfinite(effect) and effect > 0):
        raise UserError(f"--effect = {effect:g} must be above 0, in the metric's unit")
    if not SIGNIFICANT < power < 1:
        raise UserError(f"--power = {power:g} must be between {SIGNIFICANT:g} and 1")
    declared = hypotheses(manifest, results, apart=effect is not None)
    count = len(manifest.hypotheses)
    families = [(declared, count)] if declared else [(f, len(f)) for f in contrasts(manifest, results).values()]
    if not families:
        raise UserError(f"study {manifest.study!r} has neither hypotheses nor a reference: nothing to compare")
    bounded = any(claim.contrast.within is not None for claim in declared)
    rows = [_row(claim, family, effect, power, bounded) for claims, family in families for claim in claims]
    if all(row["sd"] == "-" for row in rows):
        raise UserError(f"study {manifest.study!r}: no comparison has two pairs of finished seeds yet")
    return rows


def _row(claim: Claim, family: int, effect: float | None, power: float, bounded: bool) -> dict[str, str]:
    """bounded: whether any comparison of the study has bounds, so that there are columns for equivalence."""
    contrast, alpha = claim.contrast, SIGNIFICANT / family
    data = present(contrast)
    sd, n = sd_interval(data), len(data)
    row: dict[str, Any] = {"comparison": claim.text, "task": claim.task, "metric": claim.unit}
    row |= {"pairs": f"{n}/{contrast.planned}", "level": f"{alpha:.3g}"}
    names = ["sd", "sd 95 % interval", "detectable now", "effect", "seeds", "seeds, sd high"]
    names += [EQUIVALENT, EQUIVALENT_SEEDS] if bounded else []
    row |= dict.fromkeys(names, "-")
    if n < 2:
        return row
    row["sd"], high = f"{sd.mean:.3g}", sd.high if sd.kind == "interval" else None
    if high is not None:
        row["sd 95 % interval"] = f"[{sd.low:.3g}, {sd.high:.3g}]"
    if contrast.kind == "better":
        seen = abs(paired(data).difference.mean - contrast.margin)
        shown = seen if effect is None else effect
        row["detectable now"] = detectable_text(detectable(sd.mean, n, alpha, power))
        row["effect"] = f"{shown:.3g}" if effect is not None else f"{shown:.3g} (seen)"
        row["seeds"] = _seeds(seeds_needed(shown, sd.mean, alpha, power))
        if high is not None:
            row["seeds, sd high"] = _seeds(seeds_needed(shown, high, alpha, power))
    if contrast.within is not None:
        true = (effect or 0.0) if contrast.kind == "same" else 0.0
        row[EQUIVALENT] = (
            f"{equivalence_power(true, sd.mean, n, contrast.within, alpha):.2f} (within {contrast.within:g})"
        )
        row[EQUIVALENT_SEEDS] = _seeds(seeds_for_equivalence(true, sd.mean, contrast.within, alpha, power))
        if contrast.kind == "same":
            row["effect"] = f"{true:.3g}"
    return row


def _seeds(n: int | None) -> str:
    return "more than 10,000" if n is None else f"{n:,}"
