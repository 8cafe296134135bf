"""What ``cyclebench profile`` reads from the command line, and what it starts without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.errors import UserError
from bench.study.load import study_from
from bench.study.plan import shape_of
from bench.study.profile import comparison, profile


def test_shapes_are_those_of_a_study() -> None:
    overrides = ["model.d_model=64", "reference=htc", "variants.vanilla.match=flops", "variants.ztt.model.n_blocks=5"]
    variants = ["htc", "ztt", "vanilla"]
    asked = comparison(variants, overrides)
    raw = {"name": "s", "question": "-", "tasks": ["p_hop"], "variants": variants, "seeds": 1}
    study = study_from(raw, overrides, "s")
    assert asked.variants == study.variants
    for entry in asked.variants:
        assert asked.shape(entry, 97, 24)[1:] == shape_of(study, entry, study.tasks[0], 97, 24)


def test_costs_are_told_for_every_variant() -> None:
    htc, vanilla = profile(["htc", "vanilla"], ["reference=htc", "variants.vanilla.match=depth"], 16, 32)
    assert (htc.label, htc.chosen, vanilla.match) == ("htc", "", "depth") and vanilla.chosen.startswith("n_blocks 4")
    assert htc.schedule.depth == vanilla.schedule.depth == vanilla.costs.depth == vanilla.model.n_blocks
    assert htc.costs.params < vanilla.costs.params and htc.costs.length == 16


def test_designs_make_several_of_a_variant() -> None:
    asked = comparison(["ztt"], ["variants.ztt.changes={options.gating: [none, scalar]}"])
    assert [entry.label for entry in asked.variants] == ["ztt", "ztt gating=none", "ztt gating=scalar"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.d_mode=8"], r"unknown key in --set: 'model.d_mode'; did you mean 'model.d_model'"),
        (["train.steps=8"], r"unknown key in --set: 'train' \(allowed: model, reference\)"),
        (["variants.htcc.match=flops"], r"'variants.htcc'; did you mean 'variants.htc'"),
        (["variants.htc.init=x"], r"unknown key in --set: 'variants.htc.init'"),
        (["variants.htc.match=flop"], r"profile.variants.0.match: Input should be 'params', .* \(got 'flop'\)"),
        (["variants.htc.match=flops"], r"match needs the study's reference"),
        (["reference=ztt"], r"reference = 'ztt' must be one of the variants' labels: htc, bc"),
        (["variants.bc.label=htc"], r"variants: label 'htc' stands twice"),
        (["model.d_model=7"], r"d_model = 7 must be a multiple of n_heads = 4"),
        (["model={a: 1, a: 2}"], r"key 'a' stands twice"),
        (["model.d_model"], r"must be KEY=VALUE, for example model.d_model=256"),
    ],
)
def test_wrong_overrides_are_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as found:
        comparison(["htc", "bc"], overrides)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("length", ["32", 32.5, 1, True])
def test_a_length_is_a_whole_number(length: Any) -> None:
    with pytest.raises(UserError, match=rf"^length: {length!r} must be from 2 to 16,777,216, a whole number$"):
        profile(["htc"], length=length)


@pytest.mark.long
@pytest.mark.parametrize(
    ("command", "without", "told"),
    [
        ("profile htc ztt", ("transformers", "datasets"), "of which zero tokens: parameters"),
        ("run quick --dry-run", ("transformers", "scipy.stats"), "20 cells to run"),
    ],
)
def test_what_takes_seconds_to_import_is_not(command: str, without: tuple[str, ...], told: str, tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules.update(dict.fromkeys({without}))
sys.argv = ["cyclebench", *{command.split()}]
from bench.cli import main
main()
"""
    where = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=where, capture_output=True, text=True)
    assert done.returncode == 0 and told in done.stdout, done.stderr
