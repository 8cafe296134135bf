"""Every number has a range, no infinity gets in, and what no machine holds is told before it is made."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import gpt2
from pydantic import BaseModel, Field
from test_runner import RAW, plan

from bench import limits
from bench.config import Cell, EvalConfig, ModelConfig, Strict, TrainConfig, parse
from bench.data.generated import Generated
from bench.data.task import check_size, get_task, tasks
from bench.errors import UserError, shown
from bench.model.variant import variants
from bench.study.conversion import Conversion, convert_to
from bench.study.load import study_from
from bench.study.profile import Comparison, profile
from bench.study.schema import Study

ENDS = [{"minimum", "exclusiveMinimum"}, {"maximum", "exclusiveMaximum"}]


def unbounded(schema: Any, path: str = "") -> Iterator[str]:
    """The numbers in a JSON schema that have no range."""
    if isinstance(schema, dict):
        if (
            schema.get("type") in ("integer", "number")
            and "enum" not in schema
            and not all(ends & schema.keys() for ends in ENDS)
        ):
            yield path
        for key, inner in schema.items():
            if key not in ("default", "const"):
                yield from unbounded(inner, f"{path}.{key}")
    elif isinstance(schema, list):
        for inner in schema:
            yield from unbounded(inner, path)


@pytest.mark.parametrize(
    "kind",
    [Study, Cell, Conversion, Comparison, *(kind.Options for of in (variants, tasks) for kind in of.items().values())],
    ids=lambda kind: kind.__qualname__,
)
def test_every_number_has_a_range(kind: type[BaseModel]) -> None:
    assert issubclass(kind, Strict), "a configuration that takes infinities"
    assert list(unbounded(kind.model_json_schema())) == []


@pytest.mark.parametrize(
    "value",
    [math.inf, -math.inf, math.nan, "inf", "NaN", "1e999", True, "yes", 10**5000],
    ids=lambda value: shown(value)[:9],
)
@pytest.mark.parametrize("field", ["grad_clip", "weight_decay", "eval_every_flops", "steps", "eval_every"])
def test_no_infinity_and_no_truth_value_is_a_number(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^train\.{field}: .*\(got") as error:
        parse(TrainConfig, {field: value}, "train")
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"grad_clip": math.inf}},
        {"model": {"rope_theta": math.inf}},
        {"decide": {"max_flops": math.inf}},
        {"decide": {"within": {"accuracy": math.nan}}},
        {"tune": {"lr": [1e-4, math.inf]}},
        {"sweep": {"max_flops": math.inf, "thresholds": {}}},
        {"sweep": {"budgets": {"ranges": {"train.lr": [1e-3, math.nan]}}}},
        {"sweep": {"budgets": {"ranges": {"train.lr": {"low": 0.0, "high": math.inf}}}}},
        {"variants": [{"name": "mor", "options": {"alpha": math.inf}}]},
        {"variants": [{"name": "htc", "grid": {"train.lr": [math.inf]}}]},
        {"tasks": [{"name": "recall", "options": {"noise": math.nan}}]},
        {"hypotheses": [{"claim": "a", "better": "ztt", "than": "htc", "margin": math.inf}]},
    ],
    ids=lambda changes: str(changes).translate(str.maketrans("", "", "{}'\" ")),
)
def test_no_infinity_gets_into_a_study(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="finite number"):
        study_from({**RAW, **changes}, [], "tiny")


def test_none_switches_off_what_may_be_off() -> None:
    told = {"grad_clip": "none", "eval_every": "none", "backward_cycles": None, "halting_loss": "none"}
    found = parse(TrainConfig, told, "train")
    assert found.grad_clip is found.eval_every is found.backward_cycles is None and found.halting_loss == "none"
    with pytest.raises(UserError, match=r"model\.d_model: .*\(got 'none'\)"):
        parse(ModelConfig, {"d_model": "none"}, "model")
    with pytest.raises(UserError, match=r"train\.grad_clip: must be a finite number or none"):
        parse(TrainConfig, {"grad_clip": math.inf}, "train")


def test_a_study_without_clipping_is_another_one() -> None:
    clipped, free = plan(), plan(train={**RAW["train"], "grad_clip": "none"})
    assert free.cells[0].cell.train.grad_clip is None
    assert not {p.cell.id for p in clipped.cells} & {p.cell.id for p in free.cells}


@pytest.mark.parametrize("name", [name for name, kind in sorted(tasks.items().items()) if issubclass(kind, Generated)])
def test_what_a_generated_task_says_of_its_size(name: str) -> None:
    """Its sequences have the length it tells, and a table of them fits, not more than a few times over."""
    import tracemalloc

    rows = 1 << 12
    task = get_task(name, {"n_train": rows, "n_valid": 1, "n_test": 1})
    assert isinstance(task, Generated)
    tracemalloc.start()
    found = task._draw(rows, np.random.default_rng(0), {})
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.ids.shape[1] == task.length
    assert 0.5 < taken / (rows * task.of_sequence().bytes) < 2


HUGE = [10**9, 10**12, (1 << 63) - 1]


@pytest.mark.parametrize("rows", HUGE)
@pytest.mark.parametrize("name", ["p_hop", "recall", "memorisation", "addition"])
def test_data_that_no_machine_holds(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(limits.MEMORY, "64")
    with pytest.raises(UserError, match=rf"{name}\.options: n_train = {rows}, .* would take at least .* of 64 GiB"):
        check_size(get_task(name, {"n_train": rows}))


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("p_hop", {"hops": 10**9}, "hops: Input should be less than or equal to 65535"),
        ("p_hop", {"hops": [1, 64]}, "hops = 64 must be below length = 64"),
        ("p_hop", {"hops": 30000, "length": 60000}, r"would take about .* to make \(allowed: up to 20 minutes"),
        ("mqar", {"vocabulary": 1 << 20, "n_train": 10**6}, "would take about"),
        ("modular_chain", {"variables": 1024, "queries": 1024, "modulus": 4096}, "would take about"),
    ],
    ids=str,
)
def test_data_that_take_for_ever(
    name: str, options: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(limits.MEMORY, "4096")
    with pytest.raises(UserError, match=told):
        check_size(get_task(name, options))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train": {"batch_size": 10**9}}, r"vanilla on p_hop: .* parameters and batches of 1,000,000,000 x 12 tokens"),
        ({"train": {"processes": 1024, "batch_size": 1024}}, "would take at least .* of memory, of 2 GiB here"),
        ({"model": {"d_model": 8192, "n_blocks": 64}}, "fewer processes, more accumulation, or CYCLEBENCH_MEMORY=GIB"),
        ({"model": {"n_blocks": 512, "n_cycles": 512}}, r"schedule: [\d,]+ steps are too many \(allowed: 4,096"),
        ({"evaluation": {"max_cycles": 1024}, "model": {"n_blocks": 16}}, "steps are too many"),
        ({"seeds": 10_000, "variants": [{"name": "htc", "grid": {"train.steps": [*range(1, 50)]}}]}, "490,000"),
        ({"variants": [{"name": "htc", "grid": {f"model.{f}": [*range(99)] for f in ("d_ff", "d_model")}}]}, "9,801"),
        ({"seeds": [1 << 63]}, "seeds.0: Input should be less than or equal to 9223372036854775807"),
    ],
    ids=lambda changes: str(changes)[:40],
)  # fmt: skip
def test_cells_that_no_machine_holds(changes: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(limits.MEMORY, "2")
    merged = {key: {**RAW[key], **value} if isinstance(RAW.get(key), dict) else value for key, value in changes.items()}
    with pytest.raises(UserError, match=told):
        plan(**merged)


def test_what_a_budget_in_flops_comes_to_has_a_range() -> None:
    cheap = {"name": "htc", "label": "cheap", "budget": "flops", "train": {"batch_size": 1}}
    with pytest.raises(UserError, match=r"variants\.cheap: budget = 'flops'\.steps: .*less than or equal to 10000000"):
        plan(variants=[{"name": "htc", "train": {"batch_size": 4096, "steps": 10_000}}, cheap])


@pytest.mark.parametrize("sizes", [{"length": 10**18}, {"vocab_size": 1}], ids=str)
def test_what_is_profiled_has_a_range(sizes: dict[str, int]) -> None:
    with pytest.raises(UserError, match=rf"{next(iter(sizes))}: \d+ must be from 2 to 16,777,216"):
        profile(["htc"], **sizes)


def test_one_variant_is_a_list_of_one() -> None:
    with pytest.raises(UserError, match=r"variants: 'htc' \(allowed: a list of names, \['htc'\]\)"):
        profile("htc")


def test_a_conversion_that_no_machine_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, wide = gpt2(tmp_path / "source", n_layer=2), ["options.rank=4096", "model.n_cycles=512"]
    monkeypatch.setenv(limits.MEMORY, "1")
    with pytest.raises(UserError, match=r"relaxed: [\d,]+ parameters would take at least .* of 1 GiB here"):
        convert_to(source, "relaxed", wide, 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_memory_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(limits.MEMORY, raising=False)
    assert (1 << 28) < limits.machine_memory() < (1 << 50)
    monkeypatch.setenv(limits.MEMORY, "1.5")
    assert limits.machine_memory() == 1.5 * (1 << 30)
    for wrong in ("", "0", "nan", "inf", "64GiB"):
        monkeypatch.setenv(limits.MEMORY, wrong)
        with pytest.raises(UserError, match="must be a number of GiB above 0"):
            limits.machine_memory()


def test_validations_at_every_step_are_no_more_than_the_steps() -> None:
    from bench.train.loop import _evaluations

    flops = np.cumsum(np.full(7, 5.0))
    assert _evaluations(TrainConfig(steps=7, eval_every_flops=1e-300), flops) == {*range(1, 8)}
    assert _evaluations(TrainConfig(steps=7, eval_every_flops=5.0), flops) == {*range(1, 8)}
    assert _evaluations(TrainConfig(steps=7, eval_every=7, eval_every_flops=10.0), flops) == {2, 4, 6, 7}


def test_options_of_plug_ins_are_held_to_it() -> None:
    class Options(Strict):
        share: float = 0.5
        sizes: tuple[int, ...] = ()
        any: dict[str, Any] = Field(default_factory=dict)

    for wrong in ({"share": math.nan}, {"sizes": [True]}, {"any": {"a": [{"b": math.inf}]}}):
        with pytest.raises(UserError, match="must be a"):
            parse(Options, wrong, "options")
    assert parse(Options, {"any": {"a": [True, None, "none"]}}, "options").any == {"a": [True, None, "none"]}
    assert parse(EvalConfig, {"max_cycles": "none"}, "evaluation").max_cycles is None
