"""How many seeds a study's comparisons need, from the variance of the paired differences seen so far."""

from __future__ import annotations

import math
from typing import Any

from bench.errors import UserError
from bench.stats import (
    SIGNIFICANT,
    Interval,
    Looks,
    detectable,
    equivalence_power,
    expected,
    paired,
    sd_interval,
    seeds_for_equivalence,
    seeds_needed,
)
from bench.stats.verdicts import equivalence_level, present
from bench.store.manifest import Manifest
from bench.store.records import Outcome
from bench.study.decide import Decide
from reports.claims import Claim, contrasts, hypotheses
from reports.table import Row
from reports.verdicts import detectable_text

ENDINGS = {f"P({name})": name for name in ("supported", "refuted", "equivalent", "inconclusive")}
POWER = 0.8  # where none is asked for
EXPECTED = "pairs expected"  # a column of studies that decide alone
EQUIVALENT, EQUIVALENT_SEEDS = "power of equivalence now", "seeds for equivalence"


def power_rows(
    manifest: Manifest, results: dict[str, Outcome], effect: float | None, power: float | None = None
) -> list[Row]:
    """A row for each hypothesis, or for each contrast to the reference where the study declares none.

    The level is 0.05 / family, the first step of the correction. Of a study that decides, it is told instead how its
    looks may be expected to end. A pilot's seeds are taken: this is what they are for.

    Args:
        manifest: of the study.
        results: records by cell id.
        effect: to be shown, beyond a hypothesis's margin, in the metric's unit; of a claim that two variants are the
            same, their true difference. None takes the one seen so far (0 for a claim of that kind). Where a hypothesis
            is over tasks of different units, an effect has a unit on each of them alone: it then has a row for each.
        power: the probability of showing it, None for 0.8; a study that decides takes none.

    Raises:
        UserError: if there is nothing to compare, or no comparison has two pairs of seeds.
    """
    if effect is not None and not (math.isfinite(effect) and effect > 0):
        raise UserError(f"--effect = {effect:g} must be above 0, in the metric's unit")
    if power is not None and not SIGNIFICANT < power < 1:
        raise UserError(f"--power = {power:g} must be between {SIGNIFICANT:g} and 1")
    pilots, looks = manifest.pilot, _looks(manifest)
    if power is not None and looks is not None:
        raise UserError(f"--power = {power:g} must be left out for a study with decide: how its looks may end is told")
    declared = hypotheses(manifest, results, apart=effect is not None, pilots=pilots)
    count = len(manifest.hypotheses)
    families = [(declared, count)] if declared else [(f, len(f)) for f in contrasts(manifest, results, pilots).values()]
    if not families:
        raise UserError(f"study {manifest.study!r} has neither hypotheses nor a reference: nothing to compare")
    bounded = any(claim.contrast.within is not None for claim in declared)
    rows = [
        _row(claim, family, effect, power or POWER, bounded)
        if looks is None
        else _outlook(claim, family, effect, looks)
        for claims, family in families
        for claim in claims
    ]
    if all(row["sd"] == "-" for row in rows):
        raise UserError(f"study {manifest.study!r}: no comparison has two pairs of finished seeds yet")
    return rows


def _looks(manifest: Manifest) -> Looks | None:
    """The looks that the study declares, also where it was run on pilots and takes none."""
    declared = manifest.config.get("decide")
    return None if declared is None else Decide.model_validate(declared).design


def _outlook(claim: Claim, family: int, effect: float | None, looks: Looks) -> Row:
    """What to expect of a hypothesis of a study that decides, by simulation (``bench.stats.expected``)."""
    contrast = claim.contrast
    data = present(contrast)
    sd, n = sd_interval(data), len(data)
    row: dict[str, Any] = {"comparison": claim.text, "task": claim.task, "metric": claim.unit, "pairs so far": str(n)}
    row |= dict.fromkeys(("sd", "sd 95 % interval", "effect", *ENDINGS, EXPECTED), "-")
    if n < 2:
        return row
    row |= _spread(sd)
    if effect is not None:
        shown, row["effect"] = effect, f"{effect:.3g}"
    elif contrast.kind == "same":
        shown, row["effect"] = 0.0, "0"
    else:
        shown = float(data.mean()) - contrast.margin
        row["effect"] = f"{shown:.3g} (seen)"
    found = expected(contrast, looks, family, contrast.margin + shown, sd.mean)
    row |= {column: f"{getattr(found, name):.2f}" for column, name in ENDINGS.items()}
    return row | {EXPECTED: f"{found.pairs:.0f} of {looks.pairs[-1]}"}


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
    row |= _spread(sd)
    high = sd.high if sd.kind == "interval" else None
    if contrast.kind == "better":
        seen = abs(paired(data).difference.mean - contrast.margin)
        shown = seen if effect is None else effect
        row["detectable now"] = detectable_text(detectable(sd.mean, n, alpha, power))
        row["effect"] = f"{shown:.3g}" if effect is not None else f"{shown:.3g} (seen)"
        row["seeds"] = _seeds(seeds_needed(shown, sd.mean, alpha, power))
        if high is not None:
            row["seeds, sd high"] = _seeds(seeds_needed(shown, high, alpha, power))
    if contrast.within is not None and not contrast.stopped:
        equally = equivalence_level(alpha)
        true = (effect or 0.0) if contrast.kind == "same" else 0.0
        row[EQUIVALENT] = (
            f"{equivalence_power(true, sd.mean, n, contrast.within, equally):.2f} (within {contrast.within:g})"
        )
        row[EQUIVALENT_SEEDS] = _seeds(seeds_for_equivalence(true, sd.mean, contrast.within, equally, power))
        if contrast.kind == "same":
            row["effect"] = f"{true:.3g}"
    return row


def _spread(sd: Interval) -> Row:
    """The columns of a standard deviation of which something is known."""
    ends = {"sd 95 % interval": f"[{sd.low:.3g}, {sd.high:.3g}]"} if sd.kind == "interval" else {}
    return {"sd": f"{sd.mean:.3g}", **ends}


def _seeds(n: int | None) -> str:
    return "more than 10,000" if n is None else f"{n:,}"
