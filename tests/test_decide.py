"""Deciding studies: seeds are added look by look, to the variants that an open hypothesis needs, and to no others."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from records import FAILED, MANIFEST, RESULTS

from bench.errors import UserError
from bench.run.deciding import decide
from bench.run.seeds import after_verdicts, with_earlier
from bench.run.standing import scores, stand, still_open
from bench.run.status import planned_flops
from bench.stats import Contrast, Looks, replay
from bench.store.manifest import CellRow, HypothesisRow, Manifest, Measure
from bench.store.store import Store
from bench.study.contrasts import contrast_of, verdicts_of
from bench.study.load import study_from
from bench.study.plan import Plan, Planned, make_plan
from reports.power import power_rows
from reports.verdicts import sentences

OPTIONS = {"hops": 1, "n_train": 50, "n_valid": 10, "n_test": 20}
RAW: dict[str, Any] = {
    "name": "deciding",
    "question": "Is it so?",
    "reference": "htc",
    "model": {"d_model": 16, "n_heads": 2, "n_blocks": 3, "n_cycles": 2},
    "train": {"steps": 6, "batch_size": 4, "eval_sequences": 8},
    "tasks": [
        {"name": "p_hop", "label": task, "options": {**OPTIONS, "length": length}}
        for task, length in (("one", 12), ("two", 13))
    ],
    "variants": ["htc", "ztt", {"name": "bc"}, {"name": "vanilla", "match": "depth"}],
    "hypotheses": [
        {"claim": "clear", "better": "ztt", "than": "htc", "task": "one"},
        {"claim": "equal", "better": "bc", "than": "htc", "task": "one"},
    ],
    "decide": {"looks": [8, 12, 20], "within": {"accuracy": 0.012}},
}
EFFECTS = {"ztt": 0.1, "htc": 0.0, "bc": 0.0, "vanilla": 0.0}
Score = Callable[[Planned], float]


def plan(**changes: Any) -> Plan:
    return make_plan(study_from(json.loads(json.dumps({**RAW, **changes})), [], "deciding"), "command", None)


def planted(planned: Planned) -> float:
    """An accuracy: the variant's effect and noise with an sd of 0.007 of its own."""
    seed = 27, sum(map(ord, planned.variant + planned.task)), planned.cell.seed
    return 0.5 + EFFECTS[planned.variant] + 0.007 * float(np.random.default_rng(seed).normal())


class KilledError(Exception):
    pass


class Fake:
    """Stands in for ``run_study``: stores records with planted scores.

    fails: places (variant, task, seed) whose cells fail; lost: those that leave nothing the first time; lives: cells
    until it is killed.
    """

    def __init__(self, root: Path, score: Score = planted) -> None:
        self.store, self.score, self.runs = Store(root), score, list[Plan]()
        self.fails, self.lost = set[tuple[str, str, int]](), set[tuple[str, str, int]]()
        self.lives, self.made, self.lines = -1, Counter[str](), list[str]()

    def __call__(self, plan: Plan) -> None:
        self.runs.append(plan)
        self.store.write_manifest(plan.study.name, plan.manifest)
        for planned in plan.cells:
            id, key = planned.cell.id, (planned.variant, planned.task, planned.cell.seed)
            if self.store.done(id):
                continue
            if self.lives == 0:
                raise KilledError
            self.lives -= 1
            self.made[id] += 1
            if key in self.lost:
                self.lost.remove(key)
            elif key in self.fails:
                self.store.write_failure(id, RESULTS[FAILED].but(id=id))
            else:
                record = RESULTS[MANIFEST.cells[0].id]
                self.store.write_result(id, record.but(id=id, metrics={"test_accuracy": self.score(planned)}))

    def decide(self, plan: Plan) -> Manifest:
        self.lines.clear()
        return decide(plan, self, self.store, self.lines.append).manifest


def seeds(manifest: Manifest) -> dict[tuple[str, str], int]:
    """How many seeds the variants have, on each task; from 0 on."""
    counts = Counter((cell.variant, cell.task) for cell in manifest.cells)
    for (variant, task), n in counts.items():
        assert {cell.seed for cell in manifest.cells if (cell.variant, cell.task) == (variant, task)} == set(range(n))
    return dict(counts)


def told(manifest: Manifest) -> list[tuple[str, str, int, bool]]:
    return [(row.claim, row.verdict, row.pairs, row.open) for row in manifest.decisions]


@pytest.fixture(scope="module")
def made() -> Plan:
    return plan()


def test_only_variants_and_tasks_that_an_open_hypothesis_needs_get_further_seeds(made: Plan, tmp_path: Path) -> None:
    fake = Fake(tmp_path)
    manifest = fake.decide(made)
    assert told(manifest) == [("clear", "supported", 8, False), ("equal", "equivalent", 12, False)]
    first = {(variant.label, task.label): 8 for variant in manifest.variants for task in manifest.tasks}
    assert seeds(manifest) == {**first, ("htc", "one"): 12, ("bc", "one"): 12}
    assert [len(run.cells) for run in fake.runs] == [64, 8, 0] and set(fake.made.values()) == {1}
    assert {planned.variant for planned in fake.runs[1].cells} == {"htc", "bc"}
    assert manifest == fake.store.manifest("deciding") and manifest.seeds == list(range(12))
    assert fake.lines == [
        "look at 8 pairs: 2 of 2 hypotheses open; 64 cells of bc, htc, vanilla, ztt",
        "look at 12 pairs: 1 of 2 hypotheses open; 8 cells of bc, htc",
    ]


@pytest.mark.parametrize("effect", [0.0, 0.004, 0.008, -0.01])
@pytest.mark.long
def test_decisions_made_look_by_look_are_those_of_all_data(made: Plan, tmp_path: Path, effect: float) -> None:
    """Whatever seeds there are beyond a look, the study ends with the verdicts that all of them would have given."""
    bare = plan(decide={"looks": [8, 12, 20]}) if effect == -0.01 else made
    fake = Fake(tmp_path, lambda planned: planted(planned) + effect * (planned.variant in ("bc", "ztt")))
    manifest = fake.decide(bare)
    everything = Fake(tmp_path / "all", fake.score)
    everything(bare)
    ids = [planned.cell.id for planned in bare.cells]
    whole = stand(bare.manifest, scores(everything.store, bare.manifest, ids)).decisions
    assert told(manifest) == [
        (entry.claim, found.verdict.verdict, found.pairs, found.open)
        for entry, found in zip(bare.manifest.hypotheses, whole, strict=True)
    ]
    again = everything.decide(bare)
    assert again == manifest, "cells that are there already, of later looks, change nothing"


@pytest.mark.long
def test_killed_at_any_cell_and_run_again_it_comes_to_the_same(made: Plan, tmp_path: Path) -> None:
    whole = Fake(tmp_path / "whole")
    expected = whole.decide(made)
    chance, kills, fake = random.Random(0), 0, Fake(tmp_path / "killed")
    while True:
        fake.lives = chance.choice([0, 1, 5, 13, 8])
        try:
            manifest = fake.decide(made)
            break
        except KilledError:
            kills += 1
            stored = fake.store.manifest("deciding")
            assert stored is not None
            assert stand(stored, scores(fake.store, stored, [c.id for c in stored.cells])).decisions
    assert kills > 5 and manifest == expected == fake.store.manifest("deciding")
    assert fake.made == whole.made, "no cell was run twice, none in vain"
    assert fake.decide(made) == expected and len(fake.runs[-1].cells) == 0


def test_a_failed_cell_holds_up_its_own_hypothesis_alone(made: Plan, tmp_path: Path) -> None:
    fake = Fake(tmp_path)
    fake.fails = {("ztt", "one", 3)}
    manifest = fake.decide(made)
    assert told(manifest) == [("clear", "open", 0, True), ("equal", "equivalent", 12, False)]
    (line,) = [line for line in fake.lines if line.startswith("clear")]
    assert "open at 0 pairs, 1 cell missing for its look at 8 pairs" in line
    assert "ztt one seed 3 has failed: loss is nan" in line and "--retry failed" in line
    assert set(fake.made.values()) == {1}, "once a call"
    fake.fails.clear()
    manifest = fake.decide(made)
    assert told(manifest)[0] == ("clear", "supported", 8, False)
    assert Counter(fake.made.values()) == {1: 71, 2: 1}


def test_a_cell_without_a_record_is_tried_once_more(made: Plan, tmp_path: Path) -> None:
    fake = Fake(tmp_path)
    fake.lost = {("ztt", "one", 3)}
    assert told(fake.decide(made))[0] == ("clear", "supported", 8, False)
    assert [len(run.cells) for run in fake.runs] == [64, 1, 8, 0]


@pytest.mark.long
def test_the_budget_ends_it_and_open_hypotheses_say_what_they_need(made: Plan, tmp_path: Path) -> None:
    for limit, of_flops in ((65, False), (71.99, True), (72, True), (72, False)):
        budget: dict[str, Any] = {"max_cells": limit}
        if of_flops:
            flops = planned_flops(made.cells)
            first = [planned for planned in made.cells if planned.cell.seed < 8]
            total = sum(flops[planned.variant, planned.task] for planned in first)
            each = flops["htc", "one"] + flops["bc", "one"]
            budget = {"max_flops": total + 4 * each * (1 if limit == 72 else 0.999)}
        limited = plan(decide={**RAW["decide"], **budget})
        fake = Fake(tmp_path / f"{limit} {of_flops}")
        manifest = fake.decide(limited)
        if limit == 72:
            assert told(manifest)[1] == ("equal", "equivalent", 12, False)
            continue
        assert told(manifest) == [("clear", "supported", 8, False), ("equal", "open", 8, True)]
        assert len(manifest.cells) == 64
        (line,) = [line for line in fake.lines if line.startswith("equal")]
        assert line.startswith("equal: open at 8 pairs, 8 cells missing for its look at 12 pairs, about ")
        assert f"the budget is spent (decide.{'max_flops' if of_flops else 'max_cells'} = " in line
        results = scores(fake.store, manifest, [cell.id for cell in manifest.cells])
        (opened,) = still_open(manifest, results, stand(manifest, results), planned_flops(made.cells))
        assert len(opened.cells) == 8 and {key[0] for key in opened.cells} == {"htc", "bc"} and opened.stop in line


def test_nothing_is_run_where_the_first_look_is_beyond_the_budget(tmp_path: Path) -> None:
    fake = Fake(tmp_path)
    manifest = fake.decide(plan(decide={**RAW["decide"], "max_cells": 15}))
    assert manifest.cells == [] and not fake.made and [row.open for row in manifest.decisions] == [True, True]
    assert len(fake.lines) == 2 and all("16 cells missing" in line and "max_cells = 15" in line for line in fake.lines)


def test_a_variant_that_starts_from_anothers_cells_takes_those_along(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "variants": ["vanilla", "htc", "bc", {"name": "ztt", "init": "cell:htc", "model": {"n_cycles": 2}}],
        "hypotheses": [{"claim": "late", "better": "ztt", "than": "bc", "task": "one"}],
        "decide": {"looks": [8, 12]},
    }
    manifest = Fake(tmp_path, lambda planned: 0.5).decide(plan(**changes))
    found = seeds(manifest)
    assert found["ztt", "one"] == found["bc", "one"] == found["htc", "one"] == 12 and found["vanilla", "one"] == 8


def test_a_design_changed_after_a_look_is_told_for_good(made: Plan, tmp_path: Path) -> None:
    fake = Fake(tmp_path)
    assert not fake.decide(made).decide.changed and not fake.decide(made).decide.changed  # type: ignore[union-attr]
    later = plan(decide={**RAW["decide"], "looks": [8, 12, 20, 40]})
    for again in (later, later, made):
        assert fake.decide(again).decide.changed  # type: ignore[union-attr]
        assert fake.lines[0].startswith("decide: looks, alpha or hypotheses were others")
    budget = plan(decide={**RAW["decide"], "max_cells": 70})
    other = Fake(tmp_path / "other")
    other.decide(budget)
    assert not other.decide(made).decide.changed, "a budget decides nothing"  # type: ignore[union-attr]


def test_pilot_seeds_enter_no_verdict(made: Plan) -> None:
    with pytest.raises(UserError, match=r"seeds = \[7, 10000\] cannot be chosen beside decide.*for a pilot seeds from"):
        plan(seeds=[7, 10000])
    with pytest.raises(UserError, match=r"seeds = \[7, 10000, 10001\] must be all below 10,000, or all pilots"):
        plan(decide=None, seeds=[7, 10000, 10001])
    pilot = plan(decide=None, seeds=[10000, 10001])
    assert pilot.manifest.pilot and not plan(decide=None, seeds=[7]).manifest.pilot
    record = RESULTS[MANIFEST.cells[0].id]
    results = {
        p.cell.id: record.but(id=p.cell.id, metrics={"test_accuracy": 0.1 * (p.variant == "ztt")}) for p in pilot.cells
    }
    contrast = contrast_of(pilot.manifest, results, pilot.manifest.hypotheses[0])
    assert contrast.differences.tolist() == [] and contrast.planned == 0
    assert verdicts_of(pilot.manifest, [contrast])[0].verdict == "inconclusive"


def test_a_deciding_study_on_pilots_runs_them_all_and_tells_what_to_expect() -> None:
    pilot = plan(seeds=list(range(10000, 10006)))
    assert pilot.manifest.pilot and pilot.manifest.decide is None and not pilot.study.decides and len(pilot.cells) == 48
    record = RESULTS[MANIFEST.cells[0].id]
    results = {p.cell.id: record.but(id=p.cell.id, metrics={"test_accuracy": planted(p)}) for p in pilot.cells}
    assert sentences(pilot.manifest, results)[0].startswith("Pilot: ")
    clear, equal = power_rows(pilot.manifest, results, None)
    assert clear["pairs so far"] == "6" and clear["P(supported)"] == "1.00" and clear["pairs expected"] == "8 of 20"
    assert float(equal["P(equivalent)"]) > 0.5 and equal["P(supported)"] in ("0.00", "0.01", "0.02")
    (less,) = {row["P(supported)"] for row in power_rows(pilot.manifest, results, 0.004)[:1]}
    assert 0.0 < float(less) < 1.0
    assert not any(map(len, (contrast_of(pilot.manifest, results, e).differences for e in pilot.manifest.hypotheses)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 4}, r"seeds = \[0, 1, 2, 3\] cannot be chosen beside decide"),
        ({"hypotheses": []}, "decide needs hypotheses"),
        ({"decide": 3}, r"decide: .*\(got 3\)"),
        ({"decide": {"look": [8]}}, "unknown key in deciding: 'look'; did you mean 'looks'"),
        ({"decide": {"looks": [8, 8]}}, r"decide: looks \(8, 8\) must be numbers of pairs that rise"),
        ({"decide": {"looks": []}}, r"decide: looks \(\) must be"),
        ({"decide": {"looks": [0, 8]}}, r"decide: looks \(0, 8\) must be"),
        ({"decide": {"looks": 8}}, r"decide\.looks: .*\(got 8\)"),
        ({"decide": {"looks": [8, 10001]}}, "end at 10000 pairs or before: later seeds are pilots"),
        ({"decide": {"looks": [4, 5]}}, "no look can decide one of 2 hypotheses: 5 pairs"),
        ({"decide": {"shares": [0.5]}}, r"decide: shares \(0.5,\) must be one above 0 for each look"),
        ({"decide": {"alpha": 0}}, "decide: alpha = 0 must be between 0 and 1"),
        ({"decide": {"max_cells": 0}}, r"decide\.max_cells: .*\(got 0\)"),
        ({"decide": {"max_flops": -1}}, r"decide\.max_flops: .*\(got -1\)"),
        ({"decide": {"within": {"accuracy": 0}}}, r"decide\.within\.accuracy: .* greater than 0 \(got 0\)"),
        (
            {"decide": {"within": {"acuracy": 0.1}}},
            "decide.within: unknown metric of a hypothesis that asks for it: 'acuracy'; did you mean 'accuracy'",
        ),
        (
            {"decide": {"within": {"accuracy": 0.1}}, "hypotheses": [{**RAW["hypotheses"][0], "margin": 0.1}]},
            r"'clear': margin = 0.1 must be below .*within = 0.1",
        ),
        ({"tune": {"seed": 11}}, "tune.seed = 11 must be none of the seeds"),
    ],
)
def test_what_is_wrong_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        plan(**changes)
    assert "\n" not in str(error.value)


def test_what_is_declared() -> None:
    study = plan().study
    assert study.decide is not None and study.seeds == tuple(range(20))
    assert study.decide.design == Looks((8, 12, 20), (0.4, 0.2, 0.4)), "in proportion to the new pairs"
    overrides = ["decide={}", "decide.within.accuracy=0.02", "decide.alpha=0.01"]
    plain = study_from({**RAW, "decide": None, "seeds": None}, overrides, "deciding")
    assert plain.decide is not None and plain.decide.design == Looks(alpha=0.01)
    assert plain.decide.within == {"accuracy": 0.02} and len(plain.seeds) == 48
    assert study_from(plain.model_dump(mode="json"), [], "stored").model_dump() == plain.model_dump()


def test_tasks_of_different_units_keep_the_scale_of_the_first_look(made: Plan) -> None:
    """What a look has seen of a hypothesis over tasks stays as it is when later seeds come."""
    measures = [Measure(task=task, metric=f"m{task}", higher_is_better=True) for task in ("one", "two")]
    entry = HypothesisRow(claim="c", better="ztt", than="htc", task="all", margin=0.0, measures=measures)
    rng, record = np.random.default_rng(0), RESULTS[MANIFEST.cells[0].id]
    cells, results = [], {}
    for variant in ("ztt", "htc"):
        for task in ("one", "two"):
            for seed in range(20):
                cells.append(CellRow(variant=variant, task=task, seed=seed, id=f"{variant}{task}{seed}"))
                value = float(rng.normal()) * (100 if task == "two" else 1) * (9 if seed > 11 else 1)
                results[cells[-1].id] = record.but(metrics={f"test_m{task}": value})

    def differences(n: int, deciding: bool = True) -> list[float]:
        manifest = made.manifest.but(cells=[cell for cell in cells if cell.seed < n])
        return contrast_of(manifest if deciding else manifest.but(decide=None), results, entry).differences.tolist()

    assert differences(8) == differences(12)[:8] == differences(20)[:8]
    assert differences(8, False) != differences(20, False)[:8]
    scores = {id: next(iter(record.metrics.values())) for id, record in results.items()}
    gaps = [[scores[f"ztt{t}{s}"] - scores[f"htc{t}{s}"] for s in range(8)] for t in ("one", "two")]
    scaled = np.array(gaps)
    assert np.allclose(differences(8), (scaled / np.sqrt((scaled**2).mean(axis=1, keepdims=True))).mean(axis=0))


def test_two_equal_variants_end_as_equivalent_within_24_pairs_at_sd_equal_to_the_bounds() -> None:
    design, times = plan(decide={"within": {"accuracy": 0.02}}).manifest, 200
    assert design.decide is not None and design.hypotheses[0].within == 0.02
    looks = Looks(tuple(design.decide.looks), tuple(design.decide.shares), design.decide.alpha)
    data = np.random.default_rng(11).normal(0, 0.02, (times, 24))
    found = [replay([Contrast(each, within=0.02)], looks)[0].verdict.verdict for each in data]
    assert found.count("equivalent") > 0.9 * times - 3 * np.sqrt(0.09 * times)


@pytest.mark.long
def test_seeds_added_by_hand_tell_of_verdicts_before(tmp_path: Path) -> None:
    """Also where a cell had failed, or a claim was added; not of claims that were not there, or of what was stopped."""

    def planned(count: int, **changes: Any) -> Plan:
        return plan(decide=None, seeds=count, **changes)

    def seen(fake: Fake, made: Plan) -> list[int]:
        return after_verdicts(made, fake.store).manifest.verdicts_at

    fake = Fake(tmp_path / "well")
    assert seen(fake, planned(3)) == []
    fake(planned(3))
    assert seen(fake, planned(3)) == [] and seen(fake, planned(5)) == [3]
    more = [*RAW["hypotheses"], {"claim": "another", "better": "bc", "than": "ztt", "task": "two"}]
    assert seen(fake, planned(5, hypotheses=more)) == [3] and seen(fake, planned(5, hypotheses=more[2:])) == []
    assert seen(fake, planned(3, variants=[*RAW["variants"], {"name": "htc", "label": "another"}])) == [], "no seed"
    fake(after_verdicts(planned(5), fake.store))
    assert seen(fake, planned(5)) == [3] and seen(fake, planned(6)) == [3, 5]
    failed = Fake(tmp_path / "failed")
    failed.fails = {("bc", "one", 1)}
    failed(planned(3))
    assert seen(failed, planned(5)) == [3], "a verdict was given on the others"
    stopped = Fake(tmp_path / "stopped")
    stopped.lost = {("bc", "one", 1)}
    stopped(planned(3))
    assert seen(stopped, planned(5)) == []


def test_pilots_and_others_are_never_in_one_run(tmp_path: Path) -> None:
    """Also where the study's file is changed from the ones to the others, so that both are called the same."""
    pilots, others = plan(decide=None, seeds=[10000, 10001]), plan(decide=None, seeds=[3, 4])
    for first, second in ((pilots, others), (others, pilots)):
        fake = Fake(tmp_path / str(first.manifest.seeds[0]))
        fake(first)
        assert with_earlier(second.study, fake.store).seeds == second.study.seeds
    fake = Fake(tmp_path / "more")
    fake(others)
    assert with_earlier(plan(decide=None, seeds=[5]).study, fake.store).seeds == (3, 4, 5)
