"""Small random checkpoints made with transformers, saved as a user would have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

VOCAB, BLOCKS = 50, 6
ROPE: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 5000.0,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 5000.0},
}


def gpt2(folder: Path, **changes: Any) -> str:
    torch.manual_seed(0)
    fields = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 16, "n_layer": BLOCKS, "n_head": 4}
    config = GPT2Config(**{**fields, "bos_token_id": 0, "eos_token_id": 0, **changes})
    return _save(GPT2LMHeadModel(config), folder)


def llama(folder: Path, rope: str = "default", kind: str = "llama", **changes: Any) -> str:
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 40,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rope_parameters": ROPE[rope],
    }
    made = LlamaForCausalLM(LlamaConfig(**{**fields, **changes})) if kind == "llama" else None
    return _save(made or MistralForCausalLM(MistralConfig(**{**fields, "sliding_window": None, **changes})), folder)


def _save(model: Any, folder: Path) -> str:
    with torch.no_grad():  # large enough that a wrong frequency, a swapped matrix or a lost bias is seen
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return str(folder)
