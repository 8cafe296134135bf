"""The bench on tiny models: what its rows say is held against the counts, its files can be read again."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from typer.testing import CliRunner

from bench.cli import app, main
from bench.config import ModelConfig
from bench.data.task import task_data
from bench.model.costs import count, training_flops
from bench.model.language_model import build_model
from bench.model.variant import get_variant
from bench.perf import (
    exits,
    harness,
    memory,
    packing,
    rivals,
    scaling,
    sections,
    startup,
    streams,
    traces,
    training,
    zero_tokens,
)
from bench.perf.timing import VOCAB, in_turns, quartiles
from bench.train.checkpoints import Every
from reports.performance import figure, shown, table

CPU = torch.device("cpu")


def ordered(row: dict[str, Any], key: str = "ratio") -> bool:
    return bool(row[f"{key}_low"] <= row[key] <= row[f"{key}_high"])


def test_sides_take_turns_in_alternating_order() -> None:
    calls: list[int] = []
    seconds = in_turns([partial(calls.append, side) for side in range(3)], rounds=2, warmup=1)
    assert calls in ([0, 1, 2, 2, 1, 0, 0, 1, 2], [2, 1, 0, 0, 1, 2, 2, 1, 0])
    assert seconds.shape == (2, 3) and (seconds > 0).all()
    assert quartiles(np.array([1.0, 2, 3, 4, 5]), "x") == {"x": 3, "x_low": 2, "x_high": 4}


@pytest.mark.long
def test_training_is_compared_at_equal_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("x_transformers")
    monkeypatch.setattr(training, "no_compiler", lambda: "no compiler")
    shapes = [training.shape(64, "gpt2", 2), training.shape(64, "gpt2", 2, "gelu"), training.shape(64, "llama", 2)]
    rows = training.rows(CPU, 2, shapes, shapes[:1], (), batch=2, length=16, kept=shapes[2:])
    sides = [("ours", training.GPT2), ("ours", training.X), ("ours", training.LLAMA, training.X)]
    assert [row["model"] for row in rows] == [*sides[0], *sides[1], *sides[2], "all", *sides[2]]
    assert [row["mode"] for row in rows[6:]] == ["eager", "compiled"] + 3 * ["eager, kept"]
    for model, group in zip([*shapes, shapes[2]], (rows[:2], rows[2:4], rows[4:7], rows[8:]), strict=True):
        assert group[0]["params"] == count(build_model(get_variant("vanilla"), model, VOCAB, 16).parameters())
        assert all(abs(row["params"] / group[0]["params"] - 1) < 0.01 for row in group)
        assert "ratio" not in group[0] and all(ordered(row) for row in group[1:])
        assert all(row["tokens_per_second"] > 0 and row["peak_share"] > 0 for row in group)
    assert rows[7]["note"] == "no compiler" and "ratio" not in rows[7]


@pytest.mark.long
def test_a_compiled_model_says_what_compiling_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile itself takes too long here: its place is taken by something slow at first, quick thereafter."""
    import time

    def compiled(model: Any) -> Any:
        calls: list[None] = []

        def run(*some: Any, **inputs: Any) -> Any:
            time.sleep(0 if calls else 0.5)
            calls.append(None)
            return model(*some, **inputs)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(training, "compile_blocks", lambda lm: None)
    monkeypatch.setattr(training, "no_compiler", lambda: None)
    monkeypatch.setattr(training, "missing", lambda name: "not here" if name == training.X else None)
    shapes = [training.shape(32, "gpt2", 1, kind) for kind in ("gelu_tanh", "gelu")]
    rows = training.rows(CPU, 1, (), shapes, (), batch=1, length=8, kept=())
    assert [row["mode"] for row in rows] == ["compiled"] * 4 and rows[3]["note"] == "not here"
    assert rows[0]["model"] == training.BLOCKS and rows[1]["ratio"] > 0 and rows[1]["compile_seconds"] > 0.3


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rivals.missing(training.GPT2) is None
    monkeypatch.setattr(rivals, "find_spec", lambda _: None)
    assert rivals.missing(training.X) == "x-transformers is not installed (pip install 'cyclebench[bench]')"
    (row,) = training.rows(CPU, 1, (), (), [training.shape(32)], 1, 8, kept=())
    assert row["model"] == training.TRAINER and "accelerate is not installed" in row["note"]
    monkeypatch.setattr(rivals, "find_spec", lambda _: object())
    monkeypatch.setitem(rivals.NEEDED, training.X, "x_of_nobody")
    assert rivals.missing(training.X) == "x-of-nobody cannot be imported: No module named 'x_of_nobody'"


def test_the_trainer_trains_in_turns_with_others() -> None:
    pytest.importorskip("accelerate")
    data = task_data("kjv", {"length": 16, "n_train": 8, "n_valid": 2, "n_test": 2})
    model = rivals.stock(training.shape(16, "gpt2", 1), data.vocab_size, 16)
    before, calls = [p.detach().clone() for p in model.parameters()], []
    seconds = rivals.beside_trainer(model, data.train, 2, 3, [lambda: calls.append(1), lambda: calls.append(2)])
    assert seconds.shape == (3, 3) and (seconds > 0).all()
    assert calls == [1, 2] * (rivals.WARMUP + 3)
    assert all((a != b).any() for a, b in zip(before, model.parameters(), strict=True))


def test_the_zero_token_is_held_against_its_schedule() -> None:
    rows = zero_tokens.rows(CPU, 2, (16,), batch=2, length=8)
    model = ModelConfig(d_model=16, n_heads=2, n_blocks=4, n_cycles=2)
    ztt, htc = (training_flops(build_model(get_variant(n), model, VOCAB, 8), 8) for n in ("ztt", "htc"))
    assert [row["gating"] for row in rows] == ["attention", "none"]
    assert rows[0]["flops_ratio"] == ztt / htc > 1 and all(ordered(row) for row in rows)


def test_scaling_is_relative_to_the_first_value() -> None:
    values = {"depth": (3, 5), "cycles": (1, 3), "length": (8, 16), "zero tokens": (1, 4), "routed pool": (2, 4)}
    rows = scaling.rows(CPU, 2, values, d_model=16, batch=2, length=8)
    assert [(row["parameter"], row["value"]) for row in rows] == [(k, v) for k in values for v in values[k]]
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["ratio"] == first["ratio_high"] == 1 and ordered(second)
        assert second["flops"] > first["flops"] or first["parameter"] == "routed pool"
    model = ModelConfig(d_model=16, n_heads=2, n_blocks=4, n_cycles=3)
    assert rows[3]["flops"] == 2 * training_flops(build_model(get_variant("ztt"), model, VOCAB, 8), 8)


@pytest.mark.long
def test_packing_thresholds_exits_and_startup_have_their_rows() -> None:
    packed, threads = packing.rows(CPU, 2, {"tiny": (1, 2)}), sorted({1, torch.get_num_threads()})
    assert [(row["threads"], row["seeds"]) for row in packed] == [(t, n) for t in threads for n in (1, 2)]
    assert all(ordered(row) for row in packed)
    judged = traces.rows(CPU, 2, (16,), sequences=4, length=8, thresholds=3)
    assert [row["way"] for row in judged] == ["exact curves", "one by one"]
    for row in judged:
        assert row["ratio"] > 1 and row["naive_seconds"] == row["thresholds"] * row["evaluation_seconds"]
        assert row["thresholds"] % 3 == 0
    left = exits.rows(CPU, 2, ((32, 1), (32, 2)))
    assert [(row["batch"], row["policy"]) for row in left] == [(n, kv) for n in (1, 2) for kv in exits.POLICIES]
    assert all(1 <= row["mean_cycles"] < exits.CYCLES and ordered(row) for row in left)
    (started,) = startup.rows(CPU, 1, ("python alone",))
    assert started["seconds"] > 0


@pytest.mark.long
def test_the_harness_is_timed_apart_from_the_training() -> None:
    (seconds,) = harness.overhead(4, 1, Every(None, 2), CPU)
    assert (seconds > 0).all() and seconds.shape == (2,)


@pytest.mark.torture
@pytest.mark.long
def test_memory_is_that_of_a_process_of_its_own() -> None:
    here = np.ones(2**27)  # 1 GiB, which is this process's
    ours, theirs, data = memory.rows(CPU, 1, [training.shape(64, "gpt2", 1)], sequences=3000, batch=2, length=16)
    assert ours["bytes"] < here.nbytes / 4
    weights = count(build_model(get_variant("vanilla"), training.shape(64, "gpt2", 1), VOCAB, 16).parameters())
    for row in (ours, theirs):
        assert row["bytes"] > 4 * 4 * weights, "weights, gradients and both states of AdamW"
    assert "ratio" not in ours and ordered(theirs) and theirs["model"] == training.GPT2
    assert data["bytes"] > 0 and data["file_bytes"] > 3000 * memory.LENGTH * 2
    assert memory.rows(torch.device("meta"), 1) == []


def test_a_stream_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", None)  # to be set, and set back
    (tmp_path / "text").mkdir()
    streams.write_text(tmp_path / "text", 300_000)
    found = streams.prepare(tmp_path / "text", tmp_path / "cache", {"length": 64})
    assert 200_000 < found["tokens"] <= 310_000 and found["seconds"] > 0 and found["again"] > 0
    assert 0 < found["own"] <= found["resident"] < 2000 and 0 < found["disk"] < 3


def test_without_a_saving_to_be_had_there_is_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of a small model's cycle may drown in noise."""
    monkeypatch.setattr(exits, "realised", lambda *_: (6.0, np.array([])))
    (row,) = exits.rows(CPU, 1, ((32, 1),), policies=("recompute",))
    assert row["groups"] == 0 and "ratio" not in row and "no cycle was skipped" in row["note"]


def test_the_command_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {
        "scaling": partial(scaling.rows, values={"cycles": (1, 2)}, d_model=16, batch=1, length=8),
        "startup": partial(startup.rows, starts=("python alone", "import cyclebench")),
    }
    monkeypatch.setattr(sections, "SECTIONS", {"training": ("t", None)} | {n: (n, rows) for n, rows in tiny.items()})
    arguments = ["bench", "--only", "startup", "--only", "scaling", "--rounds", "2", "--out", str(tmp_path)]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    result = json.loads((tmp_path / "performance.json").read_text())
    assert list(result["sections"]) == ["scaling", "startup"] and result["rounds"] == 2
    assert result["environment"]["threads"] == torch.get_num_threads() and result["environment"]["device"] == "cpu"
    text = (tmp_path / "performance.md").read_text()
    for section in result["sections"].values():
        columns, rows = table(section)
        assert all(f"| {' | '.join(line)} |" in text for line in (columns, *rows))
    assert imread(tmp_path / "performance.png").shape[1] == 1360  # pixels
    assert all(
        str(tmp_path / f"performance.{kind}") in found.output.replace("\n", "") for kind in ("json", "md", "png")
    )


def test_what_is_read_of_a_row() -> None:
    row = {"what": "x", "n": 1234, "share": 0.5, "step_seconds": 0.0123, "tokens_per_second": 1234.5}
    assert list(shown(row).values()) == ["x", "1,234", "50.0%", "12.3 ms", "1.23 k"]
    assert shown({"ratio": 1.0, "ratio_low": 0.5, "ratio_high": 2.0}) == {"ratio [quartiles]": "1.000 [0.500, 2.000]"}
    section = {"title": "", "rows": [{"a": 1}, {"a": 2, "b": "c"}]}
    assert table(section) == (["a", "b"], [["1", "-"], ["2", "c"]])
    assert figure({"sections": {"harness": section}}) is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "trainings"], "error: unknown section of the bench 'trainings'; did you mean 'training'?"),
        (["--rounds", "0"], "error: Invalid value for '--rounds'"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["cyclebench", "bench", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and told.startswith(said) and told.count("\n") == 1
