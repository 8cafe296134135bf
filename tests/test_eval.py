"""lm-evaluation-harness on our models: its numbers are ours, on the same data."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from settings import shape

from bench.cli import models
from bench.data.batches import arrays
from bench.data.task import get_task
from bench.data.tokenizers import text_tokenizer
from bench.downstream import command
from bench.downstream.command import evaluate_all, task_options
from bench.downstream.run import Asked, evaluate_checkpoint
from bench.errors import UserError
from bench.evaluate.evaluation import evaluate
from bench.model.costs import measured_flops
from bench.model.language_model import CycleForCausalLM, build_model
from bench.model.variant import get_variant
from bench.pretrained.share import SAME, merged, save_checkpoint

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

TEXT = {"length": 32, "n_train": 50, "n_valid": 10, "n_test": 6}
HOPS = {"hops": [1, 2], "length": 12, "n_train": 50, "n_valid": 10, "n_test": 16}


def checkpoint(folder: Path, task: str, options: dict[str, Any], variant: str, choices: Any = None) -> Any:
    data = get_task(task, options).build()
    made = get_variant(variant, choices)
    lm = build_model(made, shape(made, "llama"), data.vocab_size, data.length)
    lm.reset_parameters(0)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    save_checkpoint(lm, folder, data.tokenizer(), {"made": "at random"}, data.length)
    return data


def options_of(task: str, options: dict[str, Any]) -> list[str]:
    return [f"{task}.{key}={json.dumps(value)}" for key, value in options.items()]


@pytest.mark.long
def test_bits_per_byte_and_flops_are_the_harnesss(tmp_path: Path) -> None:
    folder, uri = tmp_path / "model", f"sqlite:///{tmp_path}/mlflow.db"
    checkpoint(folder, "kjv", TEXT, "ztt")
    rows, paths = evaluate_all([str(folder)], ["kjv"], options_of("kjv", TEXT), [1, 3], None, 4, tmp_path / "out", uri)
    found = {row["cycles"]: row for row in rows if row["metric"] == "bits_per_byte"}
    # The same text by our own evaluation: the first six windows of the test split in its order.
    data = get_task("kjv", {**TEXT, "n_test": None}).build()
    ids, targets = (column[: TEXT["n_test"]] for column in arrays(data.test))
    lm = CycleForCausalLM.from_pretrained(folder)
    for cycles in (1, 3):
        loss = evaluate(lm, ids, targets, n_cycles=cycles).leaving(1)["loss"]
        assert found[cycles]["value"] == pytest.approx(loss / math.log(2), rel=1e-5)
        counted = measured_flops(lm, 1, TEXT["length"], n_cycles=cycles) / TEXT["length"]
        assert found[cycles]["flops_per_token"] == counted
    assert found[1]["value"] != found[3]["value"]
    assert all(path.is_file() and path.stat().st_size > 500 for path in paths)
    assert "bits_per_byte" in (folder / "README.md").read_text()
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("cyclebench").experiment_id])
    assert run.data.metrics["cyclebench_kjv/bits_per_byte"] == pytest.approx(found[3]["value"])


@pytest.mark.slow
def test_accuracy_on_a_generated_task_is_the_harnesss_and_plain_lm_eval_gives_it_too(tmp_path: Path) -> None:
    folder, uri = tmp_path / "model", f"sqlite:///{tmp_path}/mlflow.db"
    data = checkpoint(folder, "p_hop", HOPS, "htc")
    rows, _ = evaluate_all([str(folder)], ["p_hop"], options_of("p_hop", HOPS), [], None, 8, tmp_path / "out", uri)
    ours = evaluate(CycleForCausalLM.from_pretrained(folder), *arrays(data.test)).leaving(1)["accuracy"]
    (row,) = rows
    assert row["value"] == pytest.approx(ours, abs=1e-9) and 0 < ours < 1
    assert row["samples"] == int((arrays(data.test)[1] >= 0).sum())
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "cyclebench_p_hop", "--batch_size", "8"]
    command += [
        "--model_args",
        f"pretrained={folder},trust_remote_code=True",
        "--include_path",
        str(tmp_path / "out/tasks"),
    ]
    command += ["--device", "cpu", "--output_path", str(tmp_path / "plain")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = (tmp_path / "plain").rglob("results_*.json")
    assert json.loads(result.read_text())["results"]["cyclebench_p_hop"]["acc,none"] == pytest.approx(ours, abs=1e-9)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_the_saved_tokenizer_reads_as_the_data_were_read(kind: str, tmp_path: Path) -> None:
    documents = ["In the beginning was the Word.\nĀ §€ 漢字 \t two  spaces", "the Word was with God"] * 20
    encode, size, made = text_tokenizer(kind, 300, documents)
    made().save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == size and loaded.eos_token_id < size
    for document, ids in zip(documents[:2], encode(documents[:2]), strict=True):
        assert loaded(document)["input_ids"] == ids.tolist()
        assert loaded.decode(ids.tolist()) == document


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    for wrong in ("kjv.length", "length=3", "mmlu.x=1", "p_hop.hops=[1"):
        with pytest.raises(UserError, match="--set"):
            task_options([wrong], ["p_hop", "mmlu"])
    with pytest.raises(UserError, match=r"'p_hop.hop'; did you mean 'p_hop.hops'"):
        task_options(["p_hop.hop=2"], ["p_hop", "mmlu"])
    with pytest.raises(UserError, match=r"key 'a' stands twice"):
        task_options(["p_hop.hops={a: 1, a: 2}"], ["p_hop"])
    assert task_options(["p_hop.hops=2", "kjv.length=8"], ["p_hop", "kjv"]) == {
        "p_hop": {"hops": 2},
        "kjv": {"length": 8},
    }
    checkpoint(tmp_path / "model", "p_hop", HOPS, "vanilla")
    with pytest.raises(UserError, match="not what the model's tokeniser reads"):
        evaluate_all([str(tmp_path / "model")], ["kjv"], [], [], None, 8, tmp_path, "sqlite:///none.db")
    with pytest.raises(UserError, match=r"^--cycles: 5 with 'vanilla', which has no cycles \(allowed: 1\)$"):
        evaluate_all([str(tmp_path / "model")], ["p_hop"], [], [1, 5], None, 8, tmp_path, "sqlite:///none.db")
    for rule in ("zero_attention", "fixed"):
        with pytest.raises(UserError, match=f"^exit rule '{rule}' with a single cycle"):
            evaluate_checkpoint(str(tmp_path / "model"), [Asked("p_hop", HOPS)], [None], tmp_path, leave=(rule, 0.5))
    for wrong in ("0", "-1", "abc"):
        with pytest.raises(UserError, match="n_test"):
            model = [str(tmp_path / "model")]
            evaluate_all(model, ["kjv"], [f"kjv.n_test={wrong}"], [], None, 8, tmp_path, "sqlite:///none.db")


def test_scores_at_several_thresholds_are_told_apart() -> None:
    first = {"task": "kjv", "metric": "acc", "value": 0.1, "cycles": 3, "exit": "latent_diff", "threshold": (0.1, 0.2)}
    other = {**first, "threshold": (0.1, 0.3)}
    stored = json.loads(json.dumps(merged([], [first, other], SAME)))
    assert len(stored) == 2
    assert len(merged(stored, [{**first, "asked": "length=16"}], SAME)) == 3
    assert merged(stored, [{**first, "value": 0.5}], SAME) == [stored[1], {**first, "value": 0.5}]


def test_the_command_scores_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(command, "evaluate_all", lambda *given: (asked.extend(given), ([], []))[1])
    monkeypatch.setattr(models, "show", lambda *_: None)
    models.eval_(["m", "m"], "kjv, p_hop,kjv,", cycles=[2, 1, 2])
    assert [len(asked[0]), asked[1], asked[3]] == [1, ["kjv", "p_hop"], [2, 1]]
    for nothing in ("", " , "):
        with pytest.raises(UserError, match=f"^--tasks: '{nothing}' names no task"):
            models.eval_(["m"], nothing)


def test_a_cells_card_gets_scores_that_tell_what_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint may be named by the cell's folder."""
    monkeypatch.setattr(command, "plot_scores", lambda *_: [])
    monkeypatch.setattr(command, "log_evaluations", lambda *_: None)
    checkpoint(tmp_path / "cell" / "model", "p_hop", HOPS, "htc")
    options = options_of("p_hop", {**HOPS, "n_test": 4})
    evaluate_all([str(tmp_path / "cell")], ["p_hop"], options, [1], 2, 8, tmp_path, "")
    asked = "hops=[1, 2],length=12,limit=2,n_test=4,n_train=50,n_valid=10"
    (row,) = json.loads((tmp_path / "results.json").read_text())
    card = (tmp_path / "cell" / "model" / "README.md").read_text()
    assert row["asked"] == asked and asked in card and "| asked" in card


def test_a_later_evaluation_leaves_what_an_earlier_one_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same folder; of the same checkpoint, task, metric, cycles and exits the later score stands."""
    values = iter([0.25, 0.5, 0.75])

    def scored(source: str, asked: Any, cycles: Any, *others: Any) -> list[dict[str, Any]]:
        cost = {"stderr": 0.1, "mean_cycles": 2.0, "flops_per_token": 1e6, "samples": 8}
        return [{"task": one.name, "metric": "acc", "value": next(values), "cycles": 2, **cost} for one in asked]

    monkeypatch.setattr(command, "evaluate_checkpoint", scored)
    model = str(tmp_path / "m")
    (tmp_path / "m").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "m" / name).touch()
    with pytest.raises(UserError, match=r"^source 'typo' is not a folder"):  # before the first is scored
        evaluate_all([model, "typo"], ["kjv"], [], [], None, 8, tmp_path, "sqlite:///none.db")
    for task in ("kjv", "p_hop", "kjv"):
        rows, _ = evaluate_all([model], [task], [], [], None, 8, tmp_path, f"sqlite:///{tmp_path}/mlflow.db")
        assert [row["task"] for row in rows] == [task]
    stored = json.loads((tmp_path / "results.json").read_text())
    assert [(row["task"], row["value"]) for row in stored] == [("p_hop", 0.5), ("kjv", 0.75)]
    for broken in (b"[", b"{}", b'[{"task": "kjv"}]', b"\xff"):
        (tmp_path / "results.json").write_bytes(broken)
        with pytest.raises(UserError, match=r"^--out: .*results.json (cannot be read|holds no results of eval)"):
            evaluate_all([model], ["kjv"], [], [], None, 8, tmp_path, "sqlite:///none.db")
        assert (tmp_path / "results.json").read_bytes() == broken
