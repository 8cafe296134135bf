"""Tasks of lm-evaluation-harness in a study: scored for every seed, in tables, in verdicts, and never twice."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import own_task, quick  # noqa: F401 - a fixture
from test_hypotheses import TINY, study
from typer.testing import CliRunner

from bench.api import Results, load_results, run
from bench.cli import app
from bench.downstream.study import Scoring
from bench.errors import UserError
from bench.run.going import run_cell
from bench.run.upgrade import open_store
from bench.store.manifest import Manifest
from bench.store.records import HarnessScores
from bench.store.store import Store
from bench.study.contrasts import contrast_of
from bench.study.load import load_study, study_from
from bench.study.plan import Plan, make_plan
from bench.study.schema import Study
from reports.table import harness

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

OURS = "cyclebench_p_hop[hops=[1],length=16,n_test=16,n_train=64,n_valid=16]"
PICK = "pick[limit=6]"
METRICS = ("acc", "acc_norm")


def pick(folder: Path, right: int) -> Path:
    """A task of one's own: which of two numbers follows. The same answer is right in all documents."""
    documents = [{"ask": f"{n % 3} {n % 4}", "right": right} for n in range(9)]
    about = {"output_type": "multiple_choice", "doc_to_choice": ["0", "1"], "doc_to_target": "{{right}}"}
    return own_task(folder, "pick", documents, METRICS, **about)


def written(folder: Path, own: Path) -> Path:
    raw = {
        "name": "tiny",
        "question": "Does it hold elsewhere?",
        "reference": "htc",
        "variants": ["htc", "ztt"],
        "tasks": [{"name": "p_hop", "options": TINY}],
        "seeds": 2,
        "model": {"d_model": 16, "n_heads": 2, "n_blocks": 3, "n_cycles": 2},
        "train": {"steps": 2, "batch_size": 4},
        "harness": [
            {"name": "p_hop", "options": TINY},
            {"name": "pick", "include": str(own), "limit": 6, "metric": "acc_norm"},
        ],
        "hypotheses": [
            {"claim": "better at ours", "better": "ztt", "than": "htc", "task": OURS},
            {"claim": "better at theirs", "better": "ztt", "than": "htc", "task": PICK},
            {"claim": "better by acc", "better": "ztt", "than": "htc", "task": PICK, "metric": "acc"},
        ],
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, no_runs: Path) -> tuple[Path, str]:
    """A finished study and what was told of it. Its cells are trained before, since workers take seconds to start."""
    folder = tmp_path_factory.mktemp("harness")
    path = written(folder, pick(folder / "own", 0))
    store = open_store(folder / "runs", begin=True)
    for planned in make_plan(load_study(str(path)), "", None).cells:
        run_cell(planned.cell, store)
    shutil.copy(no_runs, folder / "mlflow.db")
    told = list[str]()
    results = run(str(path), runs=folder / "runs", tracking_uri=f"sqlite:///{folder}/mlflow.db", tell=told.append)
    assert not results.failed and not results.unscored
    return folder, "\n".join(told)


def results_of(folder: Path) -> Results:
    return load_results(str(folder / "tiny.yaml"), folder / "runs")


def test_scores_are_kept_beside_every_seeds_results(done: tuple[Path, str]) -> None:
    folder, told = done
    frame = results_of(folder).frame()
    assert len(frame) == 4
    assert frame[f"test_acc@{OURS}"].tolist() == pytest.approx(frame["test_accuracy"].tolist(), abs=1e-9)
    assert frame[f"test_acc_norm@{PICK}"].between(0, 1).all()
    for _, row in frame.iterrows():
        line = f"harness: {row.variant} p_hop seed {row.seed}, {PICK}: acc {row[f'test_acc@{PICK}']:.4g}"
        assert line in told
    record = results_of(folder).records[frame["id"][0]]
    assert record.harness[PICK].samples == 6 and record.harness[OURS].of == record.cell.fingerprint
    assert record.harness[PICK].errors["acc"] >= 0 and record.harness[PICK].flops_per_token > 0


def test_tables_and_verdicts_are_of_paired_seeds(done: tuple[Path, str]) -> None:
    folder, _ = done
    results = results_of(folder)
    frame, (ours, theirs, acc) = results.frame(), results.manifest.hypotheses
    rows = frame.set_index(["variant", "seed"])
    by = {OURS: rows[f"test_acc@{OURS}"], PICK: rows[f"test_acc_norm@{PICK}"]}
    for entry, key in ((ours, OURS), (theirs, PICK)):
        gaps = contrast_of(results.manifest, results.records, entry).differences
        assert gaps.tolist() == pytest.approx([by[key]["ztt", seed] - by[key]["htc", seed] for seed in (0, 1)])
    assert acc.measures[0].metric == f"acc@{PICK}"
    verdicts = results.verdicts()
    assert verdicts["task"].tolist() == [OURS, PICK, PICK] and set(verdicts["pairs"]) == {"2/2"}
    text = (folder / "runs/reports/tiny/report.md").read_text()
    assert "## Tasks of lm-evaluation-harness" in text
    mean = by[PICK]["htc"].mean()
    assert f"| {PICK} | p_hop | htc | acc norm | {mean:.3f} |" in text
    assert f"| {PICK} | ztt | htc | acc norm@{PICK} |" in text, "compared with the reference"


def score(folder: Path, *harness: dict[str, Any]) -> tuple[list[str], dict[str, str], Manifest]:
    """What is told, what fails, and the manifest, where the finished study's models are asked this."""
    raw = yaml.safe_load((folder / "tiny.yaml").read_text()) | {"harness": list(harness), "hypotheses": []}
    study, told = Study.model_validate(raw), list[str]()
    plan = make_plan(study, "", None)
    failed = Scoring(study).score(Store(folder / "runs"), plan.cells, told.append)
    return told, failed, plan.manifest


def test_nothing_is_scored_twice_but_what_has_changed(done: tuple[Path, str]) -> None:
    folder, _ = done
    store, asked = Store(folder / "runs"), yaml.safe_load((folder / "tiny.yaml").read_text())["harness"]
    ids = [cell.id for cell in results_of(folder).manifest.cells]
    before = {id: store.harness(id) for id in ids}
    told, failed, manifest = score(folder, *asked)
    assert (told, failed) == ([], {}) and [cell.id for cell in manifest.cells] == ids
    pick(folder / "own", 1)  # the other answer is right now
    told, failed, _ = score(folder, *asked)
    assert sum("the task has changed since it was scored: scored again" in line for line in told) == 4 and not failed
    for id in ids:
        after = store.harness(id)
        assert after[OURS] == before[id][OURS]
        assert after[PICK].scores["acc"] == pytest.approx(1 - before[id][PICK].scores["acc"])
    told, _, _ = score(folder, {**asked[1], "limit": 3})
    assert len(told) == 4 and {*store.harness(ids[0])} == {OURS, PICK, "pick[limit=3]"}


def test_a_model_that_cannot_be_scored_stops_nobody_else(done: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = done
    store, asked = Store(folder / "runs"), {"name": "pick", "include": str(folder / "own"), "limit": 2}
    ids = [cell.id for cell in results_of(folder).manifest.cells]
    cell, kept = store.folder(ids[0]), tmp_path / "kept"
    shutil.copytree(cell, kept)
    with (cell / "model" / "model.safetensors").open("r+b") as weights:
        weights.truncate(100)
    told, failed, manifest = score(folder, asked)
    assert [*failed] == ["htc p_hop seed 0, pick[limit=2]"] and len(told) == 3
    assert ["pick[limit=2]" in store.harness(id) for id in ids] == [False, True, True, True]
    assert [row["seeds"] for row in harness(manifest, results_of(folder).records)] == ["1/2", "2/2"]
    shutil.rmtree(cell)  # with what was damaged, and put aside
    shutil.copytree(kept, cell)
    told, failed, _ = score(folder, asked)
    assert len(told) == 1 and not failed
    _, failed, _ = score(folder, {**asked, "metric": "f1"})
    assert set(failed.values()) == {"harness: 'pick' has no metric 'f1' (it has: acc, acc_norm)"}


def test_a_run_says_what_could_not_be_scored(done: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = done
    results = results_of(folder)
    results.unscored = {"htc p_hop seed 0, pick": "no memory"}
    monkeypatch.setattr("bench.api.run", lambda *_, **__: results)
    found = CliRunner().invoke(app, ["run", str(folder / "tiny.yaml")])
    assert found.exit_code == 1 and "not scored: htc p_hop seed 0, pick: no memory" in found.output


def plan(*harness: Any, **hypothesis: Any) -> Plan:
    raw = study().model_dump(mode="json") | {"harness": list(harness)}
    raw["hypotheses"] = [{"claim": "c", "better": "gated", "than": "htc", **hypothesis}] if hypothesis else []
    return make_plan(Study.model_validate(raw), "", None)


def test_what_is_planned() -> None:
    plain = plan()
    assert plain.manifest.harness == [] and "harness" not in plain.manifest.dump()
    asked = "wikitext", {"name": "arc_easy", "fewshot": 5}, {"name": "kjv", "metric": "bits_per_byte"}
    found = plan(*asked, task="wikitext", metric="word_perplexity")
    assert [cell.id for cell in found.manifest.cells] == [cell.id for cell in plain.manifest.cells]
    assert [(row.key, row.score, row.higher_is_better) for row in found.manifest.harness] == [
        ("wikitext", "acc@wikitext", True),
        ("arc_easy[fewshot=5]", "acc@arc_easy[fewshot=5]", True),
        ("cyclebench_kjv", "bits_per_byte@cyclebench_kjv", False),
    ]
    (measure,) = found.manifest.hypotheses[0].measures
    assert (measure.task, measure.metric, measure.higher_is_better) == ("p_hop", "word_perplexity@wikitext", False)


@pytest.mark.parametrize(
    ("harness", "message"),
    [
        ({"name": "arc_easy", "metric": "accuracy"}, "unknown metric in harness.0: 'accuracy'"),
        ({"name": "arc_easy", "on": "kjv"}, "unknown task in harness.0.on: 'kjv' (allowed: p_hop)"),
        ({"name": "arc_easy", "options": {"length": 3}}, "harness.0.options: 'arc_easy' is no task of this suite"),
        ({"name": "p_hop", "options": {"hop": 3}}, "did you mean 'hops'"),
    ],
)
def test_mistakes_are_told_before_anything_runs(harness: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        plan(harness)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_same_task_twice_and_tasks_that_nobody_knows(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"harness.1: 'arc_easy' stands twice"):
        plan("arc_easy", {"name": "arc_easy", "metric": "acc_norm"})
    raw = study().model_dump(mode="json") | {"harness": ["arc_easy"]}
    with pytest.raises(UserError, match="tasks: the label 'arc_easy' is that of a task of harness"):
        study_from({**raw, "tasks": [{**task, "label": "arc_easy"} for task in raw["tasks"][:1]]}, (), "s")
    claim = {"claim": "c", "better": "gated", "than": "htc", "task": "arc_esy"}
    with pytest.raises(UserError, match="unknown label in task: 'arc_esy'; did you mean 'arc_easy'"):
        study_from({**raw, "hypotheses": [claim]}, (), "s")
    with pytest.raises(UserError, match="include: 'nowhere' is not a folder"):
        Scoring(Study.model_validate({**raw, "harness": [{"name": "pick", "include": "nowhere"}]}))
    with pytest.raises(UserError, match=r"did you mean 'limit'"):
        study_from({**raw, "harness": [{"name": "pick", "limt": 3}]}, (), "s")


def test_a_score_that_is_not_there_yet_is_a_missing_pair() -> None:
    from records import MANIFEST, RESULTS

    entry = plan("arc_easy", task="arc_easy").manifest.hypotheses[0]
    manifest = MANIFEST.but(hypotheses=[])
    entry = entry.but(better="ztt", than="htc", measures=[entry.measures[0].but(task=MANIFEST.tasks[0].label)])
    assert all(map(math.isnan, contrast_of(manifest, RESULTS, entry).differences))
    scores = HarnessScores(of="", scores={"acc": 0.25}, flops_per_token=1.0, version="0")
    done = {id: r.but(harness={"arc_easy": scores}) if r.status == "done" else r for id, r in RESULTS.items()}
    found = contrast_of(manifest, done, entry).differences
    assert any(value == 0 for value in found)
