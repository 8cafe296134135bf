"""With one cycle and nothing added the model is numerically transformers' own GPT-2 or Llama with the same weights."""

from __future__ import annotations

import re

import pytest
import torch
from settings import LENGTH, VOCAB, tokens
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bench.config import ModelConfig
from bench.model.costs import count
from bench.model.language_model import CycleForCausalLM, build_model
from bench.model.variant import get_variant
from bench.pretrained.stock import shape_of_stock

PLAIN = [
    ("vanilla", {}),
    ("bc", {}),
    ("htc", {}),
    ("sequence", {}),
    ("middle_sequence", {}),
    ("ztt", {"zero_tokens": 0, "gating": "none"}),
]


def stock_gpt2(tie: bool, activation: str = "gelu_new") -> tuple[PreTrainedModel, dict[str, torch.Tensor], ModelConfig]:
    """A random GPT-2, its weights under our names (its Conv1D matrices are transposed), and its shape."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=16, n_layer=4, n_head=4, tie_word_embeddings=tie)
    config.activation_function = activation
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    theirs = GPT2LMHeadModel(config)
    names = {
        r"transformer\.wte": "tokens",
        r"transformer\.wpe": "positions",
        r"transformer\.ln_f": "norm",
        r"transformer\.h\.": "blocks.",
        r"ln_(\d)": r"norm\1",
        r"attn\.c_attn": "attention.qkv",
        r"attn\.c_proj": "attention.out",
        r"mlp\.c_fc": "mlp.up",
        r"mlp\.c_proj": "mlp.out",
    }
    weights = {}
    for key, value in theirs.state_dict().items():
        weights[rename(key, names)] = value.T if re.search(r"c_(attn|proj|fc)\.weight", key) else value
    return theirs, weights, shape_of_stock(config, "a test")


def stock_gpt2_erf(tie: bool) -> tuple[PreTrainedModel, dict[str, torch.Tensor], ModelConfig]:
    """The same with GELU by its definition."""
    return stock_gpt2(tie, "gelu")


def stock_llama(tie: bool) -> tuple[PreTrainedModel, dict[str, torch.Tensor], ModelConfig]:
    """A random grouped-query Llama, its weights under our names (our projections are fused), and its shape."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tie,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )
    theirs = LlamaForCausalLM(config)
    names = {
        r"model\.embed_tokens": "tokens",
        r"model\.norm": "norm",
        r"model\.layers\.": "blocks.",
        "input_layernorm": "norm1",
        "post_attention_layernorm": "norm2",
        r"self_attn\.o_proj": "attention.out",
        r"mlp\.down_proj": "mlp.out",
    }
    state = theirs.state_dict()
    weights = {rename(k, names): v for k, v in state.items() if not re.search(r"\.(q|k|v|gate|up)_proj\.", k)}
    for i in range(4):
        block = f"model.layers.{i}"
        qkv = [state[f"{block}.self_attn.{x}_proj.weight"] for x in "qkv"]
        weights[f"blocks.{i}.attention.qkv.weight"] = torch.cat(qkv)
        weights[f"blocks.{i}.mlp.up.weight"] = torch.cat(
            [state[f"{block}.mlp.{x}_proj.weight"] for x in ("gate", "up")]
        )
    fields = {"family": "llama", "n_kv_heads": 2, "d_ff": 40, "rope_theta": 5000.0, "tie_embeddings": tie}
    return theirs, weights, ModelConfig(d_model=16, n_heads=4, n_blocks=4, n_cycles=1, **fields)


def rename(key: str, names: dict[str, str]) -> str:
    for pattern, name in names.items():
        key = re.sub(pattern, name, key)
    return key


def ours(
    name: str, options: dict[str, object], shape: ModelConfig, weights: dict[str, torch.Tensor]
) -> CycleForCausalLM:
    lm = build_model(get_variant(name, options), shape, VOCAB, 64)
    missing, unexpected = lm.load_state_dict(weights, strict=False)
    assert not missing and not unexpected
    return lm.eval()


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("stock", [stock_gpt2, stock_gpt2_erf, stock_llama])
@pytest.mark.parametrize(("name", "options"), PLAIN, ids=[name for name, _ in PLAIN])
def test_equals_transformers(name: str, options: dict[str, object], stock: object, tie: bool) -> None:
    theirs, weights, shape = stock(tie)  # type: ignore[operator]
    lm = ours(name, options, shape, weights)
    assert count(lm.parameters()) == count(theirs.parameters())
    x = tokens(3, LENGTH)
    expected, found = theirs.eval()(x, labels=x), lm(x, labels=x)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=1e-5)
    padded = torch.cat([torch.zeros(3, 2, dtype=torch.long), x], 1)
    mask = torch.cat([torch.zeros(3, 2, dtype=torch.long), torch.ones_like(x)], 1)
    settings = {
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "attention_mask": mask,
    }
    assert torch.equal(lm.generate(padded, **settings), theirs.generate(padded, **settings))


def test_gradients_equal_transformers() -> None:
    theirs, weights, shape = stock_gpt2(True)
    lm, x = ours("vanilla", {}, shape, weights), tokens(3, LENGTH)
    lm(x, labels=x).loss.backward()
    theirs.eval()(x, labels=x).loss.backward()
    torch.testing.assert_close(lm.tokens.weight.grad, theirs.transformer.wte.weight.grad, rtol=0, atol=1e-5)
    got, want = lm.blocks[1].mlp.up.weight.grad, theirs.transformer.h[1].mlp.c_fc.weight.grad
    torch.testing.assert_close(got, want.T, rtol=0, atol=1e-5)
