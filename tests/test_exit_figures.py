"""What the figures and the table of exit rules say of stored results, and what is stored for them."""

from __future__ import annotations

import base64
import copy
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from records import MANIFEST, ONE_TASK, RESULTS, of_seeds
from scipy.stats import spearmanr

from bench.config import FIRST_PILOT
from bench.data.task import Metric
from bench.evaluate.record import calibration, exits_record, rank
from bench.evaluate.trace import Trace
from bench.store.manifest import BudgetRow, DecideRow, SweepResult, ThresholdRow
from bench.store.records import Example, Record
from reports.drawing import figures
from reports.exit_figures import (
    BOUNDS,
    cycles_at_test,
    exit_area,
    exit_calibration,
    exit_curves,
    exit_depth,
    with_exits,
)
from reports.exit_rules import findings, rule_rows
from reports.page import write_report
from reports.pictures import exit_examples
from reports.sweeps import budget_rows, threshold_rows, write_sweep
from reports.sweeps import findings as sweep_findings
from reports.table import named

P_HOP, KJV = MANIFEST.tasks
DONE = MANIFEST.cells[0].id


def trace(seed: int, n: int = 200) -> Trace:
    """``confidence`` is high where later cycles bring little; ``kl`` leaves below and knows nothing."""
    rng = np.random.default_rng(seed)
    loss = rng.random((n, 3)) * np.array([3.0, 2.0, 1.0])
    gain = loss - loss[:, -1:]
    correct = (loss < 1).astype(float)
    signals = {"confidence": -gain, "confidence.last": correct, "kl": rng.random((n, 3))}
    signals = {key: signal.astype(np.float32) for key, signal in signals.items()}
    names = ("fixed", "random", "confidence", "kl")
    return Trace(loss, correct, np.ones(n), np.array([np.nan]), signals, {k: 10 * np.arange(1.0, 4) for k in names})


def test_pictures_stand_in_the_row_of_the_cycle_they_leave_after() -> None:
    """Grey and coloured ones; what is told wrong has its class in brackets, and other tasks have no such figure."""
    assert exit_examples(MANIFEST, RESULTS, P_HOP) is None
    shapes = {1: [2, 2, 1], 2: [2, 2, 3]}
    given = [
        Example(rule="confidence", cycle=cycle, label=f"$ {cycle}", right=cycle == 1, shape=shape, pixels=pixels)
        for cycle, shape in shapes.items()
        for pixels in [base64.b64encode(bytes(range(shape[0] * shape[1] * shape[2]))).decode()] * cycle
    ]
    results = {
        id: record.but(exits=record.exits.but(examples=given)) if record.status == "done" and record.exits else record
        for id, record in RESULTS.items()
    }
    figure = exit_examples(MANIFEST, results, P_HOP)
    assert figure is not None
    axes, variants = figure.axes[0], len(with_exits(MANIFEST, results, P_HOP))
    assert [text.get_text() for text in axes.texts] == [r"\$ 1", r"(\$ 2)", r"(\$ 2)"] * variants
    assert len(axes.images) == 3 * variants and len(axes.get_yticks()) == 2 * variants
    assert axes.images[1].get_array().shape == (2, 2, 3) and axes.images[0].get_array().tolist() == [[0, 1], [2, 3]]
    tops = [image.get_extent()[3] for image in axes.images]
    assert tops == sorted(tops, reverse=True)


def test_rank_is_positive_where_the_signal_knows_and_null_where_there_is_none() -> None:
    here = trace(0)
    assert rank("confidence", here) == pytest.approx([1.0, 1.0])
    assert np.abs(rank("kl", here)).max() < 0.2
    gain = here.loss[:, 0] - here.loss[:, 2]
    assert rank("kl", here)[0] == pytest.approx(spearmanr(here.signals["kl"][:, 0], gain).statistic)
    here.signals["kl"][:, 1] = 0.5
    assert rank("kl", here)[1] is None


def test_calibration_is_of_tenths_in_order() -> None:
    bins = calibration("confidence.last", trace(0))
    assert len(bins.signal) == 10 and bins.signal == sorted(bins.signal)
    assert bins.accuracy == pytest.approx(bins.signal), "the signal is the accuracy"
    found = exits_record(trace(0), trace(1), Metric("accuracy", True, {})).rules
    assert [key for key, rule in found.items() if rule.calibration is not None] == ["confidence.last"]
    for rule in found.values():
        for point in rule.tuned:
            assert sum(point.share) == pytest.approx(1, abs=1e-5)
            cycles = np.dot(point.share, [1, 2, 3])
            assert cycles == pytest.approx(point.test["mean_cycles"], abs=1e-4)


def labels(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def with_rule(key: str) -> dict[str, Any]:
    """The sample's results with one more rule, which does what its plain form does."""
    found = {}
    for id, record in RESULTS.items():
        if record.status == "done" and record.exits is not None:
            rules = {**record.exits.rules, key: record.exits.rules[key.partition(".")[0]]}
            record = record.but(exits=record.exits.but(rules=rules))
        found[id] = record
    return found


def test_curves_show_every_rule_and_every_bound() -> None:
    figure = exit_curves(MANIFEST, RESULTS, P_HOP)
    assert figure is not None
    assert labels(figure) == ["zero_attention", "confidence", "fixed cycles", "random", "oracle (bound)", "other rules"]
    htc, ztt = figure.axes
    assert (len(htc.lines), len(ztt.lines)) == (4, 5)
    assert htc.get_title() == "htc\n(chosen: confidence)"
    assert ztt.get_title() == "ztt\n(chosen: zero_attention)"
    grey = [line for line in ztt.lines if line.get_linewidth() < 0.7]
    assert len(grey) == 1, "the study declares no rule, so only the best one and the bounds stand out"
    declared = exit_curves(MANIFEST.but(exit_rule="confidence"), RESULTS, P_HOP)
    assert declared is not None and "other rules" not in labels(declared)
    aggregated = exit_curves(MANIFEST.but(exit_rule="confidence.max"), with_rule("confidence.max"), P_HOP)
    assert aggregated is not None and "confidence.max" in labels(aggregated)
    points = htc.lines[1].get_xydata()
    mean = np.mean([r.exits.points[0].accuracy for r in _records("htc", "p_hop")])
    assert points[0] == pytest.approx([1e6, mean]), "the fixed line starts at one cycle, mean over seeds"
    text = exit_curves(MANIFEST, RESULTS, KJV)
    assert text is not None and text.axes[0].yaxis_inverted()


def test_depths_are_those_of_the_tuned_thresholds() -> None:
    figure = exit_depth(MANIFEST, RESULTS, P_HOP)
    assert figure is not None
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert widths == pytest.approx([0.75, 0.25]) and labels(figure) == ["1", "2"]


def test_the_best_rule_is_on_top_where_seeds_are_enough_and_bounds_are_not_judged() -> None:
    for seeds, order in ((5, ["zero_attention", "confidence"]), (2, ["confidence", "zero_attention"])):
        manifest, results = of_seeds(seeds)
        for record in results.values():
            record.exits.rules["confidence"].area += 0.1
        figure = exit_area(manifest, results, P_HOP)
        assert figure is not None
        axes = figure.axes[0]
        assert [label.get_text() for label in axes.get_yticklabels()] == order  # of 2 seeds: in their usual order
        told = " ".join(axes.get_xlabel().split())
        assert ("95 % interval" in told) == (seeds == 5) == (not told.endswith("dots: seeds)"))
        bars = [len(path.vertices) for found in axes.collections for path in found.get_paths()]
        assert seeds == 2 or bars == [2, 2, 2]


def test_cycles_mark_those_trained_with() -> None:
    figure = cycles_at_test(MANIFEST, RESULTS, P_HOP)
    assert figure is not None
    rings = [line for line in figure.axes[0].lines if line.get_markersize() == 9]
    assert [list(ring.get_xdata()) for ring in rings] == [[2], [2]]
    assert "cycles it was trained with" in labels(figure)


def test_the_table_has_every_rule_with_its_range_or_its_interval() -> None:
    rows = rule_rows(MANIFEST, RESULTS)
    found = {(row["task"], row["variant"], row["rule"]): row for row in rows}
    row = found["p_hop", "htc", "confidence"]
    assert row["area against random"] == "0.0150 (0.0100 to 0.0200)" and row["seeds"] == "2"
    assert row["FLOPs used"] == "60.0%" and row["rank correlation"] == "0.3000 (0.3000 to 0.3000)"
    assert found["p_hop", "htc", "oracle"]["rank correlation"] == "-"
    assert ("p_hop", "htc", "zero_attention") not in found
    assert found["p_hop", "ztt", "zero_attention"]["area against random"] == "0.0100", "one seed has no range"
    assert rows.ends == "a to b: the range of 2 seeds, too few to tell more."
    five = rule_rows(*of_seeds(5))
    assert five[0]["area against random"].startswith("0.0000 [-0.0") and "cover at least 90.4%" in five.ends
    for row in five:
        low, high = (
            (float(end) for end in row["rank correlation"][8:-1].split(", "))
            if "[" in row["rank correlation"]
            else (0, 0)
        )
        assert -1 <= low <= high <= 1


def with_zero_attention(seeds: int, gap: float) -> tuple[Any, Any]:
    """Records whose zero attention is worth less than the confidence by gap and a little noise, on both variants."""
    manifest, results = of_seeds(seeds)
    for cell in manifest.cells:
        rules = results[cell.id].exits.rules
        for key in set(rules) - {"confidence", *BOUNDS}:
            del rules[key]
        rules["confidence"].area = 0.3 + 0.01 * cell.seed
        rules["zero_attention"] = rules["confidence"].but(area=0.3 - gap + 0.0099 * cell.seed)
    return manifest, results


@pytest.mark.parametrize(("gap", "word"), [(0.2, "worse"), (-0.2, "better"), (0.0, None)])
def test_what_was_found_is_said_plainly(gap: float, word: str | None) -> None:
    manifest, results = with_zero_attention(8, gap)
    if word is None:
        for cell in manifest.cells:
            results[cell.id].exits.rules["zero_attention"].area = 0.335 + 0.01 * (-1) ** cell.seed
    texts = [line for line in findings(manifest, results) if line.startswith("p_hop, htc")]
    (text,) = texts
    first = "zero_attention" if gap < 0 else "confidence"
    assert f"of 2 rules the one worth most against leaving at random is {first} with 0." in text or word is None
    assert "to confidence, paired by seed; after correction over 2 comparisons it is " in text
    said = f"{word} than 1 of 1 other rules (8 seeds)." if word else "not shown to differ from any of 1 other rules (8"
    assert said in text


def test_rules_are_corrected_over_all_variants_of_a_task() -> None:
    manifest, results = with_zero_attention(6, 0.2)  # the least p of 6 pairs is 1/32: enough alone, not for two
    assert all("not shown to differ from any of 1 other" in line for line in findings(manifest, results))
    alone = manifest.but(variants=manifest.variants[:1])
    assert all("worse than 1 of 1 other rules (6 seeds)" in line for line in findings(alone, results))


def test_seeds_that_were_added_or_are_pilots_test_no_rules() -> None:
    manifest, results = with_zero_attention(8, 0.2)
    looks = DecideRow(looks=[6, 8], shares=[0.5, 0.5], alpha=0.05)
    pilots = manifest.but(seeds=[FIRST_PILOT + seed for seed in manifest.seeds])
    for untested in (manifest.but(decide=looks), pilots):
        (text,) = [line for line in findings(untested, results) if line.startswith("p_hop, htc")]
        assert "the one worth most against leaving at random is confidence" in text and "correction" not in text


def test_few_seeds_rank_no_rules() -> None:
    (text,) = [line for line in findings(*with_zero_attention(2, 0.2)) if line.startswith("p_hop, htc")]
    assert text == (
        "p_hop, htc: 2 rules against leaving at random, over 2 seeds, too few to rank them; "
        "zero attention is worth 0.1049 (0.1000 to 0.1099)."
    )


def test_without_exits_there_is_nothing_to_show() -> None:
    results: dict[str, Any] = copy.deepcopy(RESULTS)
    for record in results.values():
        if record.status == "done":
            record.exits, record.cycles = None, record.cycles[:1]
    for name in ("exit_curves", "exit_area", "exit_signal", "exit_depth", "exit_calibration", "cycles"):
        assert figures.get(name)(MANIFEST, results, P_HOP) is None
    assert exit_calibration(MANIFEST, RESULTS, P_HOP) is not None
    assert rule_rows(MANIFEST, results) == [] == findings(MANIFEST, results)


def test_a_sweep_is_written_as_tables_and_figures(tmp_path: Path) -> None:
    scores = {"accuracy": 0.75, "flops_per_token": 9.0, "mean_cycles": 1.5}
    point: dict[str, Any] = {"max_flops": 10.0, "share_of_full": 0.8, "thresholds": [[0.25, None]], "single": None}
    point |= {"valid": scores, "test": {**scores, "accuracy": 0.7}, "trial": 1, "shares": [0.5], "test_by_seed": [0.7]}
    place = {"study": "s", "variant": "ztt", "task": "p_hop", "metric": "accuracy", "trials": 7, "cells": [DONE]}
    other = {**point, "share_of_full": 0.5, "max_flops": 6.25}
    search = {**place, "rule": "zero_attention", "per_cycle": True, "full_flops_per_token": 12.5, "front": []}
    params = {"model.d_model": 32, "train.lr": 0.00123}
    trial = {"trial": 3, "id": "a" * 64, "params": params, "flops_per_token": 8.0, "train_flops": 1e9}
    trial |= {"valid": 0.8, "test": 0.6}
    found = {**place, "pruned": 2, "failed": 0, "refused": 0, "seed": 0, "cells": ["b" * 64, "a" * 64]}
    result = SweepResult(
        study="sample",
        question="?",
        max_flops=None,
        storage="",
        command="cyclebench sweep sample",
        git=None,
        tasks=MANIFEST.tasks,
        thresholds=[ThresholdRow.model_validate({**search, "tuned": [other, point]})],
        budgets=[BudgetRow.model_validate({**found, "front": [trial], "chosen": trial})],
        environment=[RESULTS[DONE].environment],
    )
    (row,) = threshold_rows(result)
    assert (row["valid"], row["test"], row["thresholds, first seed"]) == ("0.7500", "0.7000", "0.25, never")
    assert len(threshold_rows(result, every_budget=True)) == len(threshold_rows(result.but(max_flops=10.0))) == 2
    (row,) = budget_rows(result)
    assert (row["trial"], row["setting"]) == ("3 (chosen)", "model.d_model=32, train.lr=0.00123")
    assert row["trials"] == "7 (2 pruned, 0 failed)" and (row["valid"], row["test"]) == ("0.8000", "0.6000")
    names = {path.name for path in write_sweep(result, tmp_path)}
    pictures = {f"sweep_{kind}_p_hop.{end}" for kind in ("thresholds", "budgets") for end in ("png", "svg")}
    assert names == {"sweep_thresholds.csv", "sweep_budgets.csv", "sweep.md", *pictures}
    text = (tmp_path / "sweep.md").read_text()
    assert "validation data choose zero_attention of 1 rule; its test accuracy is 0.7000 (" in text
    assert "of 7 trials, one seed each, validation data choose model.d_model=32, train.lr=0.00123; its test acc" in text
    # With a limit each rule has one point, at whatever share of the full depth that is.
    rules = [("confidence", 0.9), ("entropy", 0.7), ("zero_attention", 0.2)]
    at_limit = {rule: {**point, "share_of_full": 0.6, "valid": {**scores, "accuracy": valid}} for rule, valid in rules}
    limited = [ThresholdRow.model_validate({**search, "rule": rule, "tuned": [at_limit[rule]]}) for rule, _ in rules]
    write_sweep(result.but(max_flops=10.0, thresholds=limited), tmp_path / "limited")
    assert "validation data choose confidence of 3 rules;" in (tmp_path / "limited" / "sweep.md").read_text()
    lines = "".join(f"{letter * 64}\n" for letter in "ab")
    trials = f"2 cells (sha256 {sha256(lines.encode()).hexdigest()[:12]})"
    assert f"- budgets, p_hop, ztt: {trials}: `{'a' * 64}`, `{'b' * 64}`\n" in text
    assert f"(sweep_budgets_p_hop.png)\n\nFrom {trials}.\n" in text and "- Ran on a CPU (cpu, 1 threads" in text
    for kind, cells in (("thresholds", named([DONE])), ("budgets", trials)):
        for suffix in ("png", "svg"):
            assert cells.encode() in (tmp_path / f"sweep_{kind}_p_hop.{suffix}").read_bytes()
    write_report(ONE_TASK, {}, tmp_path / "report", sweeps=[result])
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("data:image/png") == 2 and ">Sweep sample</h2>" in page
    assert "3 (chosen)" in page and sweep_findings(result)[0] in page
    result.thresholds[0].tuned[1].single = {**scores, "accuracy": 0.65}
    gives = "gives +0.0500 test accuracy (positive is better) beside one exact threshold"
    assert gives in " ".join(sweep_findings(result))
    one = [row.but(per_cycle=False) for row in result.thresholds]
    assert gives not in " ".join(sweep_findings(result.but(thresholds=one))), "there was none for each exit point"


def _records(variant: str, task: str) -> list[Record]:
    ids = [c.id for c in MANIFEST.cells if (c.variant, c.task) == (variant, task) and c.id in RESULTS]
    return [record for id in ids if (record := RESULTS[id]).status == "done"]
