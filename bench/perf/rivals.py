"""Other libraries' models and training loop, at the shape of one of ours."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from bench.config import ModelConfig
from bench.errors import first_line
from bench.perf.timing import WARMUP, Run, timed, wait

NEEDED = {"x-transformers": "x_transformers", "transformers' Trainer": "accelerate"}


def missing(name: str) -> str | None:
    """Why a rival cannot take part, in a line; None if it can."""
    package = NEEDED.get(name)
    if package is None:
        return None
    if find_spec(package) is None:
        return f"{package.replace('_', '-')} is not installed (pip install 'cyclebench[bench]')"
    try:
        import_module(package)
    except ImportError as error:  # of something that it needs itself
        return f"{package.replace('_', '-')} cannot be imported: {first_line(error)}"
    return None


def stock(model: ModelConfig, vocab_size: int, length: int) -> nn.Module:
    """transformers' GPT-2 or Llama of the shape, with its default (fused) attention and without dropout."""
    if model.family == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                max_position_embeddings=length,
                hidden_size=model.d_model,
                intermediate_size=model.ff,
                num_hidden_layers=model.n_blocks,
                num_attention_heads=model.n_heads,
                num_key_value_heads=model.kv_heads,
                tie_word_embeddings=model.tie_embeddings,
            )
        )
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size,
            n_positions=length,
            n_embd=model.d_model,
            n_layer=model.n_blocks,
            n_head=model.n_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


class XTransformers(nn.Module):
    """x-transformers' decoder of the shape under its own loss, with fused attention, called as the others are."""

    def __init__(self, model: ModelConfig, vocab_size: int, length: int) -> None:
        """model: with as many key-value heads as heads."""
        super().__init__()
        from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper  # optional

        names = ("rotary_pos_emb", "use_rmsnorm", "ff_glu", "ff_swish", "ff_no_bias")
        layers = Decoder(
            dim=model.d_model,
            depth=model.n_blocks,
            heads=model.n_heads,
            attn_dim_head=model.head_dim,
            attn_flash=True,
            ff_mult=model.ff / model.d_model,
            **dict.fromkeys(names if model.family == "llama" else (), True),
        )
        net = TransformerWrapper(
            num_tokens=vocab_size,
            max_seq_len=length,
            tie_embedding=model.tie_embeddings,
            use_abs_pos_emb=model.family == "gpt2",
            attn_layers=layers,
        )
        self.lm = AutoregressiveWrapper(net)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, use_cache: bool = False) -> Any:
        """input_ids: [B, T], the labels, too; all T are run through the model and all but the first scored."""
        return SimpleNamespace(loss=self.lm(input_ids))


def beside_trainer(model: Any, windows: Any, batch: int, rounds: int, others: Sequence[Run]) -> NDArray[np.float64]:
    """Seconds [rounds, 1 + others] of a step of transformers' ``Trainer`` with all that its loop does in between, and
    of the others, which are called after each of them.

    windows: a data set with a column ``input_ids``; float32, gradients clipped at 1, the loss logged every 10 steps.
    """
    watch = _InTurns(others, model.device)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch,
            max_steps=WARMUP + rounds + 1,  # the first step starts the watch
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=model.device.type == "cpu",
        )
        trainer = Trainer(model, arguments, data_collator=_batch, train_dataset=windows, callbacks=[watch])
        for callback in [c for c in trainer.callback_handler.callbacks if type(c).__name__ == "PrinterCallback"]:
            trainer.remove_callback(callback)
        trainer.train()
    return np.array(watch.seconds[WARMUP:])


class _InTurns(TrainerCallback):
    def __init__(self, others: Sequence[Run], device: torch.device) -> None:
        self.others, self.device, self.start = others, device, math.nan
        self.seconds: list[list[float]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        wait(self.device)
        took = time.perf_counter() - self.start
        if not math.isnan(took):
            self.seconds.append([took, *map(timed, self.others)])
        self.start = time.perf_counter()


def _batch(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([example["input_ids"] for example in examples])
    return {"input_ids": ids, "labels": ids}
