"""What the seeds can tell: a study's hypotheses, as a table and in words, and every variant against the reference."""

from __future__ import annotations

import math

import numpy as np

from bench.config import FIRST_PILOT
from bench.stats import Verdict, judge
from bench.store.manifest import Manifest
from bench.store.records import Outcome
from bench.study.contrasts import verdicts_of
from bench.tables import counted
from reports.claims import Claim, compared, contrasts, hypotheses
from reports.policy import ENDS, Rows, digits_of, ends, titled, told, told_seeds, within
from reports.table import Row
from reports.units import plain

READINGS = {"supported": "better", "refuted": "worse", "inconclusive": "no difference shown"}
"""A verdict on a difference that nothing was claimed of, in words."""
UNTESTED = "not tested: seeds were added by what they showed"


def verdicts(manifest: Manifest, results: dict[str, Outcome]) -> Rows:
    """The verdict on each of the study's hypotheses, corrected for all of them."""
    claims = hypotheses(manifest, results)
    rows: list[Row] = []
    found = verdicts_of(manifest, [claim.contrast for claim in claims])
    for claim, one in zip(claims, found, strict=True):
        verdict = "pilot" if manifest.pilot else one.verdict
        row = {"hypothesis": claim.text, "verdict": verdict, "compared": claim.compared}
        row |= {"task": claim.task, "metric": claim.unit, **numbers(claim, one, "gain", 1)}
        rows.append({**row, "note": "; ".join(part for part in (one.note, claim.censored) if part)})
    if all(math.isnan(one.p_equivalent) for one in found):
        rows = [{key: value for key, value in row.items() if key != "p of equivalence"} for row in rows]
    return titled(rows, {ENDS: [one.found.difference for one in found]})


def sentences(manifest: Manifest, results: dict[str, Outcome]) -> list[str]:
    """The verdict on each hypothesis in one plain sentence, and whether they were tested before; none on pilots."""
    if manifest.pilot and manifest.hypotheses:
        return [f"Pilot: seeds from {FIRST_PILOT:,} on are for choosing settings; no verdict is given."]
    claims = hypotheses(manifest, results)
    over = f" over {len(claims)} hypotheses" if len(claims) > 1 else ""
    if manifest.decide is not None:
        over += f"{' and' if over else ' over'} {len(manifest.decide.looks)} looks"
    found = verdicts_of(manifest, [claim.contrast for claim in claims])
    lines = [_sentence(claim, one, over) for claim, one in zip(claims, found, strict=True)]
    if manifest.verdicts_at:
        before = " and ".join(f"over {counted(n, 'seed')}" for n in manifest.verdicts_at)
        lines.append(
            f"Verdicts were given before, {before}: if seeds were added by what those showed, wrong verdicts are up to "
            f"{len(manifest.verdicts_at) + 1} times as likely as is said."
        )
    return lines


def differences(manifest: Manifest, results: dict[str, Outcome]) -> Rows:
    """Every variant against the reference, paired by the seeds that both have, corrected within a task.

    Untested in a study that adds seeds by what they show: a test of all of them would not keep its level.
    """
    rows, shown = [], []
    higher = {name: up for name, _, _, up in compared(manifest)}
    for task, claims in contrasts(manifest, results).items():
        for claim, found in zip(claims, judge([claim.contrast for claim in claims]), strict=True):
            row = {"task": task, "variant": claim.better, "reference": claim.than, "metric": claim.unit}
            row |= numbers(claim, found, "difference", 1 if higher[task] else -1)
            del row["p of equivalence"]
            if manifest.decide is not None:
                row |= dict.fromkeys(("p", "corrected p", "detectable"), "-")
                reading = UNTESTED
            elif found.found.difference.n:
                reading = "; ".join(part for part in (READINGS[found.verdict], found.note) if part)
            else:
                reading = f"no pair of seeds: {'pilot seeds are not compared' if manifest.pilot else found.note}"
            rows.append({**row, "reading": reading})
            shown.append(found.found.difference)
    return titled(rows, {ENDS: shown})


def numbers(claim: Claim, found: Verdict, name: str, sign: int) -> dict[str, str]:
    """The numbers of a row. sign: -1 shows the metric's own direction where lower is better."""
    gap = found.found.difference
    effect, digits = found.found.effect_size, digits_of(gap)
    return {
        name: plain(sign * gap.mean, digits, plus=True) if gap.n else "-",
        ENDS: ends(within(gap, claim.bounds), digits, sign, plus=True),
        "p": f"{found.found.p:.3g}" if gap.n > 1 else "-",
        "corrected p": f"{found.p_corrected:.3g}" if gap.n > 1 else "-",
        "p of equivalence": _known(found.p_equivalent) if gap.n > 1 else "-",
        "pairs": f"{gap.n}/{claim.contrast.planned}",
        "Hedges g": "-" if math.isnan(effect) else f"{sign * effect:+.2f}",
        "detectable": detectable_text(found.detectable),
    }


def _sentence(claim: Claim, found: Verdict, over: str) -> str:
    """over: what the p-values are corrected over."""
    gap = found.found.difference
    start = f"{claim.text}: {found.verdict}"
    if not gap.n:
        return f"{start}: {found.note or 'no pair of seeds is planned'}."
    numbers = f"{told(within(gap, claim.bounds), digits_of(gap), plus=True)} {claim.unit} over {told_seeds([gap.n])}"
    if gap.n > 1:
        numbers += f", {_p_values(claim, found)}"
        numbers += f" after correction{over}" if over else ""
    return f"{start}: {'; '.join(part for part in (numbers, found.note, claim.censored) if part)}."


def _p_values(claim: Claim, found: Verdict) -> str:
    """The p-values that a verdict rests on."""
    differs = f"p = {found.p_corrected:.2g}"
    if claim.contrast.within is None:
        return differs
    equal = f"p = {found.p_equivalent:.2g} that it is within {claim.contrast.within:g}"
    if found.verdict in ("inconclusive", "open"):
        return f"{differs} of a difference, {equal}"
    same = claim.contrast.kind == "same"
    return equal if found.verdict == ("supported" if same else "equivalent") else differs


def _known(p: float) -> str:
    return "-" if math.isnan(p) else f"{p:.3g}"


def detectable_text(value: float) -> str:
    """A smallest detectable effect; "none" where no effect could be significant."""
    if math.isnan(value):
        return "-"
    return "none" if np.isinf(value) else f"{value:.3g}"
