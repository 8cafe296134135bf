"""First-cycle keys behind a gate against their published equations, and the contract where the window is short."""

from __future__ import annotations

import math

import pytest
import test_contract as contract
import test_execute_tokens as by_token
import test_generation as generation
import torch
from plain import embed, keys_and_values, logits, run_block, weights
from settings import LENGTH, make, tokens
from torch.nn.functional import gelu, layer_norm

from bench.exits.execute import execute
from bench.model.costs import cache_bytes
from bench.model.language_model import CycleForCausalLM

WINDOW, CYCLES = 4, 3
NAME, OPTIONS = "gated_kv", {"window": WINDOW}
families = pytest.mark.parametrize("family", ["gpt2", "llama"])


def look(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, past: range) -> torch.Tensor:
    """One head's attention of a query to the tokens of the past."""
    score = torch.stack([q @ k[j] / math.sqrt(len(q)) for j in past]).softmax(0)
    return torch.stack([p * v[j] for p, j in zip(score, past, strict=True)]).sum(0)


def later(
    lm: CycleForCausalLM, block: int, hidden: torch.Tensor, first: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """A block in a later cycle, token by token."""
    w, out = weights(lm, block), hidden.clone()
    for b in range(len(hidden)):
        x = layer_norm(hidden[b], (16,), w["norm1.weight"], w["norm1.bias"])
        q, k, v = (x @ w["attention.qkv.weight"] + w["attention.qkv.bias"]).chunk(3, -1)
        for t in range(len(x)):
            heads = []
            for head in range(4):
                part = slice(4 * head, 4 * head + 4)
                score = lm.adapter.weight[block, head] @ q[t, part] + lm.adapter.bias[block, head]
                g = 1 / (1 + math.exp(-score))
                far = look(q[t, part], first[0][b][:, part], first[1][b][:, part], range(t + 1))
                near = look(q[t, part], k[:, part], v[:, part], range(max(0, t - WINDOW + 1), t + 1))
                heads.append(g * far + (1 - g) * near)
            after = hidden[b, t] + torch.cat(heads) @ w["attention.out.weight"] + w["attention.out.bias"]
            y = layer_norm(after, (16,), w["norm2.weight"], w["norm2.bias"])
            inner = gelu(y @ w["mlp.up.weight"] + w["mlp.up.bias"], approximate="tanh")
            out[b, t] = after + inner @ w["mlp.out.weight"] + w["mlp.out.bias"]
    return out


@torch.no_grad()
@pytest.mark.parametrize("n_cycles", [1, CYCLES])
def test_gated_keys_of_the_first_cycle(n_cycles: int) -> None:
    lm, x = make(NAME, OPTIONS), tokens(2, 7)
    hidden, made = embed(lm, x), {}
    for cycle in range(n_cycles):
        for block in range(4):
            if cycle == 0:
                made[block] = keys_and_values(lm, block, hidden)
                hidden = run_block(lm, block, hidden)
            else:
                hidden = later(lm, block, hidden, made[block])
    torch.testing.assert_close(lm(x, n_cycles=n_cycles).logits, logits(lm, hidden))


def test_the_gate_starts_at_one_half() -> None:
    lm = make(NAME, {}, perturb=False)
    assert lm.variant.options.window == 64 and not lm.adapter.weight.any() and not lm.adapter.bias.any()


@families
def test_a_short_window_keeps_the_contract(family: str) -> None:
    contract.test_causality(NAME, OPTIONS, family)
    contract.test_gradients_reach_every_parameter(NAME, OPTIONS, family)
    contract.test_flops_equal_the_counter_to_the_last_one(NAME, OPTIONS, family)
    contract.test_cached_greedy_decoding_equals_decoding_without_cache(NAME, OPTIONS, family)
    contract.test_leaving_at_an_exit_point_is_the_model_with_fewer_cycles(NAME, OPTIONS, family)
    contract.test_more_cycles_than_it_was_built_with(NAME, OPTIONS, family)
    contract.test_left_padding_changes_nothing(NAME, OPTIONS, family)
    contract.test_kv_bytes_are_those_of_the_cache(NAME, OPTIONS, family)


@families
def test_a_short_window_keeps_the_contract_of_exits(family: str) -> None:
    generation.test_recompute_is_generation_without_a_cache(NAME, OPTIONS, family)
    by_token.test_it_is_generation_that_propagates_what_left(NAME, OPTIONS, family)
    lm, (ids, targets) = make(NAME, OPTIONS, family).double(), by_token.data()
    for granularity in ("sequence", "token"):
        done = execute(lm, ids, targets, "latent_diff", -torch.inf, granularity=granularity)  # type: ignore[arg-type]
        whole = execute(lm, ids, targets, None)
        assert done.loss == pytest.approx(whole.loss, rel=1e-6)


def test_the_cache_holds_one_cycle_and_windows() -> None:
    lm, length = make(NAME, OPTIONS), 60
    cache = lm(tokens(1, length), use_cache=True).past_key_values
    kept = [layer.keys.shape[2] for layer in cache.layers]
    assert kept == [length] * 4 + [WINDOW - 1] * 8
    one = cache_bytes(make("vanilla", {}), length)
    assert one < cache_bytes(lm, length) == one + 8 * (WINDOW - 1) * 2 * 16 * 4
    assert cache_bytes(make("bc", {}), length) == CYCLES * one


def test_generation_in_steps_of_several_tokens_is_one_pass() -> None:
    lm, x = make(NAME, OPTIONS, "llama").double(), tokens(2, LENGTH)
    whole, cache, parts = lm(x).logits, None, []
    for start, stop in ((0, 3), (3, 4), (4, 9), (9, LENGTH)):
        out = lm(x[:, start:stop], past_key_values=cache, use_cache=True)
        cache, parts = out.past_key_values, [*parts, out.logits]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_packed_documents_see_nothing_of_each_other() -> None:
    lm, x = make(NAME, OPTIONS, "llama").double(), tokens(2, LENGTH)
    positions = torch.cat([torch.arange(7), torch.arange(LENGTH - 7)]).expand(2, -1)
    alone = torch.cat([lm(x[:, :7]).logits, lm(x[:, 7:]).logits], 1)
    torch.testing.assert_close(lm(x, position_ids=positions).logits, alone)
