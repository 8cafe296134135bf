"""Figures of others beside ours, at their scale and at ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.errors import UserError, first_line
from bench.stats import Interval, interval
from bench.store.published import STUDY
from bench.tables import counted, markdown
from reports.policy import told as with_ends


@dataclass(frozen=True)
class Reference:
    """What others report.

    Attributes:
        what: it is a figure of.
        source: where it stands.
        theirs: their figures, with the size of their models.
        ours: published study, task and two labels: the mean test accuracy of the first less that of the second.
        reading: what both together say, of our mean differences with their intervals.
    """

    what: str
    source: str
    theirs: str
    ours: tuple[tuple[str, str, str, str], ...] = ()
    reading: Callable[[list[Interval]], str] | None = None


NONE = 0.01  # an accuracy that counts as no difference


def _gap(gaps: list[Interval]) -> str:
    if any(gap.kind != "interval" for gap in gaps):
        return "Too few seeds to say whether it agrees."
    if all(gap.low > NONE for gap in gaps):
        return "It agrees."
    seen, none = sum(gap.low > NONE for gap in gaps), sum(gap.high < NONE for gap in gaps)
    told = f"a gap of more than {NONE:g} is shown on {seen} of {len(gaps)} tasks, and excluded on {none}"
    return f"It {'disagrees' if none else 'is not shown to agree'}: {told}."


REFERENCES = (
    Reference(
        "accuracy of the unshared model less that of the looped one, at equal depth",
        "Ouro's capacity tests at 2 and 4 cycles, arXiv 2510.25741",
        "0.021, 0.039 (170 M parameters); 0.023, 0.037 (340 M); 0.015, 0.026 (680 M); 0.017, 0.025 (1.3 B)",
        (
            ("from_scratch", "p_hop", "vanilla match=flops", "htc"),
            ("vision", "digits", "vanilla match=depth", "htc"),
            ("speech", "vowels", "vanilla match=depth", "htc"),
        ),
        _gap,
    ),
    Reference(
        "accuracy by the number of cycles run, of a model trained with 4",
        "Ouro-1.4B, arXiv 2510.25741",
        "MMLU 41.2, 60.4, 66.7, 67.5, 64.5 and ARC-C 37.6, 54.9, 59.5, 60.9, 58.2 at 1, 2, 3, 4, 8 cycles",
    ),
    Reference(
        "accuracy where exits leave 2.5 cycles in the mean",
        "Ouro-1.4B, arXiv 2510.25741",
        "MMLU 66 by a trained gate, 64 by a standard one; by the change of the state within 1 to 2 points",
    ),
    Reference("post-hoc confidence against learned gates", "arXiv 2607.20519", "often as good"),
    Reference(
        "keys and values of other cycles used while decoding",
        "Ouro-1.4B, arXiv 2510.25741",
        "GSM8K 78.9 with all, 78.9 the last cycle's, 78.7 their average, 18.7 the first one's",
    ),
    Reference(
        "MeSH against plain looping",
        "arXiv 2510.07739",
        "1.06 % more mean accuracy with 33 % fewer parameters (1.4 B)",
    ),
)


def beside_others(folder: Path) -> list[str]:
    """A section of the findings, from the published studies in a folder."""
    rows = [(each.what, f"{each.theirs} ({each.source})", _ours(each, folder)) for each in REFERENCES]
    told = "Their models are hundreds of times as large. Ours are mean differences paired by seed, at full depth."
    return ["## Beside the figures of others", "", told, "", *markdown(("figure", "theirs", "ours"), rows), ""]


def _ours(reference: Reference, folder: Path) -> str:
    import pandas as pd  # start-up

    told, gaps = [], []
    for study, task, first, second in reference.ours:
        if not (folder / study / STUDY).is_file():
            continue
        path = folder / study / "results.csv"
        try:
            frame: Any = pd.read_csv(path)
            mine = frame[(frame["task"] == task) & (frame["status"] == "done")]
            columns = ["seed", "variant", "test_accuracy"]  # the last one is not there where no cell is done
            scores = mine.reindex(columns=columns).pivot(index="seed", columns="variant", values="test_accuracy")
        except (OSError, KeyError, ValueError) as error:
            why = f"column {error} is missing" if isinstance(error, KeyError) else first_line(error)
            raise UserError(f"{path} cannot be read: {why} (allowed: the table of a report)") from None
        gap = (scores[first] - scores[second]).dropna() if {first, second} <= {*scores} else mine["seed"][:0]
        if gap.empty:
            continue
        if scores.loc[gap.index, [first, second]].mean().min() > 1 - NONE:
            told.append(f"{task} no room for a gap, both have more than {1 - NONE:g}")
            continue
        gaps.append(interval(gap))
        told.append(f"{task} {with_ends(gaps[-1], plus=True)} ({counted(len(gap), 'seed')})")
    if not told:
        return "not measured with this version yet" if reference.ours else "no study measures the same"
    return f"{'; '.join(told)}. {reference.reading(gaps) if reference.reading and gaps else ''}".strip()
