"""Fronts: the same kind of points for every variant, chosen on validation data, shown on test data."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from records import FAILED, MANIFEST, RESULTS, TASKS, of_seeds

from bench.data.task import Metric
from bench.errors import UserError
from bench.evaluate.record import exits_record
from bench.evaluate.trace import Trace
from bench.stats import dominance, hypervolume, median_front
from bench.store.store import Store
from bench.study.load import study_from
from bench.study.plan import make_plan
from reports.figures import accuracy_vs_flops
from reports.fronts import fronts, points_by_seed
from reports.read import read

P_HOP, KJV = TASKS


def test_fronts_by_hand() -> None:
    rows = {(row["task"], row["variant"]): row for row in fronts(MANIFEST, RESULTS)}
    htc = rows["p_hop", "htc"]
    # Exits at 1 and 2 MFLOPs/token with accuracy 0.6 and 0.7 less 0.01 a seed; chance is 0.38, the budget 2.2 M.
    by_seed = [(1.0 * (0.6 - s - 0.38) + 0.2 * (0.7 - s - 0.38)) / 2.2 for s in (0.0, 0.01)]
    assert float(htc["hypervolume"]) == pytest.approx(sum(by_seed) / 2, abs=6e-4)
    assert htc["reference point"] == "2.2 M FLOPs/token, 0.380" and "P(dominates reference)" not in htc
    assert (rows["p_hop", "ztt"]["seeds"], rows["p_hop", "ztt"]["range of 1 to 2 seeds"]) == ("1/2", "-")
    assert htc["range of 1 to 2 seeds"] == f"{min(by_seed):.3f} to {max(by_seed):.3f}"


def test_domination_is_told_from_five_seeds_on() -> None:
    manifest, results = of_seeds(5, lambda variant, task, seed: 0.1 * (variant == "ztt") * (task == "p_hop"))
    rows = {(row["task"], row["variant"]): row for row in fronts(manifest, results)}
    assert rows["p_hop", "ztt"]["P(dominates reference)"] == "1.00 (n = 5)"
    assert rows["kjv", "ztt"]["P(dominates reference)"] == "0.00 (n = 5)", "the same points: nowhere better"
    assert rows["p_hop", "htc"]["P(dominates reference)"] == "-"
    low, high = (float(end) for end in rows["p_hop", "htc"]["95 % interval"].strip("[]").split(", "))
    assert 0 <= low < float(rows["p_hop", "htc"]["hypervolume"]) < high


def noisy(scores: int, seed: int) -> dict[str, Any]:
    """A zero attention that is pure noise: a curve of many points, of which some are good by luck on test data."""
    rng = np.random.default_rng(seed)
    columns = {name: (0.65 + 0.1 * rng.normal(size=scores)).tolist() for name in ("accuracy", "loss", "bits_per_byte")}
    return {"flops_per_token": np.linspace(1e6, 2e6, scores).tolist(), "threshold": [0.5] * scores, **columns}


def test_a_signal_of_noise_changes_no_standing() -> None:
    manifest, results = of_seeds(8, lambda variant, task, seed: 0.01 * np.sin(7 * seed + len(variant + task)))
    before = fronts(manifest, results)
    for number, record in enumerate(results.values()):
        rules = record.exits.rules
        rules["zero_attention"] = rules["confidence"].but(curve=noisy(65, number))
    assert fronts(manifest, results) == before
    # and it would have: the curve's best points on test data dominate the exit points of the same model
    mine = [points_by_seed(manifest, results, "htc", P_HOP)[seed] for seed in range(8)]
    ids = [cell.id for cell in manifest.cells if (cell.variant, cell.task) == ("htc", "p_hop")]
    curves = [results[id].exits.rules["zero_attention"].curve for id in ids]
    added = [np.array([c["flops_per_token"], c["accuracy"]]).T for c in curves]
    more = [np.concatenate([p[:, :2], points]) for p, points in zip(mine, added, strict=True)]
    assert dominance(more, [p[:, :2] for p in mine], True).probability == 1.0


def test_points_are_chosen_on_validation_data_and_count_by_their_test_score() -> None:
    manifest, results = of_seeds(1)
    id = next(cell.id for cell in manifest.cells if (cell.variant, cell.task) == ("htc", "p_hop"))
    first, second = results[id].exits.points
    worse = second.but(accuracy=0.5)  # chosen by its validation score, whatever it gives on test data
    results[id] = results[id].but(exits=results[id].exits.but(points=[first, worse]))
    row = next(row for row in fronts(manifest, results) if (row["task"], row["variant"]) == ("p_hop", "htc"))
    assert float(row["hypervolume"]) == pytest.approx((0.6 - 0.38 + 0.2 * (0.5 - 0.38)) / 2.2, abs=6e-4)
    unsure = worse.but(valid={**worse.valid, "accuracy": 0.1})  # never chosen
    results[id] = results[id].but(exits=results[id].exits.but(points=[first, unsure]))
    row = next(row for row in fronts(manifest, results) if (row["task"], row["variant"]) == ("p_hop", "htc"))
    assert float(row["hypervolume"]) == pytest.approx(1.2 * (0.6 - 0.38) / 2.2, abs=6e-4)


def test_a_front_chosen_by_a_third_column() -> None:
    points = [(1, 0.4, 0.5), (2, 0.9, 0.4), (3, 0.3, 0.6)]  # the second is not chosen, the third lowers the front
    band = median_front([points], True)
    assert band.cost.tolist() == [1, 3] and band.median.tolist() == [0.4, 0.3]
    assert hypervolume(points, (4, 0.0), True) == pytest.approx(2 * 0.4 + 0.3)
    assert hypervolume([(1, 2.0, 2.0), (2, 3.0, 1.5)], (4, 2.5), False) == pytest.approx(0.5)
    assert hypervolume(np.empty((0, 3)), (4, 0.0), True) == 0.0
    assert dominance([points] * 5, [[(1, 0.4), (3, 0.3)]] * 5, True).probability == 0.0
    assert dominance([points] * 5, [[(1, 0.4), (3, 0.2)]] * 5, True).probability == 0.0, "its own front does not fall"


def with_valid(rule: str | None) -> tuple[Any, Any]:
    manifest, results = of_seeds(2)
    return manifest.but(exit_rule=rule), results


def test_a_declared_rule_gives_points_to_all_or_to_none() -> None:
    manifest, results = with_valid("confidence")
    points = points_by_seed(manifest, results, "htc", P_HOP)[0]
    assert points.shape == (4, 3) and points[2].tolist() == [1.2e6, 0.6, 0.6]
    for rule in ("zero_attention", "fixed", None):  # one that htc lacks; exit points; none
        manifest, results = with_valid(rule)
        for variant in ("htc", "ztt"):
            assert points_by_seed(manifest, results, variant, P_HOP)[0].shape == (2, 3), rule


def test_leaving_at_random_is_expected_from_the_exit_points() -> None:
    rng = np.random.default_rng(0)
    traces = []
    for _ in range(2):
        loss, scored = rng.random((50, 3)), rng.integers(1, 4, 50).astype(float)
        signals, cost = {"random": rng.random((50, 3)).astype(np.float32)}, 10 * np.arange(1.0, 4)
        correct, nothing = (loss < 0.5) * scored[:, None], np.array([np.nan])
        traces.append(Trace(loss, correct, scored, nothing, signals, {"random": cost, "fixed": cost}))
    valid, test = traces
    manifest, results = with_valid("random")
    exits = exits_record(valid, test, Metric("accuracy", True, {}))
    for id, record in results.items():
        results[id] = record.but(exits=exits)
    points = points_by_seed(manifest, results, "htc", P_HOP)[0]
    expected = {name: found.at_random() for name, found in (("valid", valid), ("test", test))}
    assert points.shape == (3 + 65, 3)
    assert points[3:, 1] == pytest.approx(expected["test"]["accuracy"])
    assert points[3:, 2] == pytest.approx(expected["valid"]["accuracy"])


@pytest.mark.parametrize("text", [False, True])
def test_validation_scores_of_older_records_are_made_from_their_traces(text: bool, tmp_path: Path) -> None:
    task = KJV if text else P_HOP
    cell = next(c for c in MANIFEST.cells if c.task == task.label and c.id != FAILED)
    rng, store = np.random.default_rng(0), Store(tmp_path)
    loss, scored = rng.random((50, 2)) * 3, rng.integers(1, 4, 50).astype(float)
    trace = Trace(loss, (loss < 1) * 1.0, scored, np.array([np.nan]), bytes_per_token=3.5 if text else None)
    whole = RESULTS[cell.id]
    assert whole.status == "done"
    value = whole.dump()
    del value["valid_metrics"]
    for point in value["exits"]["points"]:
        del point["valid"]
    value["files"] = {"trace_valid.npz": hashlib.sha256(trace.to_bytes()).hexdigest()}
    store.write_result(cell.id, type(whole).model_validate(value))
    manifest = MANIFEST.but(cells=[cell])
    assert fronts(manifest, read(store, manifest)) == [], "without a trace there is nothing to choose by"
    (store.folder(cell.id) / "trace_valid.npz").write_bytes(trace.to_bytes())
    record = read(store, manifest)[cell.id]
    assert record.status == "done" and record.exits is not None
    assert [point.valid for point in record.exits.points] == [pytest.approx(trace.leaving(n)) for n in (1, 2)]
    assert record.valid_metrics == pytest.approx({f"valid_{k}": v for k, v in trace.leaving(2).items()})
    assert fronts(manifest, {cell.id: record})[0]["seeds"] == "1/1"


def test_one_exit_point_is_the_full_depth() -> None:
    manifest, results = of_seeds(1)
    for id, record in results.items():
        results[id] = record.but(exits=None)
    points = points_by_seed(manifest, results, "htc", P_HOP)[0]
    assert points.tolist() == [[2e6, 0.7, 0.7]]
    bare = {id: record.but(valid_metrics={}) for id, record in results.items()}
    assert points_by_seed(manifest, bare, "htc", P_HOP) == {} and fronts(manifest, bare) == []
    assert accuracy_vs_flops(manifest, bare, P_HOP) is not None


def test_the_study_declares_its_exit_rule() -> None:
    raw = {"name": "s", "question": "?", "tasks": [{"name": "p_hop", "options": {"hops": 1, "length": 16}}]}
    raw |= {"variants": ["htc"], "seeds": 1}
    small = ["model.d_model=16", "model.n_heads=2"]
    assert make_plan(study_from({**raw, "exit_rule": "kl"}, small, "s"), "c", None).manifest.exit_rule == "kl"
    with pytest.raises(
        UserError, match=r"exit_rule: .*unknown exit rule 'confidense'; did you mean 'confidence'"
    ) as error:
        study_from({**raw, "exit_rule": "confidense"}, [], "s")
    assert str(error.value).startswith("s.exit_rule") and "\n" not in str(error.value)
