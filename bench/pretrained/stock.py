"""transformers' own GPT-2 and Llama in our terms: their shape, and their weights under our names."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.config import ModelConfig, parse
from bench.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

State = dict[str, Tensor]

# Fields a checkpoint may carry that change what its model computes, with the values our blocks compute the same for.
PLAIN: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    "llama": {
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "sliding_window": (None,),
        "num_local_experts": (None,),
    },
}
KINDS = {"gpt2": "gpt2", "llama": "llama", "mistral": "llama"}  # model types we can represent, and their family

GPT2_NAMES = {
    "transformer.wte.": "tokens.",
    "transformer.wpe.": "positions.",
    "transformer.ln_f.": "norm.",
    "transformer.h.": "blocks.",
    ".ln_1.": ".norm1.",
    ".ln_2.": ".norm2.",
    ".attn.c_attn.": ".attention.qkv.",
    ".attn.c_proj.": ".attention.out.",
    ".mlp.c_fc.": ".mlp.up.",
    ".mlp.c_proj.": ".mlp.out.",
}
LLAMA_NAMES = {
    "model.embed_tokens.": "tokens.",
    "model.norm.": "norm.",
    "model.layers.": "blocks.",
    ".input_layernorm.": ".norm1.",
    ".post_attention_layernorm.": ".norm2.",
    ".self_attn.o_proj.": ".attention.out.",
    ".mlp.down_proj.": ".mlp.out.",
}
FUSED = {  # our one matrix from several of Llama's
    ".attention.qkv.weight": tuple(f".self_attn.{part}_proj.weight" for part in "qkv"),
    ".mlp.up.weight": (".mlp.gate_proj.weight", ".mlp.up_proj.weight"),
}


def shape_of_stock(config: PreTrainedConfig, source: str) -> ModelConfig:
    """The shape of a stock model, with one cycle. source: what messages call it.

    Raises UserError, naming the field, if our blocks do not compute what the checkpoint's would.
    """
    family = KINDS.get(config.model_type)
    if family is None:
        raise UserError(
            f"source {source!r}: model type {config.model_type!r} cannot be converted (allowed: {', '.join(KINDS)}, "
            "or a model of this suite)"
        )
    for field, allowed in PLAIN[family].items():
        value = getattr(config, field, allowed[0])
        if value not in allowed:
            raise UserError(
                f"source {source!r}: {field} = {value!r} is not supported (allowed: {' or '.join(map(repr, allowed))})"
            )
    fields = _gpt2_shape(config) if family == "gpt2" else _llama_shape(config, source)
    return parse(ModelConfig, {**fields, "family": family, "n_cycles": 1}, f"source {source!r}")


def _gpt2_shape(config: Any) -> dict[str, Any]:
    return {
        "activation": "gelu" if config.activation_function == "gelu" else "gelu_tanh",
        "d_model": config.n_embd,
        "n_blocks": config.n_layer,
        "n_heads": config.n_head,
        "d_ff": config.n_inner or 4 * config.n_embd,
        "norm_eps": config.layer_norm_epsilon,
        "tie_embeddings": config.tie_word_embeddings,
    }


def _llama_shape(config: Any, source: str) -> dict[str, Any]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim * config.num_attention_heads != config.hidden_size:
        raise UserError(
            f"source {source!r}: head_dim = {head_dim} is not supported "
            f"(allowed: hidden_size / num_attention_heads = {config.hidden_size / config.num_attention_heads:g})"
        )
    return {
        "d_model": config.hidden_size,
        "n_blocks": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "d_ff": config.intermediate_size,
        "norm_eps": config.rms_norm_eps,
        "tie_embeddings": config.tie_word_embeddings,
        **_rope(dict(config.rope_parameters), source),
    }


def _rope(rope: dict[str, Any], source: str) -> dict[str, Any]:
    kind = rope.pop("rope_type", "default")
    rope.pop("type", None)
    theta = rope.pop("rope_theta")
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"source {source!r}: partial_rotary_factor other than 1 is not supported")
    if kind == "default":
        return {"rope_theta": theta}
    if kind not in ("linear", "llama3", "yarn"):  # the others change with the length of what is read
        raise UserError(
            f"source {source!r}: rope_type = {kind!r} is not supported (allowed: default, linear, llama3, yarn)"
        )
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **rope}}


def our_weights(theirs: State, model: ModelConfig) -> State:
    """The weights under our names. ``theirs`` is emptied on the way, so that nothing is held twice.

    GPT-2's matrices are transposed (its Conv1D is [in, out]), Llama's projections fused. A tied head is left out.
    """
    if model.tie_embeddings:
        theirs.pop("lm_head.weight", None)
    names = GPT2_NAMES if model.family == "gpt2" else LLAMA_NAMES
    ours: State = {}
    if model.family == "llama":
        for block in range(model.n_blocks):
            for fused, parts in FUSED.items():
                ours[f"blocks.{block}{fused}"] = torch.cat([theirs.pop(f"model.layers.{block}{p}") for p in parts])
    for key in list(theirs):
        name = key
        for old, new in names.items():
            name = name.replace(old, new)
        value = theirs.pop(key)
        ours[name] = value.T.contiguous() if re.search(r"\.c_(attn|proj|fc)\.weight$", key) else value
    return ours
