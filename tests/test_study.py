"""Study files and overrides: what is accepted, and one clear line for what is not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench.errors import UserError
from bench.study.load import load_study, study_from, study_names
from bench.study.overrides import apply_override
from bench.study.schema import Study

BASE = """name: s
question: why
tasks: [p_hop]
variants: [htc, {name: ztt, label: gated, options: {gating: scalar}}]
seeds: 2
"""


def load(text: str, tmp_path: Path, *overrides: str) -> Study:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    return load_study(str(path), overrides)


def test_shipped_studies_load() -> None:
    assert {"quick", "sharing"} <= set(study_names())
    for name in study_names():
        assert load_study(name).name == name


@pytest.mark.parametrize("preset", [None, "gpu"])
def test_rows_of_cycles_stand_beside_rows_of_depth_and_none_has_anothers_learning_rate(preset: str | None) -> None:
    study = load_study("cycles", preset=preset)
    depths: dict[str, set[int]] = {}
    for entry in study.variants:
        shape = study.cell_model(entry, study.tasks[0])
        row, scaled = entry.label.rpartition(" ")[0], "scaled" in entry.label
        depths.setdefault(row, set()).add(study.variant(entry).schedule(shape).depth)
        assert shape.residual_scale == (1.0 if scaled else None)
    assert depths.keys() == {"vanilla", "htc", "ztt", "vanilla scaled", "htc scaled"}
    assert depths["htc"] == depths["ztt"] == depths["htc scaled"] and depths["vanilla"] == depths["vanilla scaled"]
    assert depths["vanilla"] <= depths["htc"] and len(depths["vanilla"]) >= 3, "a fit of phi needs three depths"
    assert study.tune is not None and study.tune.lr[0] < study.train.lr < study.tune.lr[1]


def test_bare_names_labels_and_seeds(tmp_path: Path) -> None:
    study = load(BASE, tmp_path)
    assert [(entry.name, entry.label) for entry in study.variants] == [("htc", "htc"), ("ztt", "gated")]
    assert study.seeds == (0, 1)
    assert load(BASE.replace("seeds: 2", "seeds: [5, 3]"), tmp_path).seeds == (5, 3)
    assert load(BASE.replace("seeds: 2", "seeds: 100-103"), tmp_path).seeds == (100, 101, 102, 103)
    assert load(BASE.replace("seeds: 2", "seeds: 7-7"), tmp_path).seeds == (7,)


def test_overrides_reach_everything(tmp_path: Path) -> None:
    study = load(
        BASE,
        tmp_path,
        "model.d_model=256",
        "train.lr=3e-4",
        "seeds=[7]",
        "tasks.p_hop.options.hops=[1, 2]",
        "tasks.p_hop.train.steps=5",
        "variants.gated.options.gating=none",
        "variants.htc.model.n_cycles=9",
        "question=what now",
    )
    htc, gated = study.variants
    assert study.model.d_model == 256 and study.seeds == (7,) and study.question == "what now"
    assert gated.options == {"gating": "none"} and study.tasks[0].options == {"hops": [1, 2]}
    assert study.cell_model(htc, study.tasks[0]).n_cycles == 9 and study.cell_model(gated, study.tasks[0]).n_cycles == 3
    assert study.cell_train(gated, study.tasks[0]).steps == 5 and study.cell_train(htc, study.tasks[0]).lr == 3e-4
    assert [entry.name for entry in load(BASE, tmp_path, "variants=[bc]").variants] == ["bc"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.d_modle=3", r"'model\.d_modle'; did you mean 'model\.d_model'"),
        ("trian.steps=3", r"'trian'; did you mean 'train'"),
        ("modle=3", r"'modle'; did you mean 'model'"),
        ("train.steps=many", r"train\.steps: .*integer.*'many'"),
        ("train.steps=0", r"train\.steps: .*greater than or equal to 1.*0"),
        ("variants.gatde.options.gating=none", r"variants\.gatde'; did you mean 'variants\.gated'"),
        ("variants.gated.option.x=1", r"did you mean 'variants\.gated\.options'"),
        ("variants.gated.match=prams", r"match: .*'params', 'flops' or 'depth'.*'prams'"),
        ("variants.gated=3", r"is an entry; set one of its fields"),
        ("train.steps", r"must be KEY=VALUE"),
        ("train.steps=[", r"not valid YAML"),
        ("seeds=0", r"seeds: must be a number from 1 to 10000, a range such as 100-149, or a list \(got 0\)"),
        ("seeds=5-4", r"seeds: must be a number .* \(got '5-4'\)"),
        ("seeds=0-10000", r"seeds: must be a number from 1 to 10000"),
        ("seeds=3 to 5", r"seeds: must be a number from 1 to 10000"),
        ("seeds=3.0", r"seeds: must be a number from 1 to 10000"),
        ("variants=htc", r"variants: must be a list \(got 'htc'\)"),
        ("variants={htc: 1}", r"variants: must be a list \(got a mapping\)"),
        ("variants=[5]", r"variants\.0: must be a mapping of names to values \(got 5\)"),
        ("seeds=[1, 1]", r"seeds = \[1, 1\] must be different"),
        ("seeds=[]", r"seeds"),
        ("model.n_heads=3", r"d_model = 128 must be a multiple of n_heads = 3"),
        ("variants.gated.model.n_heads=3", r"variants\.gated\.model: d_model = 128 must be a multiple of n_heads = 3"),
        ("variants=[htc, htc]", r"label 'htc' stands twice"),
        ("reference=hct", r"reference = 'hct' must be one of .*htc, gated"),
        ("variants.gated.match=params", r"match needs the study's reference"),
        ("question.x=1", r"question is a value"),
        ("tasks=[]", r"tasks: .*at least 1"),
        ("name=a/../b", r"name: .*pattern.*'a/\.\./b'"),
        (f"name={'a' * 121}", r"name: .*at most 120 characters"),
        (
            'variants.gated.label="a\\nb"',
            r"variants: label 'a\\nb' must be a line that can be printed, without",
        ),
        ('tasks.p_hop.label="a\\tb"', r"tasks: label 'a\\tb' must be"),
        (
            'variants.gated.label=" gated"',
            r"variants: label ' gated' must be a line that can be printed, without spaces",
        ),
        ('question="a\\x1b[31mb"', r"question: must be text that can be printed"),
        ('question="  "', r"question: must be text that can be printed, and not empty"),
        ('hypotheses=[{claim: " ", better: htc, than: gated}]', r"hypotheses\.0\.claim: must be text that can be"),
        ("exit_rule=confidnce", r"exit_rule: unknown exit rule 'confidnce'; did you mean 'confidence'"),
        ("harness=[{name: all, on: p_hop}]", r"harness: the label 'all' stands for all tasks together"),
        ("tasks.p_hop.label=all", r"tasks: the label 'all' stands for all tasks together"),
        ("hypotheses=[{claim: c, better: htc, than: gated, metric: ''}]", r"hypotheses\.0\.metric: .*at least 1 char"),
    ],
)
def test_bad_overrides_are_one_clear_line(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        load(BASE, tmp_path, override)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must be a mapping"),
        ("name: [\n", "not valid YAML"),
        ("", "must be a mapping"),
        (BASE + "seeds: 3\n", "key 'seeds' stands twice"),
        (re.sub("(?m)^name: .*", "name: my-tuning", BASE), "name = 'my-tuning'.*: no -tuning or -sweep at its end"),
        (BASE + "modle: {}\n", "'modle'; did you mean 'model'"),
        (BASE + "presets: []\n", "presets must be a mapping of names to parts of a study"),
        (BASE + "model: {d_modl: 3}\n", "'d_modl'; did you mean 'd_model'"),
        (BASE.replace("question: why\n", ""), "question is required"),
        (BASE.replace("label: gated", "lable: gated"), "'lable'; did you mean 'label'"),
        (BASE + "train: !!python/object:os.system {}\n", "not valid YAML"),
    ],
)
def test_bad_files_are_one_clear_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        load(text, tmp_path)
    assert "\n" not in str(error.value)


def test_texts_are_one_line_and_rules_have_one_name(tmp_path: Path) -> None:
    claim = '{claim: "a\\n  b\\n", better: htc, than: gated}'
    study = load(BASE, tmp_path, 'question="is it\\nso?"', f"hypotheses=[{claim}]", "exit_rule=confidence.mean")
    assert study.question == "is it so?" and study.hypotheses[0].claim == "a b" and study.exit_rule == "confidence"


def test_unknown_studies_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown study 'quik'; did you mean 'quick'"):
        load_study("quik")
    with pytest.raises(UserError, match="does not exist"):
        load_study(str(tmp_path / "none.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        load_study(str(tmp_path / "binary.yaml"))


def test_a_mapping_is_enough() -> None:
    raw: dict[str, Any] = {"name": "x", "question": "q", "tasks": ["kjv"], "variants": ["bc"], "seeds": 1}
    assert study_from(raw, [], "x").tasks[0].label == "kjv"


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("variants.ztt.options.gating=scalar", 3),
        ("variants.ztt (no gate).options.gating=scalar", 2),
        ("variants.htc.model.n_cycles=2", 1),
        ("variants.vanilla.train.lr=0.1", 0),  # the only entry of that name, whatever its label
    ],
)
def test_an_override_is_of_the_entry_whose_label_it_names(override: str, changed: int, tmp_path: Path) -> None:
    variants = "[{name: vanilla, label: stack}, htc, {name: ztt, label: ztt (no gate), options: {gating: none}}, ztt]"
    text = re.sub(r"variants: .*", f"variants: {variants}", BASE)
    before, after = load(text, tmp_path), load(text, tmp_path, override)
    assert [a == b for a, b in zip(before.variants, after.variants, strict=True)].index(False) == changed
    assert sum(a != b for a, b in zip(before.variants, after.variants, strict=True)) == 1


def test_a_name_of_several_entries_is_refused(tmp_path: Path) -> None:
    raw = {"variants": [{"name": "ztt", "label": "a"}, {"name": "ztt", "label": "b"}]}
    with pytest.raises(
        UserError, match=r"--set: variants.ztt is the name of 2 entries \(allowed: variants.a, variants.b\)"
    ):
        apply_override(raw, "variants.ztt.train.lr=1")
    apply_override(raw, "variants.b.train.lr=1")
    assert raw == {"variants": [{"name": "ztt", "label": "a"}, {"name": "ztt", "label": "b", "train": {"lr": 1}}]}


SEARCHED: dict[str, Any] = {"name": "s", "question": "q", "tasks": ["p_hop"], "variants": ["htc"], "seeds": 1}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"variants": [{"name": "htc", "changes": {"train.lr": [0.1, 0.2]}}], "tune": {}},
            r"train\.lr = 0\.1 cannot be set beside",
        ),
        (
            {"tasks": [{"name": "p_hop", "train": {"lr": 0.1}}], "tune": {}},
            r"tasks\.p_hop\.train\.lr = 0\.1 cannot be set",
        ),
        ({"options": True}, r"options\.gatting'.*did you mean 'options\.gating'"),
    ],
)
def test_a_search_overwrites_nothing_and_searches_what_there_is(change: dict[str, Any], told: str) -> None:
    ranges: dict[str, Any] = {"train.steps": [4, 8]}
    raw = {**SEARCHED, **change}
    if raw.pop("options", False):
        ranges["options.gatting"] = ["none"]
        raw["variants"] = ["htc", "ztt"]
    if "tune" not in raw:
        assert study_from({**raw}, [], "s"), "without the search it is a study"
        raw["sweep"] = {"budgets": {"trials": 2, "ranges": ranges}}
    with pytest.raises(UserError, match=told):
        study_from(raw, [], "s")


def test_what_the_caller_holds_stays_as_it_is() -> None:
    raw: dict[str, Any] = {**SEARCHED, "train": {"steps": 450}, "tasks": ["p_hop"]}
    before = json.loads(json.dumps(raw))
    assert study_from(raw, ["train.steps=10", "tasks.p_hop.options.hops=2"], "s").train.steps == 10
    assert raw == before and study_from(raw, [], "s").train.steps == 450
