"""Text as it comes: the tokeniser beside the model, the stream, and executed exits of a study, through the commands."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from settings import make
from transformers import AutoTokenizer

from bench.cli.exits import execute, generate
from bench.config import ModelConfig
from bench.data.tokenizers import text_tokenizer
from bench.downstream.run import open_checkpoint
from bench.errors import UserError
from bench.exits.generation import EarlyExit
from bench.exits.stream import Checkpoint, stream
from bench.form import Form
from bench.model.language_model import build_model
from bench.model.variant import get_variant
from bench.pretrained.share import README, add_scores
from bench.run.execution import execute_study
from bench.run.going import run_cell
from bench.run.upgrade import open_store
from bench.store.store import Store
from bench.study.load import study_from
from bench.study.plan import make_plan
from reports.page import write_report

TEXT = ["In the beginning God created the heaven and the earth.\n", "Größe, naïve 日本 \N{ROCKET}  two  spaces\t"] * 4
STUDY = """
name: tiny
question: Does it leave?
model: {d_model: 16, n_heads: 2, n_blocks: 3, n_cycles: 3}
train: {steps: 2, batch_size: 4}
tasks: [{name: kjv, options: {length: 32, n_train: 16, n_valid: 8, n_test: 8}}]
variants: [ztt, vanilla]
seeds: 1
"""


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_the_saved_tokeniser_is_the_tasks_own(kind: str, tmp_path: Path) -> None:
    encode, size, made = text_tokenizer(kind, 300, TEXT)
    made().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == size
    for text, ids in zip(TEXT, encode(TEXT), strict=True):
        assert loaded(text)["input_ids"] == ids.tolist()
        assert loaded.decode(ids.tolist()) == text


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A finished study of two cells."""
    from bench.study.load import load_study

    root = tmp_path_factory.mktemp("runs")
    (root / "tiny.yaml").write_text(STUDY)
    plan, store = make_plan(load_study(str(root / "tiny.yaml")), "", None), Store(root)
    store.write_manifest("tiny", plan.manifest)
    for planned in plan.cells:
        run_cell(planned.cell, store)
    return store


def folder(store: Store, variant: str = "ztt") -> Path:
    manifest = store.manifest("tiny")
    assert manifest is not None
    return store.folder(next(cell.id for cell in manifest.cells if cell.variant == variant))


def test_stream_writes_what_generate_gives(store: Store) -> None:
    checkpoint = Checkpoint(str(folder(store)))
    for exits in (None, EarlyExit("random", 0.5)):
        written: list[str] = []
        cycles = stream(checkpoint, "In the ", exits, written.append, 20)
        lm, ids = checkpoint.lm, checkpoint.encode("In the ")
        lm.exits = exits
        out = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0)
        lm.exits = None
        text = "".join(written)
        assert "".join(c for c in text if c not in "₀₁₂₃₄₅₆₇₈₉,") == checkpoint.decode(out[0].tolist()).replace(",", "")
        assert len(cycles) == 20 and (set(cycles) == {3} if exits is None else len(set(cycles)) > 1)
        assert [ord(c) - 0x2080 for c in text if c in "₁₂₃"] == cycles
    for number in (2, 5):  # as `--cycles` says, also beyond what was trained
        assert set(stream(checkpoint, "In", None, str, 5, n_cycles=number)) == {number}
    assert set(stream(checkpoint, "In", EarlyExit("fixed", 4.0), str, 5, n_cycles=5)) == {4}
    assert len(stream(checkpoint, "In", None, str)) == 30  # as many as fit
    leave = EarlyExit("random", 0.5)
    sampled = [stream(checkpoint, "In", leave, str, 9, temperature=1.0, seed=seed) for seed in (0, 0)]
    assert sampled[0] == sampled[1]


def test_without_a_tokeniser_text_is_token_numbers(tmp_path: Path) -> None:
    make("htc", {}).save_pretrained(tmp_path)
    checkpoint, written = Checkpoint(str(tmp_path)), []
    stream(checkpoint, "3 1 4", None, written.append, 4)
    assert written[0] == "3 1 4" and written[1][0] == " " and len("".join(written).split()) == 7
    for prompt in ("", "In the", "3 19"):
        with pytest.raises(UserError, match=r"--prompt.*token numbers.*0 to 18"):
            checkpoint.encode(prompt)


def test_scores_on_the_card_are_no_damage(store: Store) -> None:
    """``cyclebench eval runs/ID/model`` writes them there: the cell stays done, and what reads its model goes on."""
    model = folder(store) / "model"
    add_scores(model, [{"task": "cyclebench_kjv", "metric": "bits_per_byte", "value": 1.0, "cycles": 3}])
    assert "## Scores" in (model / README).read_text(encoding="utf-8")
    record = store.record(model.parent.name)
    assert record is not None and record.status == "done" and store.whole(record)
    assert store.model(record.id) == model and Checkpoint(str(model)).lm.schedule.n_cycles == 3


def test_errors_are_one_line(store: Store, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder with a saved model"):
        Checkpoint(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match=r"is a model of the kind 'gpt2' .*`cyclebench convert "):
        Checkpoint(str(tmp_path))
    with pytest.raises(UserError, match=r"--max-new-tokens: 40 .* 32 positions \(allowed: at most 30\)"):
        stream(Checkpoint(str(folder(store))), "In", None, str, 40)
    with pytest.raises(UserError, match=r"--prompt: 40 tokens \(allowed: at most 31"):
        stream(Checkpoint(str(folder(store))), "I" * 40, None, str)
    with pytest.raises(UserError, match=r"--temperature: 1e-40 \(allowed: 0, or from 1e-06 on\)"):
        stream(Checkpoint(str(folder(store))), "In", None, pytest.fail, temperature=1e-40)
    with pytest.raises(UserError, match=r"^--cycles: 7 with 'vanilla', which has no cycles \(allowed: 1\)$"):
        stream(Checkpoint(str(folder(store, "vanilla"))), "In", None, pytest.fail, n_cycles=7)
    assert set(stream(Checkpoint(str(folder(store, "vanilla"))), "In", None, str, 3, n_cycles=1)) == {1}
    for variant, rule, told in (("ztt", "halting", "cannot be used with this"), ("vanilla", "fixed", "a single cycle")):
        with pytest.raises(UserError, match=f"^exit rule '{rule}' .*{told}"):  # before the prompt is written
            stream(Checkpoint(str(folder(store, variant))), "In", EarlyExit(rule, 0.5), pytest.fail)
    with pytest.raises(UserError, match="threshold: 3 given"):
        stream(Checkpoint(str(folder(store))), "In", EarlyExit("confidence", [0.5] * 3), pytest.fail)
    with pytest.raises(UserError, match="--kv: needs --exit and --threshold"):
        generate(str(folder(store)), "In", kv="propagate")
    digits = ModelConfig(form=Form(features=4, judged="last"), d_model=8, n_heads=2, n_blocks=3, n_cycles=2)
    build_model(get_variant("htc"), digits, 10, 5).save_pretrained(tmp_path / "classes")
    with pytest.raises(UserError, match=r"/classes' tells classes and generates no text \(allowed: a model of text\)$"):
        Checkpoint(str(tmp_path / "classes"))
    with pytest.raises(UserError, match="has not been run"):
        execute(str(store.root / "tiny.yaml"), runs=tmp_path)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:500])


def without_one(path: Path) -> None:
    save_file(dict(list(load_file(path).items())[1:]), path, {"format": "pt"})


def with_one_more(path: Path) -> None:
    save_file({**load_file(path), "a": torch.zeros(2)}, path, {"format": "pt"})


def widened(path: Path) -> None:
    path.write_text(path.read_text().replace('"d_model": 16', '"d_model": 32'))


def a_list(path: Path) -> None:
    path.write_text("[1]")


def broken(path: Path) -> None:
    path.write_text("{")


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("model.safetensors", emptied, "cannot be loaded: "),
        ("model.safetensors", cut, "cannot be loaded: "),
        ("model.safetensors", without_one, "cannot be loaded: missing keys, .* the first of 1$"),
        ("model.safetensors", with_one_more, "cannot be loaded: unexpected keys, a the first of 1$"),
        ("config.json", widened, "cannot be loaded: mismatched keys, blocks.0.attention.out.bias the first of"),
        ("config.json", a_list, "cannot be (loaded|read): "),
        ("tokenizer.json", broken, "cannot be read: "),
        ("tokenizer_config.json", broken, "cannot be read: "),
    ],
)
def test_a_damaged_folder_is_one_line_and_nothing_is_drawn(
    store: Store, tmp_path: Path, name: str, change: Callable[[Path], None], told: str
) -> None:
    """Whether text is generated or scored: transformers would go on with random weights."""
    shutil.copytree(folder(store) / "model", tmp_path / "model")
    change(tmp_path / "model" / name)
    for opened in (Checkpoint, open_checkpoint):
        with pytest.raises(UserError, match=f"^(checkpoint|source) '.*/model' {told}"):
            opened(str(tmp_path / "model"))


def test_execute_takes_the_run_of_a_preset(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, manifest = tmp_path / "tiny.yaml", store.manifest("tiny")
    path.write_text(STUDY.replace("name: tiny", "name: presets") + "presets: {wide: {}}\n")
    assert manifest is not None
    store.write_manifest("presets-wide", manifest)
    execute(str(path), preset="wide", rounds=1, runs=store.root)
    assert "ztt, kjv, seed 0" in capsys.readouterr().out
    with pytest.raises(UserError, match="study 'presets' has not been run"):
        execute(str(path), rounds=1, runs=store.root)
    with pytest.raises(UserError, match="did you mean 'wide'"):
        execute(str(path), preset="wid", runs=store.root)


def test_execution_agrees_with_the_stored_trace_and_is_reported(store: Store, tmp_path: Path) -> None:
    manifest = store.manifest("tiny")
    assert manifest is not None
    found = list(execute_study(store, manifest, "zero_attention", None, 1, "sequence"))
    record = store.record(folder(store).name)
    assert record is not None and [label for label, _ in found] == ["ztt, kjv, seed 0"] * len(found) and found
    tuned = {entry.threshold: entry.test for entry in record.exits.rules["zero_attention"].tuned}
    for _, row in found:
        expected = tuned[row.threshold]
        for name in ("accuracy", "loss", "mean_cycles", "flops_per_token"):
            assert getattr(row, name) == pytest.approx(expected[name], rel=1e-5)
        assert row.flops_saved == pytest.approx(1 - row.flops_per_token / record.exits.points[-1].flops_per_token)
    assert record.execution == {"zero_attention": [row for _, row in found]}
    write_report(manifest, store.results(cell.id for cell in manifest.cells), tmp_path)
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert "saved FLOPs beside saved time" in text and f"{found[0][1].threshold:.4g}" in text


def test_execution_is_in_the_precision_that_the_cell_was_tested_in(tmp_path: Path) -> None:
    raw = {**yaml.safe_load(STUDY), "variants": ["htc"]}
    raw["train"] = {**raw["train"], "steps": 20, "lr": 0.01, "precision": "bfloat16"}
    plan, store = make_plan(study_from(raw, [], "study"), "", None), open_store(tmp_path, begin=True)
    record = run_cell(plan.cells[0].cell, store)
    tuned = {entry.threshold: entry.test for entry in record.exits.rules["confidence"].tuned}
    for _, row in execute_study(store, plan.manifest, "confidence", None, 1, "sequence"):
        assert row.mean_cycles == tuned[row.threshold]["mean_cycles"]
        assert row.loss == pytest.approx(tuned[row.threshold]["loss"], rel=1e-6)
