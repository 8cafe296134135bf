"""The transformer block in its two families: gpt2 (LayerNorm, learned positions, GELU) and llama (RMSNorm, rotary,
SwiGLU, grouped-query attention).
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu

from bench.config import ModelConfig
from bench.model import keys
from bench.model.attention import Prefix
from bench.model.context import Rotation
from bench.model.flops import Flops
from bench.model.kernels import Linear as FastLinear
from bench.model.kernels import RMSNorm, attention_heads, gelu_tanh, linear, rotate, split_heads, swiglu
from bench.model.parts import Adapter, AttentionPrefix, Branch, Gate, Linear
from bench.model.schedule import Step
from bench.model.walk import Walk

if TYPE_CHECKING:
    from transformers import LlamaConfig


class Attention(nn.Module):
    """Multi-head causal self-attention; queries, keys and values come from one matrix."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.model = model
        self.n_heads, self.kv_heads, self.head_dim = model.n_heads, model.kv_heads, model.head_dim
        self.dropout = model.dropout
        bias = model.family == "gpt2"
        self.qkv = FastLinear(model.d_model, (self.n_heads + 2 * self.kv_heads) * self.head_dim, bias=bias)
        self.out = FastLinear(model.d_model, model.d_model, bias=bias)

    def forward(
        self,
        x: Tensor,
        asks: Tensor | None,
        step: Step,
        state: Walk,
        prefix: Prefix | None,
        gate: Gate | None,
        adapter: Adapter | None,
        with_mass: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Update [B, T, D] and the attention on the prefix [B, H, T] or None, from the normed input x [B, T, D].

        asks: the same for the queries, None where they read x too.
        """
        batch, length, width = x.shape
        context = state.context
        query, key, value = self._heads(x, asks, step, state, adapter)
        mask = context.mask if prefix is None else context.prefix_mask
        drop = self.dropout if self.training else 0.0
        mixes = adapter is not None and adapter.looks_back(step)
        window = adapter.window if adapter is not None and mixes else None
        out, mass = context.attend(query, key, value, prefix, mask, with_mass, drop, window)
        if adapter is not None and mixes:
            far, _ = context.far(query, *keys.first(state, step), None, context.mask, False, drop)
            out = torch.lerp(out, far, adapter.first_share(step, query).unsqueeze(-1).to(out.dtype))
        factors = gate.heads(step, x) if gate is not None else None
        if factors is not None:
            out = out * factors.view(-1, 1, 1)
        mixed = out.transpose(1, 2).reshape(batch, length, width)
        return apply(self.out, "attention_out", mixed, step, adapter), mass

    def _heads(
        self, x: Tensor, asks: Tensor | None, step: Step, state: Walk, adapter: Adapter | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, T, d], keys and values [B, H_kv, S, d], those of the cache included."""
        model, context, queries = self.model, state.context, self.n_heads * self.head_dim
        cache, at = context.cache, keys.slot(model, state.schedule, step)
        borrows = keys.borrows(model, step)
        if asks is None and not borrows:
            joined = apply(self.qkv, "qkv", x, step, adapter)
            query, key, value = attention_heads(joined, self.n_heads, self.kv_heads, context.rotation)
        else:
            query = self._rows(x if asks is None else asks, step, adapter, 0, queries)
            query = query if context.rotation is None else rotate(query, *context.rotation)
            if borrows:
                return query, *keys.first(state, step)
            key, value = self.keys_and_values(x, step, state, adapter)
        if cache is None:
            read = model.kv == "first" or (adapter is not None and adapter.window is not None)
            if read and step.cycle == 0 and step.block in state.schedule.repeated:
                state.memory[keys.name_of(step)] = keys.packed(key, value)
        elif at < step.depth:
            key, value = keys.replaced(cache, at, key, value, context.total)
        else:  # a static cache returns all the room it has
            key, value = (found[:, :, : context.total] for found in cache.update(key, value, at))
        return query, key, value

    def keys_and_values(self, x: Tensor, step: Step, state: Walk, adapter: Adapter | None) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H_kv, T, d] alone, from the normed input x [B, T, D]."""
        if keys.borrows(self.model, step):
            return keys.unpacked(state.memory[keys.name_of(step)])
        key, value = self._rows(x, step, adapter, self.n_heads * self.head_dim, None).chunk(2, 1)
        return key if state.context.rotation is None else rotate(key, *state.context.rotation), value

    def _rows(self, x: Tensor, step: Step, adapter: Adapter | None, first: int, stop: int | None) -> Tensor:
        """Heads [B, H, T, d] that rows of the matrix of queries, keys and values give."""
        if type(self.qkv) is FastLinear:
            bias = self.qkv.bias
            out = linear(x, self.qkv.weight[first:stop], None if bias is None else bias[first:stop])
        else:  # a wrapper that adds to it (PEFT)
            out = self.qkv(x)[..., first:stop]
        delta = adapter.delta(step, "qkv", x) if adapter is not None and "qkv" in adapter.linears else None
        return split_heads(out if delta is None else out + delta[..., first:stop], self.head_dim)


class GeluMLP(nn.Module):
    """D -> d_ff -> D with GELU, by default in its tanh form, as in GPT-2."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.activation = gelu_tanh if model.activation == "gelu_tanh" else gelu
        self.up = FastLinear(model.d_model, model.ff)
        self.out = FastLinear(model.ff, model.d_model)

    def forward(self, x: Tensor, step: Step, adapter: Adapter | None) -> Tensor:
        inner = self.activation(apply(self.up, "mlp_up", x, step, adapter))
        return apply(self.out, "mlp_out", inner, step, adapter)


class SwigluMLP(nn.Module):
    """D -> d_ff -> D gated by SiLU, without biases, as in Llama; gate and up projections come from one matrix."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.up = FastLinear(model.d_model, 2 * model.ff, bias=False)
        self.out = FastLinear(model.ff, model.d_model, bias=False)

    def forward(self, x: Tensor, step: Step, adapter: Adapter | None) -> Tensor:
        inner = swiglu(apply(self.up, "mlp_up", x, step, adapter))
        return apply(self.out, "mlp_out", inner, step, adapter)


def apply(layer: nn.Linear, name: Linear, x: Tensor, step: Step, adapter: Adapter | None) -> Tensor:
    """A linear layer's output [B, T, out] with what the adapter adds to it at the step."""
    out = layer(x)
    if adapter is None or name not in adapter.linears:
        return out
    delta = adapter.delta(step, name, x)
    return out if delta is None else out + delta


def make_norm(model: ModelConfig) -> nn.Module:
    """The family's normalisation over the last dimension."""
    kind = nn.LayerNorm if model.family == "gpt2" else RMSNorm
    return kind(model.d_model, eps=model.norm_eps)


class Block(nn.Module):
    """Attention and MLP, each on the normed stream, with another norm of its update where the model's ``norm`` is
    ``sandwich``.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.model = model
        self.norm1 = make_norm(model)
        self.attention = Attention(model)
        self.norm2 = make_norm(model)
        self.mlp: GeluMLP | SwigluMLP = GeluMLP(model) if model.family == "gpt2" else SwigluMLP(model)
        norms = {branch: make_norm(model) for branch in ("attention", "mlp")} if model.norm == "sandwich" else None
        self.after = None if norms is None else nn.ModuleDict(norms)

    def forward(
        self,
        step: Step,
        state: Walk,
        prefixes: AttentionPrefix | None = None,
        adapter: Adapter | None = None,
        gate: Gate | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """The residual stream [B, T, D] after a step on the state, which also gets the step's zero attention.

        prefixes, adapter: of the model; gate: of the step, None where it is not gated; scale: of its updates.
        """
        hidden = state.hidden if adapter is None else adapter(step, state.hidden, state.embedded)
        x = self.normed(step, "attention", hidden, state, adapter)
        prefix = prefixes(step, x) if prefixes is not None else None
        reads = gate is not None and gate.reads_zero_attention
        with_mass = prefix is not None and (state.context.with_mass or reads)
        asks = adapter.asks(step, state) if adapter is not None else None
        if asks is not None:
            asks = self.normed(step, "attention", asks, state, adapter)
        update, mass = self.attention(x, asks, step, state, prefix, gate, adapter, with_mass)
        if mass is not None:
            state.zero_attention[step.depth] = mass
            mass = mass if reads else None  # as in training, whoever looks on
        hidden = self._merged(step, "attention", hidden, update, mass, state, adapter, gate, scale)
        update = self.mlp(self.normed(step, "mlp", hidden, state, adapter), step, adapter)
        return self._merged(step, "mlp", hidden, update, mass, state, adapter, gate, scale)

    def normed(self, step: Step, branch: Branch, hidden: Tensor, state: Walk, adapter: Adapter | None) -> Tensor:
        """What a branch reads of the residual stream, both [B, T, D]."""
        x: Tensor = self.norm1(hidden) if branch == "attention" else self.norm2(hidden)
        return x if adapter is None else adapter.normed(step, branch, x, state)

    def _merged(
        self,
        step: Step,
        branch: Branch,
        hidden: Tensor,
        update: Tensor,
        mass: Tensor | None,
        state: Walk,
        adapter: Adapter | None,
        gate: Gate | None,
        scale: float | None,
    ) -> Tensor:
        """The residual stream with a branch's update, all [B, T, D]."""
        if self.after is not None:
            update = self.after[branch](update)
        update = dropout(update, self.model.dropout, self.training)
        if adapter is not None:
            update = adapter.scaled(step, branch, update, state)
        if scale is not None:
            update = update * scale
        return hidden + update if gate is None else gate.merge(step, branch, hidden, update, mass)

    def flops(self, step: Step, length: int) -> Flops:
        """Forward FLOPs of the block's matrices at a step, for one sequence of ``length`` tokens; attention is counted
        apart.
        """
        model = self.model
        d, kv = model.d_model, 0 if keys.borrows(model, step) else model.kv_heads * model.head_dim
        ups = 1 if model.family == "gpt2" else 2
        return Flops(2 * length * (d * (d + 2 * kv) + d * d + (ups + 1) * d * model.ff))


def rotation(positions: Tensor, model: ModelConfig, dtype: torch.dtype) -> Rotation:
    """Cosines and sines [B, 1, T, d] of the rotary embedding at positions [B, T] (Su et al. 2021, half-split form)."""
    frequency, scale = frequencies(model, positions.device)
    angle = (positions[:, None, :, None].float() * frequency).repeat(1, 1, 1, 2)
    return (angle.cos() * scale).to(dtype), (angle.sin() * scale).to(dtype)


def frequencies(model: ModelConfig, device: torch.device) -> tuple[Tensor, float]:
    """Frequencies [d / 2] of the rotary embedding and the factor its cosines and sines get.

    What a kind of scaling does to them is transformers' own (``modeling_rope_utils``): checkpoints mean exactly that.
    """
    if model.rope_scaling is not None:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # start-up

        return ROPE_INIT_FUNCTIONS[model.rope_scaling.rope_type](_rope_config(model), device)
    half = torch.arange(0, model.head_dim, 2, device=device, dtype=torch.float32)
    return 1.0 / model.rope_theta ** (half / model.head_dim), 1.0


@lru_cache(maxsize=8)
def _rope_config(model: ModelConfig) -> LlamaConfig:
    from transformers import LlamaConfig  # start-up

    sizes: dict[str, Any] = {
        "hidden_size": model.d_model,
        "num_attention_heads": model.n_heads,
        "head_dim": model.head_dim,
    }
    scaling = model.rope_scaling.model_dump(exclude_none=True) if model.rope_scaling else {}
    if "original_max_position_embeddings" in scaling:  # not used, but warned of where it does not agree
        sizes["max_position_embeddings"] = int(scaling["factor"] * scaling["original_max_position_embeddings"])
    return LlamaConfig(**sizes, rope_parameters={**scaling, "rope_theta": model.rope_theta})
