"""One policy for intervals in every table, figure and sentence: below five seeds ranges and no ranking."""

from __future__ import annotations

import math
import re
from pathlib import Path

import matplotlib.collections
import numpy as np
import pytest
from records import MANIFEST, RESULTS, of_seeds

from bench.cli.screen import show
from bench.stats import Interval, interval
from bench.store.manifest import HypothesisRow, Manifest, Measure
from reports.figures import accuracy_vs_flops
from reports.page import best, write_report
from reports.policy import band, bars, caption, digits_of, ends, heading, titled, told, within
from reports.table import summary_rows

RANKING = r"\b(better|worse|best|worst|highest|lowest|beats|wins|outperforms|worth most|dominates)\b"
SURE = r"95 %|\[[-+]?\d"


def study(seeds: int) -> tuple[Manifest, dict]:
    """A study where ztt is far ahead on p_hop, with a hypothesis about it."""
    rng = np.random.default_rng(seeds)
    manifest, results = of_seeds(seeds, lambda variant, task, seed: 0.1 * (variant == "ztt") + 0.01 * rng.normal())
    measures = [Measure(task="p_hop", metric="accuracy", higher_is_better=True)]
    claim = HypothesisRow(claim="zero tokens pay", better="ztt", than="htc", task="p_hop", margin=0, measures=measures)
    return manifest.but(question="?", hypotheses=[claim]), results


def text_of(seeds: int, out: Path) -> dict[str, str]:
    write_report(*study(seeds), out)
    return {kind: (out / f"report.{kind}").read_text() for kind in ("md", "html", "tex")}


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("seeds", [1, 2, 4])
@pytest.mark.long
def test_a_report_of_few_seeds_ranks_nothing_and_has_no_interval(seeds: int, tmp_path: Path) -> None:
    for kind, text in text_of(seeds, tmp_path).items():
        text = re.sub(r"<script\b.*?</script>|data:image[^\"]*", "", text, flags=re.DOTALL)
        for found in re.finditer(f"{RANKING}|{SURE}", text, re.IGNORECASE):
            raise AssertionError(f"{kind}: ...{text[max(0, found.start() - 80) : found.end() + 40]}")
        assert "zero tokens pay" in text and "inconclusive" in text and f"range of {seeds} seed" in text


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("seeds", [5, 8])
def test_a_report_of_enough_seeds_has_both(seeds: int, tmp_path: Path) -> None:
    text = text_of(seeds, tmp_path)["md"]
    assert re.search(RANKING, text) and re.search(SURE, text) and "The highest mean test accuracy is 0." in text
    assert "P(dominates reference)" in text and "P(better than reference)" in text and "range of" not in text
    assert f"they cover at least {'90.4%' if seeds == 5 else '91.3%'} of the most skewed data" in text
    assert ("zero tokens pay: supported" in text) == (seeds == 8), "the least p of 5 pairs is 1/16"


def test_a_figure_has_bars_and_a_front_from_five_seeds_on() -> None:
    for seeds in (2, 4, 5):
        figure = accuracy_vs_flops(*study(seeds), MANIFEST.tasks[0])
        assert figure is not None
        axes = figure.axes[1]  # beside the panel, where the seeds are
        drawn = [one for one in axes.collections if isinstance(one, matplotlib.collections.LineCollection)]
        assert bool(drawn) == (seeds == 5)
        assert any("median front" in t.get_text() for t in figure.legends[0].get_texts()) == (seeds == 5)


def test_a_bounded_metric_stays_within_its_bounds() -> None:
    manifest, results = of_seeds(5)
    for cell in manifest.cells:  # four seeds that are perfect and one that is not
        value = 0.4 if cell.seed == 4 else 1.0
        results[cell.id] = results[cell.id].but(metrics={"test_accuracy": value, "test_bits_per_byte": 1 - value})
    free = interval([1.0] * 4 + [0.4])
    assert free.high > 1, "without bounds it would leave them"
    for row in summary_rows(manifest, results):
        low, high = (float(end) for end in row["95 % interval"].strip("[]").split(", "))
        assert 0 <= low < high and (high == 1 if row["task"] == "p_hop" else low == 0)
    gap = within(Interval(0.9, 0.5, 1.4, 5, "interval"), (-1.0, 1.0))
    assert (gap.low, gap.high) == (0.5, 1.0) and within(gap, None) == gap


def test_ranks_only_among_those_with_enough_seeds() -> None:
    manifest, results = study(6)
    ids = [cell.id for cell in manifest.cells if (cell.variant, cell.task) == ("ztt", "p_hop")]
    few = {id: record for id, record in results.items() if id not in ids[:4]}
    text = best(manifest, few, manifest.tasks[0])
    assert text.startswith("Mean test accuracy: htc 0.") and "ztt" in text and not re.search(RANKING, text)
    third = manifest.but(
        variants=[*manifest.variants, manifest.variants[0].but(label="other")],
        cells=[*manifest.cells, *(c.but(variant="other") for c in manifest.cells if c.variant == "htc")],
    )
    text = best(third, few, manifest.tasks[0])
    assert text.startswith("The highest mean") and text.endswith("; too few seeds to compare: ztt.")


def test_how_ends_are_told() -> None:
    sure, few = Interval(0.5, 0.25, 0.75, 5, "interval"), Interval(0.5, 0.4, 0.6, 2, "range")
    one, none = Interval(0.5, 0.5, 0.5, 1, "range"), Interval(math.nan, math.nan, math.nan, 0, "none")
    assert [ends(x, 2) for x in (sure, few, one, none)] == ["[0.25, 0.75]", "0.40 to 0.60", "-", "-"]
    assert ends(sure, 2, sign=-1, plus=True) == "[-0.75, -0.25]" and ends(few, 1, plus=True) == "+0.4 to +0.6"
    assert [told(x, 2) for x in (sure, few, one)] == ["0.50 [0.25, 0.75]", "0.50 (0.40 to 0.60)", "0.50"]
    assert told(none) == "-" and told(sure, 1, plus=True).startswith("+0.5 [+0.2")
    assert heading([sure, none]) == "95 % interval" and heading([few]) == "range of 2 seeds"
    assert heading([few, one]) == "range of 1 to 2 seeds" and heading([few, sure]) == "95 % interval or range"
    assert caption([none, one]) == "" and "5 seeds" in caption([sure]) and "2 seeds" in caption([sure, few])


@pytest.mark.parametrize("seeds", [3, 5])
def test_bands_are_ranges_of_few_seeds_and_intervals_of_more(seeds: int) -> None:
    values = np.random.default_rng(0).normal(0.5, 0.1, (seeds, 4))
    low, high = band(values, (0.0, 1.0))
    if seeds < 5:
        assert low == values.min(axis=0).tolist() and high == values.max(axis=0).tolist()
    else:
        assert (low[0], high[0]) == pytest.approx((interval(values[:, 0]).low, interval(values[:, 0]).high))


def test_captions_tell_coverage_where_it_is_low() -> None:
    sixteen = Interval(0.5, 0.4, 0.6, 16, "interval")
    assert "cover" not in caption([sixteen]) and "cover" not in bars([16, 20])
    assert "of 10 seeds they cover at least 91.9%" in bars(
        [10, 20]
    ) and "of 10 seeds they cover at least 91.9%" in caption([sixteen, Interval(0.5, 0.4, 0.6, 10, "interval")])
    assert bars([2]).startswith("2 seeds are too few for an interval: no bars") and bars([]) == "" == bars([0])
    assert bars([3, 16]).startswith("Bars and bands: 95 % intervals over 16 seeds. 3 seeds are too few")


def test_tables_say_what_they_show_in_the_terminal_too(capsys: pytest.CaptureFixture[str]) -> None:
    rows = summary_rows(*study(5))
    show("title", rows, below=rows.ends)
    said = capsys.readouterr().out
    assert "95 % interval" in said and "90.4%" in said
    assert "range of 1 to 2 seeds" in summary_rows(MANIFEST, RESULTS)[0]
    assert titled([], {"": []}) == [] and titled([], {"": []}).ends == ""


@pytest.mark.parametrize(
    ("low", "mean", "high", "text"),
    [
        (0.00002, 0.00006, 0.0001, "+0.00006 [+0.00002, +0.00010]"),
        (-0.0004, 0.0, 0.0004, "0.00000 [-0.00040, +0.00040]"),
        (-0.002, 0.0003, 0.003, "0.000 [-0.002, +0.003]"),
        (0.0, 0.0, 0.0, "0.000 [0.000, 0.000]"),
        (0.0004, 0.0012, 0.003, "+0.0012 [+0.0004, +0.0030]"),
        (-0.003, -0.0012, -0.00002, "-0.00120 [-0.00300, -0.00002]"),
        (1e-12, 0.1, 0.2, "+0.10000000 [0.00000000, +0.20000000]"),
    ],
)
def test_a_small_difference_does_not_look_like_none(low: float, mean: float, high: float, text: str) -> None:
    found = Interval(mean, low, high, 8, "interval")
    assert told(found, digits_of(found), plus=True) == text
