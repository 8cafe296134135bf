"""lm-evaluation-harness on models that leave early or choose tokens: what it took is what was executed."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from harness import own_task, quick  # noqa: F401 - a fixture
from test_eval import TEXT, checkpoint
from typer.testing import CliRunner

from bench.cli import app
from bench.cli.options import leaving
from bench.data.batches import arrays
from bench.data.task import get_task
from bench.downstream.command import evaluate_all
from bench.downstream.run import Asked, Meter, evaluate_checkpoint
from bench.errors import UserError
from bench.evaluate.evaluation import evaluate
from bench.evaluate.rules import get_rule
from bench.exits.whole import WholeExit
from bench.model.costs import pass_flops
from bench.model.language_model import CycleForCausalLM

pytest.importorskip("lm_eval", reason="the extra eval is not installed")


def rows_of(folder: Path, task: str, options: dict[str, Any], out: Path, leave: Any = None) -> list[dict[str, Any]]:
    return evaluate_checkpoint(str(folder), [Asked(task, options)], [None], out / "tasks", 4, leave)


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    checkpoint(folder, "kjv", TEXT, "ztt")
    return folder


@pytest.mark.parametrize("rule", ["latent_diff", "confidence.last", "zero_attention", "patience"])
def test_a_text_is_scored_as_the_trace_says(text_model: Path, rule: str, tmp_path: Path) -> None:
    """Bits per byte, cycles and FLOPs, each window leaving by its own signal."""
    data, lm = get_task("kjv", {**TEXT, "n_test": None}).build(), CycleForCausalLM.from_pretrained(text_model)
    ids, targets = (column[: TEXT["n_test"]] for column in arrays(data.test))
    trace = evaluate(lm, ids, targets, rules=[get_rule(rule), get_rule("fixed")])
    levels = np.unique(trace.signals[rule][:, :-1])
    threshold = float((levels[len(levels) // 2 - 1] + levels[len(levels) // 2]) / 2) if len(levels) > 1 else 0.5
    expected = trace.score(rule, threshold)
    found = {row["metric"]: row for row in rows_of(text_model, "kjv", TEXT, tmp_path, (rule, threshold))}
    row = found["bits_per_byte"]
    assert row["value"] == pytest.approx(expected["loss"] / math.log(2), rel=1e-5)
    assert row["mean_cycles"] == pytest.approx(expected["mean_cycles"]) and row["cycles"] == 3
    assert row["flops_per_token"] == pytest.approx(expected["flops_per_token"], rel=1e-12)
    assert (row["exit"], row["threshold"]) == (rule, threshold)
    if len(levels) > 1:
        assert 1 < row["mean_cycles"] < 3, "the case tells sequences apart"


def test_thresholds_for_each_exit(text_model: Path, tmp_path: Path) -> None:
    data, lm = get_task("kjv", {**TEXT, "n_test": None}).build(), CycleForCausalLM.from_pretrained(text_model)
    ids, targets = (column[: TEXT["n_test"]] for column in arrays(data.test))
    trace = evaluate(lm, ids, targets, rules=[get_rule("latent_diff")])
    thresholds = np.median(trace.signals["latent_diff"][:, :-1], 0).tolist()
    (row,) = [
        row
        for row in rows_of(text_model, "kjv", TEXT, tmp_path, ("latent_diff", thresholds))
        if row["metric"] == "bits_per_byte"
    ]
    expected = trace.score("latent_diff", np.array(thresholds))
    assert row["value"] == pytest.approx(expected["loss"] / math.log(2), rel=1e-5)
    assert row["flops_per_token"] == pytest.approx(expected["flops_per_token"], rel=1e-12)
    with pytest.raises(UserError, match=r"^--threshold: 3 given \(allowed: one, or one for each of 2 exits\)"):
        rows_of(text_model, "kjv", TEXT, tmp_path, ("latent_diff", [0.1, 0.2, 0.3]))


@pytest.mark.parametrize("routing", ["expert", "token"])
def test_who_chooses_tokens_is_counted_as_it_runs(routing: str, tmp_path: Path) -> None:
    data = checkpoint(tmp_path / "model", "kjv", TEXT, "mor", {"routing": routing})
    data = get_task("kjv", {**TEXT, "n_test": None}).build()
    ids, targets = (column[: TEXT["n_test"]] for column in arrays(data.test))
    lm = CycleForCausalLM.from_pretrained(tmp_path / "model")
    trace = evaluate(lm, ids, targets, rules=[get_rule("fixed")])
    found = {row["metric"]: row for row in rows_of(tmp_path / "model", "kjv", TEXT, tmp_path / "out")}
    row = found["bits_per_byte"]
    assert row["value"] == pytest.approx(trace.leaving(3)["loss"] / math.log(2), rel=1e-5)
    assert row["flops_per_token"] == pytest.approx(trace.mean_flops()[-1], rel=1e-12) and row["mean_cycles"] == 3


def test_a_padded_batch_leaves_by_its_real_tokens() -> None:
    from settings import make, tokens

    lm, x = make("htc", {}), tokens(3, 6)
    lm.exits = WholeExit("latent_diff", 0.5)
    plain = [lm(x[row : row + 1]) for row in range(3)]
    import torch

    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), x], 1)
    mask = torch.cat([torch.zeros(3, 4, dtype=torch.long), torch.ones_like(x)], 1)
    together = lm(padded, attention_mask=mask)
    for row in range(3):
        assert together.exit_depth[row] == plain[row].exit_depth[0]
        torch.testing.assert_close(together.logits[row, 4:], plain[row].logits[0], rtol=1e-4, atol=1e-5)
    assert lm(x, logits_to_keep=2).logits.shape[1] == 2


def test_random_draws_for_every_sequence() -> None:
    from settings import make, tokens

    lm = make("htc", {})
    lm.exits = WholeExit("random", 0.5)
    left = [int(lm(tokens(1, 6)).exit_depth[0]) for _ in range(40)]
    assert len(set(left)) == 3


def count_on(folder: Path) -> None:
    """A task in which the model generates."""
    documents = [{"ask": f"{n} {n + 1}", "answer": f" {n + 2}"} for n in range(5)]
    settings = {"until": ["\n"], "max_gen_toks": 4}
    about = {"output_type": "generate_until", "doc_to_target": "{{answer}}", "generation_kwargs": settings}
    own_task(folder, "count_on", documents, ("exact_match",), **about)


@pytest.mark.long
def test_the_command_generates_with_exits_in_a_task_of_ones_own(
    text_model: Path, tmp_path: Path, no_runs: Path
) -> None:
    count_on(tmp_path / "own")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    shutil.copy(no_runs, tmp_path / "mlflow.db")
    arguments = ["eval", str(text_model), "--tasks", "count_on", "--include", str(tmp_path / "own")]
    arguments += ["--exit", "fixed", "--threshold", "1", "--tracking-uri", uri, "--out", str(tmp_path / "out")]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    assert "count_on" in found.stdout and "1.00 of 3" in found.stdout
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())
    lm = CycleForCausalLM.from_pretrained(text_model)
    one = pass_flops(lm, 8, 1).forward / 8
    assert row["metric"] == "exact_match" and row["mean_cycles"] == 1 and 0.5 * one < row["flops_per_token"] < 1.5 * one


def test_mistakes_are_told_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--exit and --threshold belong together"):
        leaving("fixed", None)
    nothing = str(tmp_path / "no_model")
    for leave, include, message in (
        (("fixd", 1.0), (), "did you mean 'fixed'"),
        (None, ("nowhere",), "include: 'nowhere' is not a folder"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_all([nothing], ["count_on"], [], [], None, 4, tmp_path, "", leave, include)


def test_a_pass_that_fails_leaves_no_counter_behind(text_model: Path) -> None:
    lm = CycleForCausalLM.from_pretrained(text_model).eval().requires_grad_(False)
    lm.exits = WholeExit("halting", 0.5)  # nothing halts
    import torch
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    with Meter(lm, None), pytest.raises(UserError, match="cannot be used with this"):
        lm(torch.zeros(1, 4, dtype=torch.long))
    assert _get_current_dispatch_mode() is None


def test_responses_of_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_instruction import sums, write

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    options = {"dataset": write(tmp_path / "data", train=sums(80), test=sums(9, 500)), "length": 32}
    data = checkpoint(tmp_path / "model", "instruction", options, "htc")
    (row,) = rows_of(tmp_path / "model", "instruction", options, tmp_path / "out")
    trace = evaluate(CycleForCausalLM.from_pretrained(tmp_path / "model"), *arrays(data.test))
    assert row["metric"] == "acc" and row["samples"] == 9
    assert row["value"] == (trace.correct[:, -1] == trace.scored).mean()
    documents = (tmp_path / "out/tasks/cyclebench_instruction.jsonl").read_text().splitlines()
    first = sums(1, 500)[0]
    assert json.loads(documents[0]) == {"context": first["prompt"], "target": f"{first['response']}<|endoftext|>"}
