"""A gpt2 block word for word, token by token: what tests of published equations apply instead of the engine."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from bench.model.language_model import CycleForCausalLM

Change = Callable[[str, Tensor], Tensor]  # of a branch's name and a vector of it


def unchanged(branch: str, x: Tensor) -> Tensor:
    """x."""
    return x


def weights(lm: CycleForCausalLM, index: int) -> dict[str, Tensor]:
    """The parameters of a block, transposed to multiply row vectors from the right."""
    block = lm.blocks[index]
    return {name: p.detach().T if p.dim() == 2 else p.detach() for name, p in block.named_parameters()}


def run_block(
    lm: CycleForCausalLM,
    index: int,
    hidden: Tensor,
    among: Tensor | None = None,
    scale: float = 1.0,
    reads: Change = unchanged,
    gives: Change = unchanged,
    keys: tuple[Tensor, Tensor] | None = None,
    asks: Tensor | None = None,
) -> Tensor:
    """The block's output for hidden [B, T, D].

    among: [B, T], the tokens that are there at all (the rest stay); scale: what both updates are multiplied by; reads,
    gives: what is made of what a branch reads, and of its update; keys: keys and values [B, T, D] in place of its own;
    asks: [B, T, D], of which queries are made in place of hidden.
    """
    w, n_heads = weights(lm, index), lm.model_shape.n_heads
    width = hidden.shape[-1]
    size = width // n_heads
    out = hidden.clone()
    for b in range(len(hidden)):
        there = [t for t in range(hidden.shape[1]) if among is None or among[b, t]]
        x = reads("attention", layer_norm(hidden[b], (width,), w["norm1.weight"], w["norm1.bias"]))
        q, k, v = (x @ w["attention.qkv.weight"] + w["attention.qkv.bias"]).chunk(3, -1)
        if asks is not None:
            normed = layer_norm(asks[b], (width,), w["norm1.weight"], w["norm1.bias"])
            q = (normed @ w["attention.qkv.weight"] + w["attention.qkv.bias"]).chunk(3, -1)[0]
        if keys is not None:
            k, v = keys[0][b], keys[1][b]
        for t in there:
            mixed = torch.zeros(width)
            for head in range(n_heads):
                part = slice(head * size, (head + 1) * size)
                past = [j for j in there if j <= t]
                score = torch.stack([q[t, part] @ k[j, part] / math.sqrt(size) for j in past])
                for weight, j in zip(score.softmax(0), past, strict=True):
                    mixed[part] += weight * v[j, part]
            update = gives("attention", mixed @ w["attention.out.weight"] + w["attention.out.bias"])
            after = hidden[b, t] + scale * update
            y = reads("mlp", layer_norm(after, (width,), w["norm2.weight"], w["norm2.bias"]))
            inner = gelu(y @ w["mlp.up.weight"] + w["mlp.up.bias"], approximate="tanh")
            out[b, t] = after + scale * gives("mlp", inner @ w["mlp.out.weight"] + w["mlp.out.bias"])
    return out


def keys_and_values(lm: CycleForCausalLM, index: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The block's keys and values [B, T, D] for hidden [B, T, D]."""
    w = weights(lm, index)
    x = layer_norm(hidden, hidden.shape[-1:], w["norm1.weight"], w["norm1.bias"])
    _, key, value = (x @ w["attention.qkv.weight"] + w["attention.qkv.bias"]).chunk(3, -1)
    return key, value


def run_blocks(lm: CycleForCausalLM, indices: range, hidden: Tensor, among: Tensor | None = None) -> Tensor:
    """Several blocks after one another."""
    for index in indices:
        hidden = run_block(lm, index, hidden, among)
    return hidden


def embed(lm: CycleForCausalLM, x: Tensor) -> Tensor:
    """Embedded tokens [B, T, D]."""
    return (lm.tokens.weight[x] + lm.positions.weight[: x.shape[1]]).detach()


def logits(lm: CycleForCausalLM, hidden: Tensor) -> Tensor:
    """Final norm and tied head."""
    normed = layer_norm(hidden, hidden.shape[-1:], lm.norm.weight, lm.norm.bias)
    return (normed @ lm.tokens.weight.T).detach()
