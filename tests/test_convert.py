"""Pretrained models as variants: exact where they can be, shared as told, refused in one line, fine-tuned in cells."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import BLOCKS, VOCAB, gpt2, llama
from transformers import AutoModelForCausalLM

from bench.config import ModelConfig
from bench.errors import UserError
from bench.model.costs import count, measured_flops, pass_flops, training_flops
from bench.model.freezing import freeze
from bench.model.language_model import build_model
from bench.model.parts import PARTS
from bench.model.schedule import cycle, middle_cycle
from bench.model.variant import get_variant
from bench.pretrained.convert import convert
from bench.pretrained.sharing import sources_of
from bench.pretrained.sources import digest, load, outline
from bench.run.going import run_cell
from bench.store.store import Store
from bench.study.conversion import convert_to
from bench.study.load import study_from
from bench.study.plan import make_plan

EXACT = ["vanilla", "bc", "htc", "ztt", "relaxed", "sequence", "middle_sequence"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sources")
    made = {rope: llama(folder / rope, rope) for rope in ("default", "linear", "llama3", "yarn")}
    made["gpt2"] = gpt2(folder / "gpt2")
    made["gpt2 untied"] = gpt2(folder / "gpt2u", tie_word_embeddings=False, n_inner=24)
    made["llama tied"] = llama(folder / "tied", tie_word_embeddings=True, num_key_value_heads=4, rms_norm_eps=1e-3)
    made["mistral"] = llama(folder / "mistral", kind="mistral")
    return made


SOURCES = ["default", "linear", "llama3", "yarn", "gpt2", "gpt2 untied", "llama tied", "mistral"]


def converted(source: str, name: str, n_cycles: int = 2, **changes: Any) -> Any:
    variant = get_variant(name, {}, pretrained=True)
    model = outline(source).shape.model_copy(update={"n_cycles": n_cycles if variant.cycled else 1, **changes})
    return convert(load(source), variant, model)


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("name", EXACT)
def test_at_one_cycle_logits_are_the_originals(kind: str, name: str, sources: dict[str, str]) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(sources[kind]).eval()
    lm = converted(sources[kind], name)
    x = torch.randint(VOCAB, (3, 40), generator=torch.Generator().manual_seed(1))
    expected = theirs(x).logits
    assert expected.std() > 0.5  # a model that says nothing would agree with any other
    torch.testing.assert_close(lm(x, n_cycles=1).logits, expected, rtol=0, atol=1e-4)
    if name != "vanilla":
        assert (lm(x).logits - expected).abs().max() > 1e-2
        added = sum(count(getattr(lm, part).parameters()) for part in PARTS if getattr(lm, part) is not None)
        assert count(lm.parameters()) - added == count(theirs.parameters())


def test_a_tanh_gate_leaves_even_more_cycles_exact(sources: dict[str, str]) -> None:
    variant = get_variant("ztt", {"gating": "tanh"}, pretrained=True)
    source = sources["default"]
    lm = convert(load(source), variant, outline(source).shape.model_copy(update={"n_cycles": 3}))
    x = torch.randint(VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))
    theirs = AutoModelForCausalLM.from_pretrained(source).eval()
    torch.testing.assert_close(lm(x).logits, theirs(x).logits, rtol=0, atol=1e-4)


def test_sharing_rules_state_which_blocks_they_start_from() -> None:
    middle = middle_cycle(4, 2)  # head, two cycled blocks, tail; six source blocks
    assert sources_of("stepwise", 6, middle) == [(0,), (1,), (4,), (5,)]
    assert sources_of("lower", 6, middle) == [(0,), (1,), (2,), (5,)]
    assert sources_of("upper", 6, middle) == [(0,), (3,), (4,), (5,)]
    assert sources_of("average", 6, middle) == [(0,), (1, 3), (2, 4), (5,)]
    assert sources_of("random", 6, middle) == [(0,), (), (), (5,)]
    assert sources_of("stepwise", 30, cycle(4, 2)) == [(0,), (10,), (19,), (29,)]
    assert sources_of(None, 4, middle) == [(0,), (1,), (2,), (3,)]
    for sharing, blocks in ((None, 6), ("stepwise", 4), ("average", 7)):
        with pytest.raises(UserError, match="sharing"):
            sources_of(sharing, blocks, middle)  # type: ignore[arg-type]


def test_shared_blocks_hold_what_the_rule_says(sources: dict[str, str]) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(sources["gpt2"]).transformer.h
    shape = outline(sources["gpt2"]).shape.model_copy(update={"n_blocks": 4, "n_cycles": 2})
    made = {rule: convert(load(sources["gpt2"]), get_variant("htc"), shape, rule, 3) for rule in ("average", "random")}
    mean = (theirs[2].mlp.c_fc.weight + theirs[4].mlp.c_fc.weight) / 2
    torch.testing.assert_close(made["average"].blocks[2].mlp.up.weight, mean.T)
    assert torch.equal(made["random"].blocks[3].mlp.up.weight, theirs[5].mlp.c_fc.weight.T)
    fresh = build_model(get_variant("htc"), shape, VOCAB, 64)
    fresh.reset_parameters(3)
    assert torch.equal(made["random"].blocks[1].mlp.up.weight, fresh.blocks[1].mlp.up.weight)  # type: ignore[union-attr]


def relaxed(
    source: str, rank: int, n_blocks: int, n_cycles: int, sharing: Any = "average", exact: bool = False, **options: Any
) -> Any:
    variant = get_variant("relaxed", {"rank": rank, **options}, pretrained=True, shared=True)
    model = outline(source).shape.model_copy(update={"n_blocks": n_blocks, "n_cycles": n_cycles})
    pretrained = load(source)
    if exact:
        pretrained.weights = {name: tensor.double() for name, tensor in pretrained.weights.items()}
    return convert(pretrained, variant, model, sharing)


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.long
def test_low_rank_updates_recover_what_sharing_takes(kind: str, sources: dict[str, str]) -> None:
    """At full rank the model is its source, whatever its blocks start from; each rank more comes nearer to it."""
    theirs = AutoModelForCausalLM.from_pretrained(sources[kind]).eval()
    x = torch.randint(VOCAB, (3, 40), generator=torch.Generator().manual_seed(1))
    expected, exactly = theirs(x).logits, copy.deepcopy(theirs).double()(x).logits
    # Numbers of the rotary table are of float32 in either: what they differ by in double precision is its rounding.
    rounding = max(1e-8, float((convert_plain(sources[kind])(x).logits - exactly).abs().max().detach()))
    for sharing, n_blocks, n_cycles, ends in (("average", 3, 2, 0), ("upper", 2, 3, 0), ("stepwise", 4, 2, 1)):
        shape, changes = (n_blocks, n_cycles, sharing), {"n_prelude": ends, "n_coda": ends}
        for alpha, rank in ((None, 16), (5.0, 18)):  # more than full is full
            how = {"alpha": alpha, **changes}
            torch.testing.assert_close(
                relaxed(sources[kind], rank, *shape, **how)(x).logits, expected, rtol=0, atol=1e-4
            )
            found = relaxed(sources[kind], rank, *shape, exact=True, **how)(x).logits
            torch.testing.assert_close(found, exactly, rtol=0, atol=2 * rounding)
        zero = relaxed(sources[kind], 16, *shape, start="zero", **changes)
        assert (zero(x).logits - expected).abs().max() > 1e-2
        assert all(not b.any() for b in zero.adapter.b.values()) and zero.adapter.bias is None
    residuals = [_residual(relaxed(sources[kind], rank, 3, 2), theirs) for rank in (1, 4, 16)]
    assert residuals[0] > residuals[1] > 10 * residuals[2]


def convert_plain(source: str) -> Any:
    return converted(source, "vanilla").double()


def _residual(lm: Any, theirs: Any) -> float:
    """What the update of the last layer's output matrix leaves of its residual; by hand, the least that it can."""
    stack = theirs.transformer.h if hasattr(theirs, "transformer") else theirs.model.layers
    weights = [
        block.mlp.c_proj.weight.T if hasattr(block.mlp, "c_proj") else block.mlp.down_proj.weight for block in stack
    ]
    step, rank = lm.schedule.steps[-1], lm.adapter.rank
    lack = weights[5] - (weights[2] + weights[5]) / 2
    row = lm.adapter.rows[step]
    left = lack - lm.adapter.b["mlp_out"][row] @ lm.adapter.a["mlp_out"][row]
    least = torch.linalg.svdvals(lack)[rank:].square().sum().sqrt()
    torch.testing.assert_close(left.norm(), least, rtol=1e-3, atol=1e-5)
    return float(left.norm().detach())


def test_low_rank_updates_need_a_block_for_every_step(sources: dict[str, str], tmp_path: Path) -> None:
    asked = ["model.n_cycles=3", "model.n_blocks=3", "sharing=lower"]
    with pytest.raises(
        UserError, match=r"options.start: 'svd' needs a schedule as deep as the source \(6 steps\), not 9"
    ):
        convert_to(sources["gpt2"], "relaxed", asked, 0, tmp_path / "out")
    shared = {"name": "relaxed", "label": "r", "model": {"n_blocks": 3, "n_cycles": 3}, "sharing": "lower"}
    with pytest.raises(UserError, match="needs a schedule as deep"):
        plan(init=sources["gpt2"], variants=[PLAIN, shared], model={"n_cycles": 2})
    assert convert_to(sources["gpt2"], "relaxed", [*asked, "options.start=zero"], 0, tmp_path / "out")
    kept = plan(init=sources["gpt2"], variants=[PLAIN, "relaxed"], model={"n_cycles": 2}).cells[-1].cell
    assert "start" not in kept.options  # all blocks kept: the cell is what it was
    deep = {**shared, "model": {"n_blocks": 3, "n_cycles": 2}}
    made = plan(init=sources["gpt2"], variants=[PLAIN, deep], model={"n_cycles": 2}).cells[-1].cell
    assert made.options["start"] == "svd"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "mistral", "sliding_window": 8}, "sliding_window = 8 is not supported"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"head_dim": 8}, "head_dim = 8 is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type = 'dynamic'"),
    ],
)
def test_what_we_cannot_represent_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = llama(tmp_path / "source", **changes)
    with pytest.raises(UserError, match=message) as found:
        outline(source)
    assert "\n" not in str(found.value)


def test_wrong_sources_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.gguf").write_text("no model")
    (tmp_path / "text.bin").write_text("no model")
    broken = Path(gpt2(tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"torn")
    other = Path(gpt2(tmp_path / "other"))
    (other / "config.json").write_text(json.dumps({"model_type": "bert"}))
    for name in ("empty", "text.gguf", "text.bin", "broken", "other", "absent"):
        with pytest.raises(UserError, match="source") as found:
            convert_to(str(tmp_path / name), "htc", [], 0, tmp_path / "out")
        assert "\n" not in str(found.value) and not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_folder_loads_in_a_fresh_python_and_says_where_it_is_from(sources: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "made"
    own = ["model.d_ff=40", "model.n_kv_heads=2"]  # the source's, which are not those of a shape by default
    convert_to(sources["llama3"], "ztt", [*own, "model.n_cycles=3", "options.gating=scalar"], 0, out)
    # Two fresh processes that share what takes long, the import of transformers.
    code = f"""
import os, sys
from transformers import AutoModelForCausalLM
for first, arguments in (("from cyclebench import CycleForCausalLM", {{}}), ("", {{"trust_remote_code": True}})):
    if os.fork() == 0:
        exec(first)
        lm = AutoModelForCausalLM.from_pretrained({str(out)!r}, **arguments)
        os.write(1, f"{{lm.config.variant}} {{sum(p.numel() for p in lm.parameters())}}\\n".encode())
        os._exit(0)
    assert os.wait()[1] == 0 and "cyclebench" not in sys.modules
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert found.stdout.splitlines() == [f"ztt {count(load(str(out)).weights.values())}"] * 2, found.stderr
    assert not [path for path in out.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    card = (out / "README.md").read_text()
    for text in ("converted from", "0 1 2 3 4 1 2 3 4 1 2 3 4 5", "forward FLOPs/token", '"gating": "scalar"'):
        assert text in card
    again = load(str(out))
    key = again.weights["prefix.key"].clone()
    same = get_variant("ztt", {"gating": "scalar", "from_cycle": 1})
    assert torch.equal(convert(load(str(out)), same, again.outline.shape, seed=1).prefix.key, key)
    with pytest.raises(UserError, match="no counterpart"):
        convert(again, get_variant("htc"), again.outline.shape)


@pytest.mark.parametrize(
    ("name", "options", "trained"),
    [
        ("ztt", {}, "additions"),
        ("ztt", {"from_cycle": 1, "gating": "token"}, "additions"),
        ("ztt", {"gating": "none"}, "additions+norms"),
        ("htc", {}, "additions+norms"),
    ],
)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.long
def test_flops_of_frozen_training_are_those_counted(name: str, options: Any, trained: Any, family: str) -> None:
    lm = build_model(get_variant(name, options), ModelConfig(family=family, d_model=16, n_heads=2), 31, 12)
    lm.reset_parameters(0)
    full = training_flops(lm, 12)
    freeze(lm, trained)
    assert 3 * training_flops(lm, 12) == measured_flops(lm, 3, 12, training=True)
    assert pass_flops(lm, 12).forward < training_flops(lm, 12) < full
    if trained == "additions+norms" and name == "htc":
        # Every product passes a gradient on and none makes one for its weights, but the very first: norm1 comes before.
        half, whole = pass_flops(lm, 12), 0
        whole = half.matmul * 2 + half.attention * 7 // 2
        assert training_flops(lm, 12) == whole


RAW: dict[str, Any] = {
    "name": "tune",
    "question": "Does it run?",
    "reference": "original",
    "init": "cell:pretrained",
    "model": {"d_model": 16, "n_heads": 2, "n_blocks": 4, "n_cycles": 2},
    "train": {"steps": 4, "batch_size": 4, "eval_sequences": 8},
    "tasks": [{"name": "p_hop", "options": {"hops": 1, "length": 12, "n_train": 50, "n_valid": 10, "n_test": 20}}],
    "variants": [
        {"name": "vanilla", "label": "original"},
        {"name": "htc", "budget": "flops"},
        {"name": "ztt", "train": {"trained": "additions"}},
        {"name": "htc", "label": "shared", "model": {"n_blocks": 3}, "sharing": "average"},
        {"name": "vanilla", "label": "pretrained", "train": {"steps": 8}},
    ],
    "seeds": 1,
}


def plan(**changes: Any) -> Any:
    return make_plan(study_from(json.loads(json.dumps({**RAW, **changes})), [], "tune"), "", None)


@pytest.mark.long
def test_cells_start_from_another_cell(tmp_path: Path) -> None:
    store = Store(tmp_path)
    cells = {planned.variant: planned.cell for planned in plan().cells}
    first = cells["pretrained"]
    assert first.init is None and all(cell.init for label, cell in cells.items() if label != "pretrained")
    assert cells["ztt"].init.source == f"cell:{first.id}" and cells["ztt"].options["from_cycle"] == 1  # type: ignore[union-attr]
    records = {label: run_cell(cell, store) for label, cell in sorted(cells.items(), key=lambda item: item[1] != first)}
    flops = {label: record.costs.train_flops for label, record in records.items()}
    assert abs(flops["htc"] / flops["original"] - 1) < 0.2 and cells["htc"].train.steps < 4
    before = load(str(store.folder(first.id) / "model")).weights
    after = load(str(store.folder(cells["ztt"].id) / "model")).weights
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name.split(".")[0] for name in set(after) - set(before)} == {"prefix"}
    moved = load(str(store.folder(cells["original"].id) / "model")).weights
    assert not torch.equal(moved["tokens.weight"], before["tokens.weight"])
    assert f"cell:{first.id}" in (store.folder(cells["ztt"].id) / "model" / "README.md").read_text()


def test_a_cell_starts_from_a_folder_and_notices_when_it_changes(sources: dict[str, str], tmp_path: Path) -> None:
    source = sources["default"]
    entries = [{"name": "vanilla", "label": "original"}, "bc"]
    cells = [p.cell for p in plan(init=source, variants=entries, model={"n_cycles": 2}).cells]
    assert [cell.model.n_blocks for cell in cells] == [BLOCKS] * 2 and cells[0].model.n_kv_heads == 2
    assert run_cell(cells[1], Store(tmp_path)).schedule == "0 1 2 3 4 5 0 1 2 3 4 5"
    other = plan(init=sources["linear"], variants=entries, model={"n_cycles": 2}).cells[0].cell
    assert other.id != cells[0].id


def test_several_end_tokens_are_kept(tmp_path: Path) -> None:
    source = llama(tmp_path / "source", eos_token_id=[5, 6, 7])
    convert_to(source, "htc", ["model.n_cycles=2"], 0, tmp_path / "made")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "made").generation_config.eos_token_id == [5, 6, 7]


def test_a_source_that_is_written_anew_is_read_anew(tmp_path: Path) -> None:
    source = gpt2(tmp_path / "source")
    before, blocks = digest(source), outline(source).shape.n_blocks
    gpt2(tmp_path / "source", n_layer=blocks + 1)
    assert digest(source) != before and outline(source).shape.n_blocks == blocks + 1


PLAIN = {"name": "vanilla", "label": "original"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "cell:nobody"}, "must name a variant"),
        ({"variants": [{"name": "htc", "label": "original", "match": "params", "init": "x"}]}, "cannot reshape"),
        (
            {"variants": [{"name": "vanilla", "label": "original"}, {"name": "htc", "model": {"d_model": 8}}]},
            "d_model: 8",
        ),
        (
            {"variants": [{"name": "vanilla", "label": "original", "train": {"trained": "additions"}}]},
            "nothing to train",
        ),
    ],
)
def test_mistakes_in_a_study_are_one_line(changes: Any, message: str, sources: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as found:
        for planned in plan(**{"init": sources["default"], "model": {"n_cycles": 2}, **changes}).cells:
            run_cell(planned.cell, Store(tmp_path))
    assert "\n" not in str(found.value)


def test_what_is_added_counts_a_halting_gate(tmp_path: Path) -> None:
    """It comes with a source that was trained with one."""
    shape = ModelConfig(d_model=16, n_heads=2, n_blocks=4, n_cycles=2, halting="gate")
    lm = build_model(get_variant("htc"), shape, VOCAB, 32)
    lm.reset_parameters(0)
    lm.save_pretrained(tmp_path / "source")
    told = convert_to(str(tmp_path / "source"), "htc", ["model.n_cycles=2"], 0, tmp_path / "out")
    assert lm.halting is not None and count(lm.halting.parameters()) > 0
    expected = f"{count(lm.parameters()):,}, {count(lm.halting.parameters()):,}"
    assert told["parameters, of which added"] == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.n_cycle=2", r"unknown key in --set: 'model.n_cycle'; did you mean 'model.n_cycles'"),
        ("sharin=average", r"'sharin'; did you mean 'sharing'\? \(allowed: model, options, sharing\)"),
        ("train.steps=3", r"unknown key in --set: 'train'"),
        ("init=elsewhere", r"unknown key in --set: 'init'"),
        ("sharing=avg", r"--set.sharing: Input should be 'stepwise', .* \(got 'avg'\)"),
        ("options.gatin=none", r"did you mean 'gating'"),
        ("model.n_cycles=0", r"model.n_cycles: Input should be greater than or equal to 1 \(got 0\)"),
        ("model={n_cycles: 2, n_cycles: 3}", r"key 'n_cycles' stands twice"),
        ("model.n_cycles", r"must be KEY=VALUE, for example model.n_cycles=2"),
    ],
)
def test_wrong_overrides_are_one_line(override: str, message: str, sources: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as found:
        convert_to(sources["gpt2"], "ztt", [override], 0, tmp_path / "out")
    assert "\n" not in str(found.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("field", "value"), [("n_cycles", "4"), ("kv", "first"), ("halting", "gate")])
def test_fields_of_cycles_are_refused_where_nothing_cycles(
    field: str, value: str, sources: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"^--set model.{field}: .?{value}.? with 'vanilla', which has no cycles"):
        convert_to(sources["gpt2"], "vanilla", [f"model.{field}={value}"], 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()
