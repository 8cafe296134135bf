"""Tuning: equal trials on validation data at a seed of its own, found again and never run twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import optuna
import pytest
from pydantic import Field
from records import FAILED, MANIFEST, RESULTS

import bench.model.variant
from bench.config import Strict
from bench.errors import UserError
from bench.model.variant import register
from bench.run.ahead import ahead
from bench.run.going import run_cell
from bench.store.records import HistoryEntry, Record
from bench.store.store import Store
from bench.study.load import study_from
from bench.study.plan import Plan, Planned, make_plan
from bench.study.schema import Study
from bench.sweep.storage import default_url as url
from bench.sweep.tune import tuned_plan
from reports.tuning import tuning
from variants.htc import HeadTailCycling

TUNE = {"trials": 3, "lr": [1e-4, 1e-2], "seed": 90}
RAW: dict[str, Any] = {
    "name": "tuned",
    "question": "Is it fair?",
    "reference": "htc",
    "model": {"d_model": 16, "n_heads": 2, "n_blocks": 3, "n_cycles": 2},
    "train": {"steps": 4, "batch_size": 4, "eval_sequences": 8},
    "tasks": [{"name": "p_hop", "options": {"hops": 1, "length": 8, "n_train": 40, "n_valid": 20, "n_test": 20}}],
    "variants": ["htc", {"name": "vanilla", "match": "depth"}],
    "seeds": 2,
    "tune": TUNE,
}


def study(*overrides: str, **changes: Any) -> Study:
    return study_from(json.loads(json.dumps({**RAW, **changes})), overrides, "tuned")


def finished(planned: Planned, *scores: dict[str, float]) -> Record:
    """A record with validations of these scores; the rest is of no interest."""
    entries = [
        HistoryEntry.model_construct(**{f"valid_{name}": value for name, value in each.items()}) for each in scores
    ]
    return RESULTS[MANIFEST.cells[0].id].but(id=planned.cell.id, history=entries)


def values(plan: Plan) -> dict[str, Any]:
    """Records whose validation accuracy falls with the distance of the learning rate from 0.001; test says nothing."""
    found = {}
    for planned in plan.cells:
        lr = planned.cell.train.lr
        found[planned.cell.id] = finished(planned, {"accuracy": 0.99}, {"accuracy": 1 / (1 + abs(lr - 1e-3))})
    return found


def test_every_variant_has_as_many_trials_and_the_best_on_validation_data_is_run(tmp_path: Path) -> None:
    plans: list[Plan] = []

    def run(plan: Plan) -> dict[str, Any]:
        plans.append(plan)
        return values(plan)

    plan = tuned_plan(study(), run, "command", "revision", url(tmp_path))
    rows = plan.manifest.tuning
    assert [(row.variant, row.task, len(row.trials)) for row in rows] == [
        ("htc", "p_hop", 3),
        ("vanilla", "p_hop", 3),
    ]
    for row in rows:
        rates = [trial.params["train.lr"] for trial in row.trials]
        assert len(set(rates)) == 3 and all(1e-4 <= rate <= 1e-2 for rate in rates)
        best = min(rates, key=lambda rate: abs(rate - 1e-3))
        assert row.chosen == {"train.lr": best} and row.metric == "accuracy" and row.seed == 90
        run_with = {p.cell.train.lr for p in plan.cells if p.variant == row.variant}
        assert run_with == {best}, "the seeds are run with what was chosen"
    assert {planned.cell.seed for made in plans for planned in made.cells} == {90}
    assert {planned.cell.seed for planned in plan.cells} == {0, 1}
    assert [len(made.cells) for made in plans] == [2, 4, 6] and plans[-1].manifest.study == "tuned-tuning"
    assert {trial.id for row in rows for trial in row.trials} == {c.id for c in plans[-1].manifest.cells}
    assert [row["trials"] for row in tuning(plan.manifest)] == ["3/3", "3/3"]
    store = Store(tmp_path / "runs")
    before = ahead(study(), store)
    assert (before.trials, before.trial_flops) == (6, 3 * sum(part.flops for part in before.parts))
    store.write_manifest(plan.study.name, plan.manifest)
    planned = ahead(study(), store)
    assert planned.trials == planned.trial_flops == 0
    assert ahead(study("tune.trials=4"), store).trials == 8, "of another tuning"
    matched = next(p.cell.model for p in plan.cells if p.variant == "vanilla")
    assert matched.n_blocks == 4, "matching still holds"


def test_lower_is_better_where_the_metric_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(f"Paragraph {n} of a text." for n in range(200)))

    def run(plan: Plan) -> dict[str, Any]:
        return {p.cell.id: finished(p, {"bits_per_byte": p.cell.train.lr}) for p in plan.cells}

    tasks = [{"name": "text", "options": {"files": [str(tmp_path / "a.txt")], "length": 8}}]
    (row,) = tuned_plan(study(tasks=tasks, variants=["htc"]), run, "", None, url(tmp_path)).manifest.tuning
    assert row.chosen["train.lr"] == min(trial.params["train.lr"] for trial in row.trials)


@pytest.mark.long
def test_an_interrupted_tuning_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    store, ran = Store(tmp_path), 0

    def run(plan: Plan) -> dict[str, Any]:
        nonlocal ran
        for planned in plan.cells:
            if not store.done(planned.cell.id):
                if ran == 3:
                    raise KeyboardInterrupt
                run_cell(planned.cell, store)
                ran += 1
        return store.results(planned.cell.id for planned in plan.cells)

    with pytest.raises(KeyboardInterrupt):
        tuned_plan(study(), run, "", None, url(tmp_path))
    first = in_database(tmp_path)
    assert sum(map(len, first.values())) == 2, "those of a round that was not over are asked for again"
    ran = -10
    whole = tuned_plan(study(), run, "", None, url(tmp_path))
    assert ran == -10 + 3, "six trials, three of them stored before"
    ran = 3
    assert tuned_plan(study(), run, "", None, url(tmp_path)).manifest == whole.manifest
    for row in whole.manifest.tuning:
        rates = [trial.params["train.lr"] for trial in row.trials]
        assert in_database(tmp_path)[row.variant] == rates and first[row.variant] == rates[:1]
    (tmp_path / "optuna.db").unlink()
    assert tuned_plan(study(), run, "", None, url(tmp_path)).manifest == whole.manifest, "the cells tell it again"


def in_database(runs: Path) -> dict[str, list[float]]:
    """The learning rates tried, by variant."""
    studies = optuna.get_all_study_summaries(storage=url(runs))
    found = {study.study_name: optuna.load_study(study_name=study.study_name, storage=url(runs)) for study in studies}
    return {name.split(" / ")[1]: [t.params["train.lr"] for t in kept.trials] for name, kept in found.items()}


def test_failed_trials_are_told_and_a_variant_without_any_is_an_error(tmp_path: Path) -> None:
    def run(plan: Plan) -> dict[str, Any]:
        records = values(plan)
        for planned in plan.cells:
            if planned.variant == "vanilla" or planned is plan.cells[0]:
                records[planned.cell.id] = RESULTS[FAILED].but(id=planned.cell.id, reason="loss is nan")
        return records

    (row,) = tuned_plan(study(variants=["htc"]), run, "", None, url(tmp_path)).manifest.tuning
    assert [trial.value is None for trial in row.trials] == [True, False, False]
    with pytest.raises(UserError, match=r"all 3 trials of variants\.vanilla on p_hop failed, the last: loss is nan"):
        tuned_plan(study(), run, "", None, url(tmp_path))


def test_a_variant_declares_what_else_is_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.model.variant.variants, "_found", dict(bench.model.variant.variants.items()))

    @register("leaky")
    class Leaky(HeadTailCycling):
        """Head-Tail Cycling with a number."""

        tunable: ClassVar = {"rate": (0.1, 0.2)}

        class Options(HeadTailCycling.Options):
            rate: float = Field(0.5, gt=0)

    (row,) = tuned_plan(study(variants=["leaky"], reference=None), values, "", None, url(tmp_path)).manifest.tuning
    assert set(row.chosen) == {"train.lr", "options.rate"} and len(row.trials) == 3
    assert len({trial.params["options.rate"] for trial in row.trials}) == 3
    assert issubclass(Leaky.Options, Strict)


def test_a_claim_of_equality_does_not_stand_in_the_way(tmp_path: Path) -> None:
    """Its bounds are those of the decision, which trials have none of."""
    raw = {key: value for key, value in RAW.items() if key != "seeds"}
    claim = {"claim": "c", "same": ["htc", "ztt"], "task": "p_hop"}
    raw |= {"decide": {"within": {"accuracy": 0.02}}, "hypotheses": [claim], "variants": ["htc", "ztt"]}
    told = study_from(json.loads(json.dumps({**raw, "tune": {**TUNE, "seed": 20_000}})), (), "tuned")
    made = tuned_plan(told, values, "c", "r", url(tmp_path))
    assert made.manifest.hypotheses[0].within == 0.02 and made.manifest.tuning


def test_without_a_tune_block_the_plan_is_the_plain_one() -> None:
    plain = study(tune=None)
    assert tuned_plan(plain, values, "c", "r", "") == make_plan(plain, "c", "r")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tune.trials=0", r"tune\.trials: .*greater than or equal to 1"),
        ("tune.lr=[0.1, 0.01]", r"tune\.lr: must be \[low, high\] with 0 < low < high"),
        ("tune.seed=1", r"tune\.seed = 1 must be none of the seeds that are reported: \[0, 1\]"),
        ("tune.trails=3", r"'tune\.trails'; did you mean 'tune\.trials'"),
    ],
)
def test_bad_tune_blocks_are_one_clear_line(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        study(override)
