"""Metrics of a cell's history against histories made by hand, and what a study may claim of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from records import MANIFEST, RESULTS
from test_hypotheses import CLAIM, DATA, TINY, study

from bench.errors import UserError
from bench.evaluate.targets import Reading, Target, read_metric, target_of
from bench.store.manifest import CellRow, HypothesisRow, Measure
from bench.store.records import HistoryEntry, Record
from bench.study.contrasts import pairs_of, verdicts_of
from bench.study.hypotheses import Hypothesis, resolve
from bench.study.load import study_from
from bench.study.plan import make_plan
from reports.units import metric_name

NAN = math.nan


def history(*accuracies: float, bits: tuple[float, ...] = ()) -> list[HistoryEntry]:
    """A validation after 100, 200, 400, 800, ... tokens, of seven FLOPs each."""
    tokens = [100 * 2**place for place in range(len(accuracies))]
    bits = bits or tuple(8 - accuracy for accuracy in accuracies)
    common = {"seconds": 0.1, "lr": 1e-3, "train_loss": 1.0, "valid_loss": 2.0}
    return [
        HistoryEntry(step=n, tokens=n, flops=7.0 * n, valid_accuracy=accuracy, valid_bits_per_byte=bit, **common)
        for n, accuracy, bit in zip(tokens, accuracies, bits, strict=True)
    ]


def read(metric: str, of: str, seen: list[HistoryEntry]) -> Reading:
    """A metric of this history."""
    record = next(record for record in RESULTS.values() if record.status == "done").but(history=seen)
    higher = of == "accuracy"
    given = {"task": "p_hop", "higher_is_better": metric == "area" and higher, "of": of, "of_higher_is_better": higher}
    return read_metric(record, Measure(metric=metric, **given))


@pytest.mark.parametrize(
    ("accuracies", "tokens", "censored"),
    [
        ((0.2, 0.5, 0.9, 0.95), 400, False),  # exactly there counts
        ((0.95, 0.2, 0.3, 0.3), 100, False),  # the first time counts, at the first validation
        ((0.2, 0.3, 0.8, 0.91), 800, False),
        ((0.2, 0.3, 0.8, 0.89), 800, True),
        ((0.2,), 100, True),
        ((NAN, 0.3, 0.95, NAN), 400, False),
        ((NAN, NAN), 200, True),
    ],
)
def test_the_cost_is_that_of_the_first_validation_there(
    accuracies: tuple[float, ...], tokens: int, censored: bool
) -> None:
    seen = history(*accuracies)
    whole = seen[-1].tokens
    assert read("tokens_to@0.9", "accuracy", seen) == (tokens, censored, whole)
    assert read("flops_to@0.9", "accuracy", seen) == (7 * tokens, censored, 7 * whole)


def test_lower_may_be_what_is_to_be_reached() -> None:
    seen = history(0.0, 0.0, 0.0, bits=(4.0, 2.0, 1.0))
    assert read("tokens_to@2.0", "bits_per_byte", seen) == (200, False, 400)
    assert read("tokens_to@5.0", "bits_per_byte", seen) == (100, False, 400)
    assert read("tokens_to@0.5", "bits_per_byte", seen) == (400, True, 400)


def test_the_area_is_a_mean_over_tokens() -> None:
    # 100 tokens between 0.2 and 0.4, then 200 between 0.4 and 1.0
    assert read("area", "accuracy", history(0.2, 0.4, 1.0)).value == pytest.approx((100 * 0.3 + 200 * 0.7) / 300)
    assert read("area", "accuracy", history(0.6, 0.6, 0.6, 0.6)).value == pytest.approx(0.6)
    assert read("area", "bits_per_byte", history(0.2, 0.4)).value == pytest.approx(7.7)
    assert math.isnan(read("area", "accuracy", history(0.2, NAN, 1.0)).value)
    assert math.isnan(read("area", "accuracy", history(0.2)).value)


@pytest.mark.parametrize(
    ("metric", "target", "name"),
    [
        ("flops_to@0.9", Target("flops", 0.9), "training FLOPs to 0.9"),
        ("tokens_to@1e-1", Target("tokens", 0.1), "training tokens to 0.1"),
        ("accuracy", None, "accuracy"),
        ("accuracy@64", None, "accuracy@64"),
        ("area", None, "area under the learning curve"),
    ],
)
def test_names(metric: str, target: Target | None, name: str) -> None:
    assert target_of(metric) == target and metric_name(metric) == name


@pytest.mark.parametrize("metric", ["flops_to", "flops_to@", "tokens_to@much", "flops_to@nan", "flops_to@inf"])
def test_a_target_without_a_number_is_one_clear_line(metric: str) -> None:
    with pytest.raises(UserError, match=rf"hypothesis 'gated better': metric '{metric}' needs the score to reach"):
        resolve(study({**CLAIM, "metric": metric}).hypotheses[0], {"p_hop": DATA["p_hop"]})


def of_task(claim: dict[str, Any], task: str) -> Hypothesis:
    return study(claim).hypotheses[0].model_copy(update={"task": task})


@pytest.mark.parametrize(
    ("task", "metric", "most"), [("p_hop", "accuracy", 1), ("p_hop", "area", 1), ("kjv", "bits_per_byte", 8)]
)
def test_margins_and_bounds_are_differences_that_there_can_be(task: str, metric: str, most: int) -> None:
    """Two per cent of accuracy are 0.02; of costs differences have no end."""
    for field in ("margin", "within"):
        claim = of_task({**CLAIM, "metric": metric, field: float(most)}, task)
        with pytest.raises(UserError, match=rf"{field} = {most} must be below {most}, in "):
            resolve(claim, {task: DATA[task]})
        cost = of_task({**CLAIM, "metric": "flops_to@0.5", field: 9.0}, task)
        assert getattr(resolve(cost, {task: DATA[task]}), field) == 9.0


def resolved(metric: str, task: str = "all", margin: float = 0.0, both: bool = True) -> list[Measure]:
    claim = study({**CLAIM, "metric": metric}).hypotheses[0].model_copy(update={"task": task, "margin": margin})
    return resolve(claim, DATA if both else {"p_hop": DATA["p_hop"]}).measures


def test_what_the_manifest_holds() -> None:
    common = {"task": "p_hop", "of": "accuracy", "of_higher_is_better": True}
    (cost,), (area,) = resolved("flops_to@0.9", "p_hop"), resolved("area", "p_hop")
    assert cost.dump() == {**common, "metric": "flops_to@0.9", "higher_is_better": False}
    assert area.dump() == {**common, "metric": "area", "higher_is_better": True}
    assert [measure.higher_is_better for measure in resolved("area")] == [True, False]
    (score,) = resolved("accuracy", "p_hop")
    assert score.dump() == {"task": "p_hop", "metric": "accuracy", "higher_is_better": True}


@pytest.mark.parametrize(
    ("metric", "fields", "message"),
    [
        ("flops_to@0.9", {}, r"needs one metric to reach, not accuracy and bits_per_byte"),
        ("area", {"margin": 0.1}, r"margin = 0\.1 needs one metric, not accuracy and bits_per_byte"),
        ("flops_to@90", {"task": "p_hop"}, r"accuracy to reach must be above 0 and at most 1, not 90"),
        ("flop_to@0.9", {"task": "p_hop"}, r"unknown metric of p_hop: 'flop_to@0\.9'; did you mean 'flops_to@X'"),
    ],
)
def test_claims_that_cannot_be_judged_are_one_clear_line(metric: str, fields: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        resolved(metric, **fields)  # type: ignore[arg-type]
    assert "\n" not in str(error.value) and str(error.value).startswith("hypothesis 'gated better': ")


def test_costs_over_tasks_of_one_metric_may_have_a_margin() -> None:
    two = {"p_hop": DATA["p_hop"], "longer": replace(DATA["p_hop"], length=9)}
    claim = study({**CLAIM, "metric": "tokens_to@0.9", "margin": 100.0}).hypotheses[0]
    assert [measure.of for measure in resolve(claim, two).measures] == ["accuracy", "accuracy"]


def test_a_record_is_read_by_its_measure() -> None:
    record = RESULTS[MANIFEST.cells[0].id]
    assert isinstance(record, Record)
    record = record.but(history=history(0.2, 0.4, 1.0))
    of = {"task": "p_hop", "higher_is_better": False, "of": "accuracy", "of_higher_is_better": True}
    assert read_metric(record, Measure(metric="flops_to@0.4", **of)) == Reading(1400.0, False, 2800.0)
    assert read_metric(record, Measure(metric="tokens_to@0.3", **of)) == Reading(200.0, False, 400.0)
    assert read_metric(record.but(history=history(0.2, 0.4)), Measure(metric="tokens_to@0.5", **of)) == (200, True, 200)
    assert read_metric(record, Measure(metric="area", **of)) == Reading(pytest.approx(17 / 30))
    plain = Measure(task="p_hop", metric="accuracy", higher_is_better=True)
    assert read_metric(record, plain) == Reading(record.test("accuracy"))
    with pytest.raises(KeyError):
        read_metric(record, plain.but(metric="bits_per_byte"))


def test_a_cost_that_runs_have_not_reached_is_not_the_same() -> None:
    """Over all tasks: one on which the runs were stopped is no evidence that the variants are the same on both."""
    common = {"metric": "tokens_to@0.9", "higher_is_better": False, "of": "accuracy", "of_higher_is_better": True}
    measures = [Measure(task=task, **common) for task in ("p_hop", "kjv")]
    named = {"claim": "c", "better": "ztt", "than": "htc", "kind": "same", "margin": 0.0, "within": 0.5}
    known = next(record for record in RESULTS.values() if record.status == "done")
    places = [(name, task, seed) for name in ("ztt", "htc") for task in ("p_hop", "kjv") for seed in range(8)]
    cells = [CellRow(variant=name, task=task, seed=n, id=f"{name}{task}{n}") for name, task, n in places]
    manifest = MANIFEST.but(cells=cells, decide=None)
    yes, late, no = (0.2, 0.95, 0.96), (0.2, 0.3, 0.95), (0.2, 0.3, 0.4)
    for ztt, htc, stopped, verdict in (
        (yes, yes, (0, 0), "supported"),
        (no, no, (8, 8), "inconclusive"),
        (late, no, (8, 0), "inconclusive"),  # it costs the other run at least as much: the difference seen is 0
        (no, late, (0, 8), "inconclusive"),
        (yes, no, (8, 0), "refuted"),
    ):
        for tasks in (("p_hop",), ("p_hop", "kjv")):
            seen = {
                cell.id: known.but(
                    history=history(*(yes if cell.task == "kjv" else ztt if cell.variant == "ztt" else htc))
                )
                for cell in cells
            }
            entry = HypothesisRow(**named, task=tasks[0], metric="m", measures=measures[: len(tasks)])
            contrast = pairs_of(manifest, seen, entry).contrast
            counts = pairs_of(manifest, seen, entry).counts
            assert counts(3).runs == 3 * len(tasks) and counts().runs == 8 * len(tasks)
            assert counts().missed == (8 * (ztt == no), 8 * (htc == no))
            assert contrast.most is not None and contrast.least is not None
            assert (np.isinf(contrast.most).sum(), np.isinf(contrast.least).sum()) == stopped
            expected = "inconclusive" if verdict == "refuted" and len(tasks) == 2 else verdict
            assert verdicts_of(manifest, [contrast])[0].verdict == expected, (ztt, htc, tasks)


def test_costs_that_differ_beyond_the_smaller_training_are_not_the_same() -> None:
    """One variant costs twice as much a step, and both reach the score at their end: what both had shows nothing."""
    of = {"higher_is_better": False, "of": "accuracy", "of_higher_is_better": True}
    measure = Measure(task="p_hop", metric="flops_to@0.9", **of)
    known = next(record for record in RESULTS.values() if record.status == "done")
    cells = [CellRow(variant=name, task="p_hop", seed=n, id=f"{name}{n}") for name in ("ztt", "htc") for n in range(12)]
    manifest = MANIFEST.but(cells=cells, decide=None)
    cheap = history(0.2, 0.3, 0.95)
    dear = [entry.but(flops=2 * entry.flops) for entry in cheap]
    seen = {cell.id: known.but(history=dear if cell.variant == "htc" else cheap) for cell in cells}
    for better, than, sign in (("ztt", "htc", 1), ("htc", "ztt", -1)):
        for kind in ("better", "same"):
            common = {"task": "p_hop", "metric": "m", "measures": [measure], "margin": 0.0, "within": 0.2}
            pairs = pairs_of(manifest, seen, HypothesisRow(claim="c", better=better, than=than, kind=kind, **common))
            assert pairs.counts().missed == (0, 0) and pairs.counts().cut == pairs.counts().runs == 12
            ends = pairs.contrast.least, pairs.contrast.differences, pairs.contrast.most
            assert [float(end[0]) for end in ends if end is not None] == pytest.approx(
                sorted([0, 0, sign * math.log(2)])
            )
            (verdict,) = verdicts_of(manifest, [pairs.contrast])
            assert verdict.verdict == "inconclusive" and verdict.p_equivalent == 1.0
            assert "may differ by more than is seen" in verdict.note


@pytest.mark.parametrize("score", ["-1", "0", "1e300", "8.1"])
def test_bits_that_no_model_is_asked_to_reach(score: str) -> None:
    with pytest.raises(UserError, match=r"bits_per_byte to reach must be above 0 and at most 8, not "):
        resolved(f"flops_to@{score}", "kjv")


def test_bounds_that_a_study_declares_are_those_of_a_metric_it_asks_for() -> None:
    """The nearest name counts: the metric itself, its kind, and the metric in whose unit it is."""

    def bound(within: dict[str, float], *metrics: str) -> list[float | None]:
        raw = {
            "name": "s",
            "question": "why",
            "tasks": [{"name": "p_hop", "options": TINY}],
            "decide": {"within": within},
        }
        claims = [{**CLAIM, "claim": metric, "metric": metric, "task": "p_hop"} for metric in metrics]
        made = make_plan(
            study_from({**raw, "variants": ["htc", {"name": "ztt", "label": "gated"}], "hypotheses": claims}, (), "s"),
            "",
            None,
        )
        return [row.within for row in made.manifest.hypotheses]

    asked = ("exits@confidence", "exits@kl", "area", "flops_to@0.5", "accuracy")
    assert bound({"accuracy": 0.1}, *asked) == [0.1, 0.1, 0.1, None, 0.1]
    assert bound({"accuracy": 0.1, "exits": 0.2, "area": 0.3, "flops_to": 0.4}, *asked) == [0.2, 0.2, 0.3, 0.4, 0.1]
    assert bound({"exits@confidence.mean": 0.2, "exits": 0.3, "flops_to@0.5": 0.4}, *asked) == [
        0.2,
        0.3,
        None,
        0.4,
        None,
    ]
    for within in ({"loss": 0.1}, {"area": 0.1}, {"exits@entropy": 0.1}, {"flops_to@0.6": 0.1}):
        with pytest.raises(UserError, match=r"decide\.within: unknown metric of a hypothesis that asks .*allowed: acc"):
            bound(within, "accuracy", "exits@kl")
    with pytest.raises(UserError, match=r"decide\.within: 'exits@kl' stands twice, under two names"):
        bound({"exits@kl": 0.1, "exits@kl.mean": 0.2}, "exits@kl")
    with pytest.raises(UserError, match=r"within = 2 must be below 1, in accuracy"):
        bound({"exits@kl": 2.0}, "exits@kl")
    with pytest.raises(UserError, match="unknown exit rule 'confidnce'; did you mean 'confidence'"):
        bound({"exits@confidnce": 0.1}, "exits@confidence")
