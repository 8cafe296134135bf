"""A study and the same study with ``--set``: side by side, each found again by what it was run with."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from agree import runs_of
from mlflow import MlflowClient

import cyclebench as public
from bench.cli import app
from bench.errors import UserError
from bench.registry import Registry
from bench.run.seeds import of_the_same_cells, with_earlier
from bench.store.manifest import SweepResult
from bench.store.store import Store
from bench.store.tracking import SEARCH, STUDY
from bench.study.load import load_study, study_from
from bench.study.naming import changes_between
from bench.study.plan import make_plan
from bench.study.schema import Study
from reports.drawing import Drawing, figures

RAW: dict[str, Any] = {
    "name": "tiny",
    "question": "Does it run?",
    "reference": "htc",
    "model": {"d_model": 16, "n_heads": 2, "n_blocks": 3, "n_cycles": 2},
    "train": {"steps": 6, "batch_size": 4, "eval_sequences": 8},
    "tasks": [{"name": "p_hop", "options": {"hops": 1, "length": 12, "n_train": 50, "n_valid": 10, "n_test": 20}}],
    "variants": ["htc", {"name": "ztt", "options": {"gating": "none"}}],
    "seeds": 1,
    "hypotheses": [{"claim": "zero tokens help", "better": "ztt", "than": "htc"}],
    "sweep": {"thresholds": {"trials": 5, "rules": ["confidence"]}},
}


def name(*overrides: str, **changes: Any) -> str:
    return study_from(json.loads(json.dumps({**RAW, **changes})), overrides, "tiny").name


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["seeds=5"],
        ["seeds=[3,4]"],
        ["train.steps=6"],
        ["train.lr=0.001"],
        ["variants.ztt.options.gating=none"],
        ["variants=[htc, {name: ztt, options: {gating: none}}]"],
        ["sweep.max_flops=1000.0"],
        ["train.steps=7", "train.steps=6"],
    ],
    ids=str,
)
def test_what_changes_neither_cells_nor_report_keeps_the_name(overrides: list[str]) -> None:
    assert name(*overrides) == "tiny"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.steps=7", "train.steps=7 (as written: 6)"),
        ("train.lr=0.002", "train.lr=0.002 (as written: 0.001)"),
        ("model.family=llama", "model.family=llama (as written: gpt2)"),
        ("question=Why?", "question=Why? (as written: Does it run?)"),
        ("reference=null", "reference=null (as written: htc)"),
        ("variants.ztt.options.gating=scalar", "variants.ztt.options.gating=scalar (as written: none)"),
        ("variants.htc.options.x=1", "variants.htc.options.x=1 (as written: not given)"),
        ("tasks.p_hop.options.hops=[1, 2]", "tasks.p_hop.options.hops=[1, 2] (as written: 1)"),
        ("hypotheses.zero tokens help.margin=0.5", "hypotheses.zero tokens help.margin=0.5 (as written: 0.0)"),
        ("tune={trials: 2}", 'tune={"trials": 2} (as written: null)'),
        ("seeds=[10000]", "seeds=pilots (as written: no pilots)"),
    ],
)
def test_what_is_changed_is_told_and_named(override: str, told: str) -> None:
    study = study_from(json.loads(json.dumps(RAW)), [override], "tiny")
    assert study.changed == [told] == study.sweep_changed
    assert re.fullmatch(r"tiny\+[0-9a-f]{8}", study.name)
    assert study_from(study.model_dump(mode="json"), [], "stored").name == study.name, "as a manifest holds it"


def test_entries_that_come_and_go_are_told() -> None:
    study = study_from(json.loads(json.dumps(RAW)), ["variants=[htc, bc]", "hypotheses=[]"], "tiny")
    assert [change.split("=")[0] for change in study.changed] == [
        "variants.ztt",
        "variants.bc",
        "hypotheses.zero tokens help",
    ]
    assert study.changed[0].startswith("variants.ztt=not given (as written: {")


def test_entries_of_one_name_are_told_apart() -> None:
    """Those of a harness have no labels: the same of its tasks may be asked of the models of two of the study's."""
    rows = [{"name": "arc_easy", "on": "p_hop", "limit": 10}, {"name": "arc_easy", "on": "kjv"}]
    written, now = ({**RAW, "harness": [{**rows[0], "limit": limit}, rows[1]]} for limit in (10, 20))
    changed = changes_between(*(Study.model_validate(json.loads(json.dumps(raw))) for raw in (written, now)))
    assert [change.key for change in changed] == ["harness"]


def test_the_same_change_has_the_same_name_and_another_has_another() -> None:
    seven = name("train.steps=7")
    assert name("train.steps=7", "seeds=3") == name("seeds=[2]", "train.steps=7", "train.lr=0.001") == seven
    assert name("train.steps=7", question="Another?", seeds=4) == seven, "whatever else is written"
    assert name("train.steps=7", "sweep.max_flops=5.0") == seven
    assert name("train.steps=7", "train.lr=0.5") == name("train.lr=0.5", "train.steps=7")
    others = [name("train.steps=8"), name("train.steps=7", "train.lr=0.5"), name("model.d_model=8"), "tiny"]
    assert len({seven, *others}) == 5
    assert seven == "tiny+1985d549", "the names of stored runs are the same in every later version"


def test_a_study_that_is_none_without_overrides_is_named_by_them() -> None:
    without = {key: value for key, value in RAW.items() if key != "variants"}
    given = [study_from(dict(without), ["variants=[htc, ztt]", *more], "tiny") for more in ([], ["seeds=2"])]
    assert given[0].name == given[1].name != "tiny" and given[0].changed == ["variants=[htc, ztt]"]


def test_a_sweep_has_a_name_of_its_own_where_it_is_changed() -> None:
    study = study_from(json.loads(json.dumps(RAW)), ["sweep.max_flops=9.0", "seeds=2"], "tiny")
    assert study.name == "tiny" and study.changed == [] and study.sweep_name.startswith("tiny+")
    assert study.sweep_changed == ["sweep.max_flops=9.0 (as written: null)"]
    plain = study_from(json.loads(json.dumps(RAW)), [], "tiny")
    assert plain.sweep_name == "tiny"
    both = study_from(json.loads(json.dumps(RAW)), ["sweep.max_flops=9.0", "train.steps=7"], "tiny")
    assert both.name == name("train.steps=7") and len({both.sweep_name, both.name, study.sweep_name}) == 3


def test_presets_and_changes_go_together() -> None:
    raw = {**RAW, "presets": {"wide": {"model": {"d_model": 32}}}}
    wide = study_from(json.loads(json.dumps(raw)), ["train.steps=7"], "tiny", "wide")
    assert wide.name.startswith("tiny-wide+") and wide.changed == ["train.steps=7 (as written: 6)"]


def test_shipped_studies_are_changed_in_one_field_by_one_override() -> None:
    for study in ("quick", "gating", "sharing"):
        found = load_study(study, ["train.weight_decay=0.3125"])
        assert len(found.changed) == 1 and found.name.startswith(f"{study}+")


SEVEN = ["train.steps=7"]
FIGURES: Registry[Drawing] = Registry("figure", "none", "reports.builtin")
FIGURES.register("accuracy_vs_flops")(figures.get("accuracy_vs_flops"))


@pytest.fixture(scope="module", autouse=True)
def one_figure() -> Iterator[None]:
    """Reports with one figure: which file is whose, not what it shows, is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reports.page.figures", FIGURES)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, no_runs: Path) -> Path:
    """The study was run as it is written, with another number of steps, with a further seed, and as it is written."""
    folder = tmp_path_factory.mktemp("named")
    (folder / "mlflow.db").write_bytes(no_runs.read_bytes())
    (folder / "tiny.yaml").write_text(yaml.safe_dump(RAW))
    lines: list[str] = []

    def run(*overrides: str) -> None:
        study, uri = str(folder / "tiny.yaml"), f"sqlite:///{folder}/mlflow.db"
        public.run(study, overrides, runs=folder / "runs", jobs=1, tracking_uri=uri, tell=lines.append)

    run()
    kept = reports(folder, "tiny")
    run(*SEVEN)
    assert kept and reports(folder, "tiny") == kept, "it was overwritten"
    run("seeds=[2]")
    run()
    assert lines == [
        f"{name(*SEVEN)}: tiny with train.steps=7 (as written: 6)",
        "seeds 0, which earlier commands have added, stay in the study",
        "seeds 2, which earlier commands have added, stay in the study",
    ]
    return folder


def reports(folder: Path, study: str) -> dict[Path, bytes]:
    """Every file of a study's report."""
    return {path: path.read_bytes() for path in folder.glob(f"runs/reports/{study}/*")}


@pytest.fixture
def said(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command prints that ends well."""

    def run(*arguments: str) -> str:
        monkeypatch.chdir(folder)
        monkeypatch.setattr("sys.argv", ["cyclebench", *arguments])
        capsys.readouterr()
        app(list(arguments), standalone_mode=False)
        return capsys.readouterr().out

    return run


@pytest.mark.long
def test_both_are_kept_and_each_says_what_it_is(folder: Path) -> None:
    store = Store(folder / "runs")
    changed = name(*SEVEN)
    assert store.studies() == ["tiny", changed]
    plain, seven = (store.manifest(each) for each in store.studies())
    assert plain is not None and seven is not None
    assert (plain.seeds, seven.seeds, len(plain.cells), len(seven.cells)) == ([0, 2], [0], 4, 2)
    assert (plain.verdicts_at, seven.verdicts_at) == ([1], []), "a seed was added after a verdict"
    warned = (
        "Verdicts were given before, over 1 seed: if seeds were added by what those showed, wrong verdicts are up to 2"
    )
    assert plain.changed == [] and seven.changed == ["train.steps=7 (as written: 6)"]
    for each in store.studies():
        for kind in ("md", "html"):
            text = (store.root / "reports" / each / f"report.{kind}").read_text()
            assert (warned in text) == (each == "tiny")
            assert ("Not the study as it is written, but with train.steps=7 (as written: 6)" in text) == (
                each != "tiny"
            )
    assert (store.root / "reports/tiny/results.csv").read_text().count("done") == 4
    assert len(list(store.root.glob("*/result.json"))) == 6


def test_what_the_study_says_by_now_is_told(folder: Path, said: Callable[..., str]) -> None:
    path = folder / "tiny.yaml"
    text = path.read_text()
    path.write_text(yaml.safe_dump({**RAW, "question": "And now?", "seeds": [0, 2, 3]}))
    try:
        for command in ("status", "report", "power"):
            told = "the study has changed since this run: question=And now? (when it was run: Does it run?)"
            assert told in said(command, "tiny.yaml"), command
            assert "has changed" not in said(command, "tiny"), "by the name of the run"
    finally:
        path.write_text(text)
    assert "has changed" not in said("status", "tiny.yaml")


def test_tracking_has_a_run_for_each(folder: Path) -> None:
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    found = [run for run in runs_of(client) if run.data.tags.get("role") == "study"]
    notes = {run.data.tags[STUDY]: re.split(r"\n\n[-|] ", run.data.tags["mlflow.note.content"])[0] for run in found}
    assert notes == {"tiny": "Does it run?", name(*SEVEN): "Does it run?\n\ntrain.steps=7 (as written: 6)"}
    for run in found:
        cells = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")
        assert len(cells) == (4 if run.data.tags[STUDY] == "tiny" else 2)


def test_a_run_is_found_by_its_overrides_and_by_its_name(folder: Path, said: Callable[..., str]) -> None:
    changed = name(*SEVEN)
    listed = said("status")
    assert "tiny " in listed and changed in listed and "train.steps=7 (as written: 6)" in listed
    told = said("status", "tiny.yaml")
    assert told.startswith("tiny: 4 of 4 cells done") and f"another run of this study: {changed} (train.steps=7" in told
    for given in (["tiny.yaml", "--set", *SEVEN], ["tiny.yaml", "--set", "seeds=9", "--set", *SEVEN], [changed]):
        told = said("status", *given)
        assert (
            told.startswith(f"{changed}: 2 of 2 cells done") and "another run of this study: tiny (as written)" in told
        )
    for study, overrides in (("tiny.yaml", SEVEN), (changed, [])):
        results = public.load_results(study, set=overrides)
        assert results.manifest.study == changed and set(results.frame()["train.steps"]) == {7}
    assert set(public.load_results("tiny").frame()["train.steps"]) == {6}


@pytest.mark.parametrize(
    ("command", "more", "told"),
    [
        ("report", [], "report:    runs/reports/{}/report.html"),
        ("verify", ["--sample", "0"], "2 of 2 stored results are sound"),
        ("sync", [], "0 cells added, 2 were there already"),
        ("export", ["seven.zip"], "{}: 2 cells, "),
        ("execute", ["--rule", "confidence", "--threshold", "0.5", "--rounds", "1"], "ztt, p_hop, seed 0"),
    ],
)
def test_every_command_takes_the_overrides(
    folder: Path, said: Callable[..., str], command: str, more: list[str], told: str
) -> None:
    before = reports(folder, "tiny")
    assert told.format(name(*SEVEN)) in said(command, "tiny.yaml", *more, "--set", *SEVEN)
    assert before == reports(folder, "tiny")


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (
            ["report", "tiny.yaml", "--set", "train.steps=8", "--set", "question=Why?"],
            [
                "has not been run: runs holds tiny (as written); tiny+1985d549 (train.steps=7 (as written: 6))",
                "(run: cyclebench run tiny.yaml --set train.steps=8 --set 'question=Why?')",
            ],
        ),
        (["power", "tiny.yaml", "--set", "train.steps=8"], ["has not been run"]),
        (["report", "tinny"], ["unknown study 'tinny'; did you mean 'tiny'", "tiny+1985d549"]),
        (["sweep", "tiny.yaml", "--set", "train.steps=8"], ["(run: cyclebench run tiny with the same --set)"]),
        (["status", "--runs", "nowhere"], ["--runs: 'nowhere' holds no run of a study"]),
    ],
)
def test_what_was_not_run_is_told_with_what_was(
    folder: Path, said: Callable[..., str], arguments: list[str], messages: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        said(*arguments)
    assert all(message in str(caught.value) for message in messages), str(caught.value)
    assert "\n" not in str(caught.value) and not (folder / "nowhere").exists()


def test_the_sweep_of_another_limit_is_kept_beside_the_first(folder: Path, said: Callable[..., str]) -> None:
    said("sweep", "tiny.yaml", "--jobs", "1")
    first = {path: path.read_bytes() for path in folder.glob("runs/reports/tiny/sweep*")}
    said("sweep", "tiny.yaml", "--jobs", "1", "--max-flops", "20000")
    assert first and all(path.read_bytes() == content for path, content in first.items())
    sweeps = {path.stem: json.loads(path.read_text()) for path in folder.glob("runs/sweeps/*.json")}
    (other,) = sweeps.keys() - {"tiny"}
    assert sweeps["tiny"]["max_flops"] is None and sweeps[other]["max_flops"] == 20000
    store, searched = Store(folder / "runs"), [row["study"] for each in sweeps.values() for row in each["thresholds"]]
    assert {row.study for row in store.searches("tiny")} == set(searched) and len(set(searched)) == len(searched) == 4
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    runs = [run for run in runs_of(client) if SEARCH in run.data.tags]
    assert sorted(run.data.tags[SEARCH] for run in runs) == sorted(searched), "tracking holds both"
    text = (folder / f"runs/reports/{other}/sweep.md").read_text()
    assert "- changed: sweep.max_flops=20000.0 (as written: null)\n" in text


def test_sweeps_of_a_run_are_found_the_later_state_of_each_search(tmp_path: Path) -> None:
    store = Store(tmp_path)
    common = {"question": "?", "max_flops": None, "storage": "", "command": "", "git": None, "tasks": [], "budgets": []}
    row = {"variant": "htc", "task": "p_hop", "rule": "confidence", "per_cycle": False, "metric": "accuracy"}
    row |= {"cells": [], "full_flops_per_token": 1.0, "front": [], "tuned": []}
    for study, of, rows in (
        ("tiny+00000000", "tiny", [("a", 5), ("b", 5)]),
        ("tiny", "", [("a", 9), ("c", 1)]),
        ("tiny+11111111", "tiny+22222222", [("d", 1)]),
    ):
        found = [{**row, "study": name, "trials": trials} for name, trials in rows]
        told = {**common, "study": study, "thresholds": found, "environment": [], **({"of": of} if of else {})}
        store.write_sweep(SweepResult.model_validate(told))
    assert {(row.study, row.trials) for row in store.searches("tiny")} == {("a", 9), ("b", 5), ("c", 1)}
    assert [row.study for row in store.searches("tiny+22222222")] == ["d"] and store.searches("tiny-sweep") == []


def test_a_seed_whose_cells_are_others_by_now_does_not_stay(tmp_path: Path) -> None:
    store = Store(tmp_path)
    raw = {**RAW, "variants": ["htc"], "reference": None, "hypotheses": []}

    def seeds(steps: int, *given: int) -> tuple[list[int], list[int]]:
        study = study_from({**raw, "train": {"steps": steps}, "seeds": list(given)}, [], "tiny")
        plan = of_the_same_cells(make_plan(with_earlier(study, store), "", None), given, store)
        store.write_manifest("tiny", plan.manifest)
        assert {planned.cell.seed for planned in plan.cells} == set(given), "no others are run"
        assert {cell.seed for cell in plan.manifest.cells} == set(plan.manifest.seeds)
        return plan.manifest.seeds, plan.manifest.config["seeds"]

    assert seeds(5, 0, 1) == ([0, 1], [0, 1])
    assert seeds(5, 3) == ([0, 1, 3], [0, 1, 3])
    assert seeds(4, 0) == ([0], [0]), "of another training"
    assert seeds(4, 1, 0) == ([1, 0], [1, 0])


def test_wrong_names_are_one_line() -> None:
    with pytest.raises(UserError, match=r"tiny\.name: String should match pattern"):
        study_from({**RAW, "name": "tiny+abc"}, [], "tiny")
