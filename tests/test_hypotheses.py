"""Hypotheses of a study: what is accepted, what the manifest holds, what the report and the power command answer."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from records import MANIFEST, RESULTS, of_seeds
from typer.testing import CliRunner

from bench.cli import app
from bench.data.task import Metric, TaskData, make_data
from bench.errors import UserError
from bench.stats import over_tasks, paired
from bench.store.manifest import CellRow, HarnessRow, HypothesisRow, Manifest, Measure
from bench.store.store import Store
from bench.study.contrasts import contrast_of, verdicts_of
from bench.study.hypotheses import Hypothesis, resolve
from bench.study.load import study_from
from bench.study.plan import make_plan
from bench.study.schema import Study
from reports.claims import compared
from reports.page import write_report
from reports.power import power_rows
from reports.verdicts import differences, sentences, verdicts

CLAIM = {"claim": "gated better", "better": "gated", "than": "htc"}
TINY = {"hops": [1], "length": 16, "n_train": 64, "n_valid": 16, "n_test": 16}


def study(*hypotheses: dict[str, Any], overrides: tuple[str, ...] = ()) -> Study:
    raw = {"name": "s", "question": "why", "tasks": [{"name": "p_hop", "options": TINY}], "seeds": 2}
    raw |= {"variants": ["htc", {"name": "ztt", "label": "gated"}], "hypotheses": list(hypotheses)}
    return study_from(raw, overrides, "s")


def data(metric: str, higher: bool, text: bool) -> TaskData:
    arrays = (np.zeros((2, 4), dtype=np.int64), np.zeros((2, 4), dtype=np.int64))
    splits = {name: arrays for name in ("train", "valid", "test")}
    return make_data(splits, 3, Metric(metric, higher, {}), {name: 1.0 for name in splits} if text else None)


DATA = {"p_hop": data("accuracy", True, False), "kjv": data("bits_per_byte", False, True)}


def sample(n: int, gain: float, gap_kjv: float = 0.1, noise: float = 1.0) -> tuple[Manifest, dict[str, Any]]:
    """A stored study of n seeds where ztt gains on p_hop (accuracy) and by gap_kjv on kjv (bits, so it is lower)."""
    rng = np.random.default_rng(0)
    manifest, results = MANIFEST.but(cells=[], seeds=list(range(n))), dict[str, Any]()
    done = {(c.task, c.variant): RESULTS[c.id] for c in MANIFEST.cells if RESULTS.get(c.id)}
    for task, base, gap in (("p_hop", 0.6, gain), ("kjv", 2.5, -gap_kjv)):
        for seed in range(n):
            shared = rng.normal(0, 0.1)
            for variant, shift in (("htc", 0.0), ("ztt", gap)):
                value = base + shared + shift + noise * rng.normal(0, 0.01)
                id = f"{task}{variant}{seed}"
                manifest.cells.append(CellRow(variant=variant, task=task, seed=seed, id=id))
                name = "accuracy" if task == "p_hop" else "bits_per_byte"
                record = next(r for (t, _), r in done.items() if t == task and r.status == "done")
                results[id] = record.but(id=id, metrics={f"test_{name}": value, "test_loss": 2 - value})
    return manifest, results


def declare(manifest: Manifest, **fields: Any) -> Manifest:
    """The manifest with one hypothesis more, checked and resolved as a study's are."""
    raw = {"claim": "ztt better", "better": "ztt", "than": "htc", **fields}
    checked = study_from(
        {"name": "s", "question": "q", "tasks": ["p_hop", "kjv"], "variants": ["htc", "ztt"], "seeds": 1}
        | {"hypotheses": [raw]},
        [],
        "s",
    ).hypotheses[0]
    return manifest.but(hypotheses=[*manifest.hypotheses, resolve(checked, DATA)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"better": "gatde"}, r"hypotheses\.0: unknown label in better: 'gatde'; did you mean 'gated'\? .*gated, htc"),
        ({"than": "hct"}, r"unknown label in than: 'hct'; did you mean 'htc'"),
        ({"task": "phop"}, r"unknown label in task: 'phop'; did you mean 'p_hop'\? .*all, p_hop"),
        ({"than": "gated"}, r"better and than are both 'gated'"),
        ({"margin": -1}, r"hypotheses\.0\.margin: .*greater than or equal to 0.*-1"),
        ({"margin": float("nan")}, r"hypotheses\.0\.margin"),
        ({"beter": "htc"}, r"'beter'; did you mean 'better'"),
        ({"claim": ""}, r"hypotheses\.0\.claim"),
        ({"same": ["gated", "htc"]}, r"same and better do not go together"),
        ({"within": 0}, r"hypotheses\.0\.within"),
    ],
)
def test_wrong_hypotheses_are_one_clear_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        study({**CLAIM, **change})
    assert "\n" not in str(error.value)


def test_missing_fields_and_repeated_claims_are_refused() -> None:
    with pytest.raises(UserError, match=r"hypotheses\.0: .*than is required"):
        study({"claim": "c", "better": "gated"})
    with pytest.raises(UserError, match="'gated better' stands twice"):
        study(CLAIM, CLAIM)


def test_overrides_address_a_hypothesis_by_its_claim() -> None:
    assert study(CLAIM, overrides=("hypotheses.gated better.margin=0.02",)).hypotheses[0].margin == 0.02
    assert study(CLAIM, overrides=("hypotheses=[]",)).hypotheses == ()
    with pytest.raises(UserError, match=r"did you mean 'hypotheses\.gated better'"):
        study(CLAIM, overrides=("hypotheses.gated beter.margin=0.02",))
    with pytest.raises(UserError, match=r"did you mean 'hypotheses\.gated better\.margin'"):
        study(CLAIM, overrides=("hypotheses.gated better.marign=0.02",))


def test_the_manifest_holds_metric_and_direction() -> None:
    manifest = make_plan(study(CLAIM, {**CLAIM, "claim": "by loss", "metric": "loss"}), "cmd", None).manifest
    own, loss = manifest.hypotheses
    assert own.measures == [Measure(task="p_hop", metric="accuracy", higher_is_better=True)]
    assert loss.measures == [Measure(task="p_hop", metric="loss", higher_is_better=False)]
    assert json.loads(json.dumps(manifest.dump()))["hypotheses"][0]["claim"] == "gated better"
    with pytest.raises(UserError, match="unknown metric of p_hop: 'bits_per_byte'"):
        make_plan(study({**CLAIM, "metric": "bits_per_byte"}), "cmd", None)


def test_over_all_tasks_each_has_its_metric_and_a_margin_needs_one_unit() -> None:
    manifest = declare(MANIFEST)
    measures = manifest.hypotheses[0].measures
    assert [(m.task, m.metric, m.higher_is_better) for m in measures] == [
        ("p_hop", "accuracy", True),
        ("kjv", "bits_per_byte", False),
    ]
    longer = {"tests": {"64": DATA["p_hop"].test}}
    further = resolve(
        study({**CLAIM, "metric": "accuracy@64"}).hypotheses[0], {"p_hop": replace(DATA["p_hop"], **longer)}
    )
    assert further.measures == [Measure(task="p_hop", metric="accuracy@64", higher_is_better=True)]
    with pytest.raises(UserError, match=r"margin = 0\.1 needs one metric, not accuracy and bits_per_byte"):
        declare(MANIFEST, margin=0.1)
    assert declare(MANIFEST, margin=0.1, metric="accuracy").hypotheses[0].margin == 0.1


def test_verdicts_from_stored_results() -> None:
    manifest, results = sample(8, 0.1)
    for fields in ({"task": "p_hop"}, {"task": "kjv"}, {}):
        manifest = declare(manifest, **fields, claim=f"c{fields}")
    manifest = declare(manifest, better="htc", than="ztt", task="p_hop", claim="the opposite")
    rows = verdicts(manifest, results)
    assert [row["verdict"] for row in rows] == ["supported", "supported", "supported", "refuted"]
    accuracy = results["p_hopztt0"].metrics["test_accuracy"]
    assert accuracy > 0 and float(rows[0]["gain"]) == pytest.approx(0.1, abs=0.01)
    assert float(rows[1]["gain"]) > 0  # bits per byte fall, and that is a gain
    assert {row["pairs"] for row in rows} == {"8/8"} and float(rows[0]["corrected p"]) == pytest.approx(
        4 / 128, rel=0.01
    )
    assert rows[2]["metric"] == "accuracy and bits per byte (scaled)"

    def gaps(task: str, metric: str, sign: float) -> list[float]:
        pairs = [(results[f"{task}ztt{s}"].metrics, results[f"{task}htc{s}"].metrics) for s in range(8)]
        return [sign * (a[metric] - b[metric]) for a, b in pairs]

    both = over_tasks([gaps("p_hop", "test_accuracy", 1), gaps("kjv", "test_bits_per_byte", -1)], False)
    assert float(rows[2]["gain"]) == pytest.approx(paired(both).difference.mean, abs=5e-4)


def test_a_verdict_is_one_plain_sentence() -> None:
    manifest, results = sample(8, 0.1)
    manifest = declare(declare(manifest, task="p_hop", claim="ztt beats htc on p_hop"), task="kjv", claim="and on kjv")
    first, second = sentences(manifest, results)
    row = verdicts(manifest, results)[0]
    assert first == (
        f"ztt beats htc on p_hop: supported: {row['gain']} {row['95 % interval']} accuracy over 8 seeds, "
        "p = 0.016 after correction over 2 hypotheses."
    )
    assert second.startswith("and on kjv: supported: +0.") and "bits per byte over 8 seeds" in second
    manifest, results = sample(2, 0.1)
    (few,) = sentences(declare(manifest, task="p_hop"), results)
    assert "inconclusive: +0." in few and " to +0." in few and "over 2 seeds, p = 0.5; too few seeds" in few
    manifest, results = sample(8, 0.002)
    (text,) = sentences(declare(manifest, task="p_hop"), results)
    assert "inconclusive" in text and "pairs would decide, if mean and sd stay as they are" in text
    (nothing,) = sentences(declare(manifest, task="p_hop"), {})
    assert nothing == "ztt better: inconclusive: 8 of 8 pairs missing."


def test_verdicts_by_the_cost_of_reaching_a_score_tell_what_did_not_reach_it() -> None:
    manifest, results = sample(8, 0.1)
    for seed in range(8):
        for variant, late in (("htc", 2), ("ztt", 1)):
            record = results[f"p_hop{variant}{seed}"]
            reached = [i >= late and (variant, seed) != ("htc", 0) for i in range(3)]  # one run never reaches it
            history = [e.but(valid_accuracy=0.9 if ok else 0.1) for e, ok in zip(record.history, reached, strict=True)]
            results[f"p_hop{variant}{seed}"] = record.but(history=history)
    manifest = declare(manifest, task="p_hop", metric="tokens_to@0.5", claim="sooner")
    (row,), (text,) = verdicts(manifest, results), sentences(manifest, results)
    # 10 against 20 steps, and against a whole training of 20 for the run that did not reach it: log 2
    assert (row["gain"], row["verdict"], row["metric"]) == (
        "+0.693",
        "supported",
        "log ratio of training tokens to 0.5",
    )
    assert row["note"].endswith("reached by 8 of 8 runs of ztt and 7 of htc") and row["note"] in text
    assert "not reached" not in row["note"]
    manifest = manifest.but(hypotheses=[])
    (area,) = verdicts(declare(manifest, task="p_hop", metric="area"), results)
    assert area["metric"] == "area under the learning curve (accuracy)" and float(area["gain"]) > 0


def test_claims_of_the_same_and_bounds() -> None:
    manifest, results = sample(12, 0.0)
    same = {"better": None, "than": None, "same": ["ztt", "htc"], "task": "p_hop"}
    for fields in ({**same, "claim": "same", "within": 0.05}, {"claim": "better", "task": "p_hop", "within": 0.05}):
        manifest = declare(manifest, **fields)
    rows = verdicts(manifest, results)
    assert [row["verdict"] for row in rows] == ["supported", "equivalent"]
    assert rows[0]["compared"] == "ztt as htc, within 0.05" and float(rows[1]["p of equivalence"]) < 0.01
    assert "that it is within 0.05 after correction over 2 hypotheses" in sentences(manifest, results)[0]
    assert (manifest.hypotheses[0].kind, manifest.hypotheses[0].better) == ("same", "ztt")
    far = declare(sample(12, 0.2)[0], **{**same, "within": 0.05})
    assert verdicts(far, sample(12, 0.2)[1])[0]["verdict"] == "refuted"
    power = power_rows(manifest, results, None, 0.8)
    assert power[0]["seeds"] == "-" and int(power[0]["seeds for equivalence"]) < 12
    assert power[1]["power of equivalence now"] == "1.00 (within 0.05)"


@pytest.mark.parametrize(
    ("fields", "within", "message"),
    [
        ({"same": ["ztt", "htc"], "task": "p_hop"}, None, "same needs within, the difference in accuracy that counts"),
        (
            {"same": ["ztt", "htc"], "within": 0.1},
            None,
            "within = 0.1 needs one metric, not accuracy and bits",
        ),
        ({"better": "ztt", "than": "htc", "task": "p_hop", "margin": 0.1}, 0.05, "must be below within = 0.05"),
    ],
)
def test_bounds_that_do_not_fit_are_refused(fields: dict[str, Any], within: float | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(Hypothesis(claim="c", **fields), DATA, {"accuracy": within} if within else None)


def test_bounds_of_the_study_hold_where_a_hypothesis_has_none() -> None:
    by_metric = {"accuracy": 0.02, "bits_per_byte": 0.01}
    claim = {"claim": "c", "better": "ztt", "than": "htc"}
    assert resolve(Hypothesis(**claim, task="p_hop"), DATA, by_metric).within == 0.02
    assert resolve(Hypothesis(**claim, task="p_hop", within=0.1), DATA, by_metric).within == 0.1
    assert resolve(Hypothesis(**claim), DATA, by_metric).within is None, "two units have no bounds in common"


def test_power_over_different_units_is_told_of_each_task() -> None:
    manifest, results = sample(8, 0.1)
    manifest = declare(manifest)
    (whole,) = power_rows(manifest, results, None, 0.8)
    assert whole["metric"] == "accuracy and bits per byte (scaled)" and "seen" in whole["effect"]
    apart = power_rows(manifest, results, 0.01, 0.8)
    assert [(row["task"], row["metric"]) for row in apart] == [("p_hop", "accuracy"), ("kjv", "bits per byte")]
    assert {row["level"] for row in apart} == {"0.05"} and {row["comparison"] for row in apart} == {
        "ztt better (alone)"
    }


def test_power_of_few_pairs_says_no_more_than_they_do() -> None:
    rows = power_rows(*sample(4, 0.1), 0.01, 0.8)
    assert rows[0]["sd"] != "-" and rows[0]["sd 95 % interval"] == "-" == rows[0]["seeds, sd high"]
    assert power_rows(*sample(5, 0.1), 0.01, 0.8)[0]["sd 95 % interval"].startswith("[0.")


@pytest.mark.long
def test_the_terminal_prints_the_verdicts(tmp_path: Path, no_runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(no_runs, tmp_path)
    manifest, results = sample(8, 0.1)
    store, manifest = Store(tmp_path), declare(manifest.but(study="quick"), task="p_hop")
    store.write_manifest("quick", manifest)
    for id, record in results.items():
        store.write_result(id, record)
    found = CliRunner().invoke(app, ["report", "quick", "--runs", str(tmp_path)])
    assert found.exit_code == 0 and sentences(manifest, results)[0] in found.output


def test_failed_and_missing_cells_are_counted_not_dropped() -> None:
    manifest, results = sample(9, 0.1)
    results["p_hopztt0"] = next(r for r in RESULTS.values() if r.status == "failed")
    del results["kjvhtc1"]
    manifest = declare(declare(manifest, task="p_hop", claim="one"), claim="all")
    one, both = verdicts(manifest, results)
    assert (one["pairs"], both["pairs"]) == ("8/9", "7/9")
    assert "1 of 9 pairs missing, 1 by a failed cell" in one["note"]
    assert "2 of 9 pairs missing, 1 by a failed cell" in both["note"]
    row = {row["task"]: row for row in differences(manifest, results)}["kjv"]
    assert row["pairs"] == "8/9" and "1 of 9 pairs missing" in row["reading"] and row["reading"].startswith("better")
    nothing = verdicts(manifest, {})[0]
    assert (nothing["gain"], nothing["p"], nothing["pairs"], nothing["verdict"]) == ("-", "-", "0/9", "inconclusive")


def test_differences_show_the_metrics_own_direction() -> None:
    manifest, results = sample(8, 0.1)
    row = {row["task"]: row for row in differences(manifest, results)}["kjv"]
    low, high = (float(end) for end in row["95 % interval"].strip("[]").split(", "))
    assert row["reading"] == "better" and float(row["difference"]) == pytest.approx(-0.1, abs=0.02)
    assert low < float(row["difference"]) < high < 0 > float(row["Hedges g"])


@pytest.mark.usefixtures("undrawn")
def test_the_report_answers_each_hypothesis_under_the_question(tmp_path: Path) -> None:
    manifest = declare(MANIFEST, task="p_hop", claim="<ztt> wins")
    write_report(manifest, RESULTS, tmp_path)
    page, text = ((tmp_path / f"report.{kind}").read_text() for kind in ("html", "md"))
    parts = ("Is &lt;this&gt;", "&lt;ztt&gt; wins", 'id="chart-view"', "Verdicts</h2>", "Results</h2>")
    places = [page.index(part) for part in parts]
    assert places == sorted(places), "the answer comes before the chart, and that before the tables"
    assert "| \\<ztt> wins | inconclusive |" in text and "1 of 2 pairs missing, 1 by a failed cell" in text


@pytest.mark.parametrize("effect", [None, 0.004])
def test_power_counts_the_seeds_from_the_variance_seen(effect: float | None) -> None:
    manifest, results = sample(8, 0.1)
    manifest = declare(declare(manifest, task="p_hop", claim="one"), task="kjv", claim="two")
    rows = power_rows(manifest, results, effect, 0.8)
    assert [row["comparison"] for row in rows] == ["one", "two"] and rows[0]["level"] == "0.025"
    assert rows[0]["pairs"] == "8/8" and 0.008 < float(rows[0]["sd"]) < 0.025  # 0.01 x sqrt(2), from 8 pairs
    seeds, high = int(rows[0]["seeds"].replace(",", "")), int(rows[0]["seeds, sd high"].replace(",", ""))
    assert seeds == 7 if effect is None else 50 < seeds < high
    assert ("seen" in rows[0]["effect"]) == (effect is None)


def test_power_without_hypotheses_takes_the_contrasts() -> None:
    rows = power_rows(*sample(3, 0.1), 0.01, 0.9)
    assert [(row["comparison"], row["task"]) for row in rows] == [
        ("ztt against htc", "p_hop"),
        ("ztt against htc", "kjv"),
    ]
    assert rows[0]["detectable now"] == "none" and rows[0]["level"] == "0.05"


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, [], "no comparison has two pairs of finished seeds yet"),
        ({}, ["--effect", "-1"], "--effect = -1 must be above 0"),
        ({}, ["--power", "1"], "--power = 1 must be between 0.05 and 1"),
        ({"reference": None}, [], "neither hypotheses nor a reference"),
        (None, [], "study 'quick' has not been run"),
    ],
)
def test_power_refuses_in_one_line(
    change: dict[str, Any] | None, arguments: list[str], message: str, tmp_path: Path
) -> None:
    if change is not None:
        Store(tmp_path).write_manifest("quick", MANIFEST.but(study="quick", **change))
    found = CliRunner().invoke(app, ["power", "quick", "--runs", str(tmp_path), *arguments])
    assert isinstance(found.exception, UserError) and message in str(found.exception)


def test_power_command_prints_the_table(tmp_path: Path) -> None:
    manifest, results = sample(4, 0.1)
    store = Store(tmp_path)
    store.write_manifest("quick", manifest.but(study="quick"))
    for id, record in results.items():
        store.write_result(id, record)
    found = CliRunner().invoke(app, ["power", "quick", "--runs", str(tmp_path), "--effect", "0.01"])
    assert found.exit_code == 0 and "ztt against htc" in found.output and "4/4" in found.output


@pytest.mark.parametrize(("gain", "margin"), [(0.02, 0.02), (0.1, 0.1), (0.3, 0.3)])
def test_a_gain_of_exactly_the_margin_is_no_more_than_it(gain: float, margin: float) -> None:
    """The scores are rounded, 0.8 - 0.7 is 0.10000000000000009, and that must decide nothing."""
    claim = {"claim": "c", "better": "ztt", "than": "htc", "task": "p_hop", "margin": margin, "metric": "accuracy"}
    row = HypothesisRow(**claim, measures=[Measure(task="p_hop", metric="accuracy", higher_is_better=True)])
    manifest, results = of_seeds(8, lambda variant, task, seed: gain * (variant == "ztt") + 0.013 * seed)
    (found,) = verdicts_of(manifest, [contrast_of(manifest, results, row)])
    assert found.verdict == "inconclusive" and found.p_corrected == 1


def test_one_task_of_the_harness_on_two_tasks_has_two_names() -> None:
    rows = [HarnessRow(key="arc", task=t, metric="acc", higher_is_better=True) for t in ("p_hop", "kjv")]
    assert [name for name, *_ in compared(MANIFEST.but(harness=rows))] == ["p_hop", "kjv", "arc on p_hop", "arc on kjv"]
    assert [name for name, *_ in compared(MANIFEST.but(harness=rows[1:]))][-1] == "arc"
