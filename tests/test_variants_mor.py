"""Mixture-of-Recursions against its formulas, stated token by token, and its masks against running on fewer tokens."""

from __future__ import annotations

import pytest
import torch
from plain import embed, logits, run_block, run_blocks
from settings import FAMILIES, make, tokens
from torch.nn.functional import binary_cross_entropy
from transformers.cache_utils import DynamicCache

from bench.model.costs import pass_flops
from bench.model.language_model import CycleForCausalLM

T, CYCLES, MIDDLE = 6, 3, range(1, 3)


def routed(routing: str, family: str = "gpt2") -> CycleForCausalLM:
    """A model whose routers do not see what all tokens have in common, so that they tell tokens apart."""
    lm = make("mor", {"routing": routing}, family)
    with torch.no_grad():
        state = lm.embed(tokens(3, 9))
        common = lm.walk(lm.schedule.prelude, state).hidden.mean((0, 1))
        for module in lm.recurrence.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight -= torch.outer(module.weight @ common, common) / common.square().sum()
    return lm


@pytest.mark.parametrize("training", [True, False])
def test_expert_choice(training: bool) -> None:
    """x += g f(x) for the nested top k (training), or for those whose sigmoid exceeds 1/2."""
    lm, x = routed("expert").train(training), tokens(2, T, seed=3)
    hidden = run_block(lm, 0, embed(lm, x))
    inside = torch.ones(x.shape, dtype=torch.bool)
    lost = torch.zeros(())
    for cycle in range(CYCLES):
        weight = lm.recurrence.routers[cycle].weight.detach()[0]
        score = torch.sigmoid(hidden @ weight)
        chosen = torch.zeros_like(inside)
        for b in range(2):
            candidates = [t for t in range(T) if inside[b, t]]
            if training:
                k = [6, 4, 2][cycle]
                candidates.sort(key=lambda t: -score[b, t].item())
                chosen[b, candidates[:k]] = True
            else:
                chosen[b] = inside[b] & (score[b] > 0.5)
        lost = lost + 0.001 * binary_cross_entropy(score[inside], chosen[inside].float())
        update = run_blocks(lm, MIDDLE, hidden, chosen)
        hidden = torch.where(chosen[..., None], hidden + 0.1 * score[..., None] * update, hidden)
        inside = chosen
    out = lm(x)
    torch.testing.assert_close(out.logits, logits(lm, run_block(lm, 3, hidden)), rtol=1e-4, atol=1e-5)
    if training:
        torch.testing.assert_close(out.auxiliary_loss, lost)
    else:
        assert out.auxiliary_loss is None
        assert inside.any() and not inside.all()  # the case tells tokens apart


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("n_cycles", [2, 3, 5])
def test_token_choice(n_cycles: int, training: bool) -> None:
    """x + p_d f^d(x) with d the argmax of the softmax; balance loss 0.1 sum_i P_i f_i, f_i = N x share of tokens."""
    lm, x = routed("token").train(training), tokens(2, T)
    start = run_block(lm, 0, embed(lm, x))
    chances = torch.softmax(start @ lm.recurrence.router.weight.detach().T, -1)
    depth = chances.argmax(-1) + 1
    state = start
    for cycle in range(min(n_cycles, CYCLES)):
        inside = depth > cycle
        state = torch.where(inside[..., None], run_blocks(lm, MIDDLE, state, inside), state)
    hidden = start + chances.max(-1).values[..., None] * state
    out = lm(x, n_cycles=n_cycles)
    torch.testing.assert_close(out.logits, logits(lm, run_block(lm, 3, hidden)), rtol=1e-4, atol=1e-5)
    assert len(depth.unique()) == CYCLES  # the case tells tokens apart
    if training:
        balance = sum(chances[..., i].mean() * CYCLES * (depth == i + 1).float().mean() for i in range(CYCLES))
        torch.testing.assert_close(out.auxiliary_loss, 0.1 * balance)
    else:
        assert out.auxiliary_loss is None


@pytest.mark.parametrize("family", FAMILIES)
def test_running_on_some_tokens_is_masking_the_others(family: str) -> None:
    """Context.at and Context.seeing give the chosen tokens the same states, positions and padding included."""
    lm, x = make("htc", {}, family), tokens(2, T)
    padding = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    index = torch.tensor([[1, 3, 4], [0, 3, 5]])
    chosen = torch.zeros(2, T, dtype=torch.bool).scatter(1, index, True)
    few, masked = lm.embed(x, padding), lm.embed(x, padding)
    rows = index.unsqueeze(-1).expand(-1, -1, 16)
    few.hidden, few.context = few.hidden.gather(1, rows), few.context.at(index)
    masked.context, masked.active = masked.context.seeing(chosen), chosen
    before = masked.hidden
    steps = lm.schedule.cycles[0]
    after = lm.walk(steps, masked).hidden
    torch.testing.assert_close(lm.walk(steps, few).hidden, after.gather(1, rows))
    assert torch.equal(after[~chosen], before[~chosen])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("routing", ["expert", "token"])
def test_cached_decoding_remembers_who_was_in_a_cycle(routing: str, family: str) -> None:
    """Token by token, in pieces and at once the logits are the same."""
    lm, x = routed(routing, family), tokens(3, 9)
    whole = lm(x).logits
    for sizes in ([1] * 9, [4, 1, 4], [9]):
        cache, found = DynamicCache(config=lm.config), []
        for piece in x.split(sizes, 1):
            found.append(lm(piece, cache=cache).logits)
        torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 6, 7, 12])
def test_nominal_tokens_of_each_cycle(length: int) -> None:
    lm = make("mor", {}, perturb=False).train()
    assert [lm.recurrence.tokens(c, length) for c in range(5)] == [
        max(1, length * left // CYCLES) for left in (3, 2, 1, 1, 1)
    ]
    assert lm(tokens(2, length), n_cycles=5).logits.isfinite().all()


def test_expert_choice_saves_what_the_tokens_left_out_would_cost() -> None:
    lm, full = make("mor", {}), make("htc", {})
    assert pass_flops(lm, 60, "cpu").forward < 0.75 * pass_flops(full, 60, "cpu").forward
    dense = pass_flops(make("mor", {"routing": "token"}), 60, "cpu").forward
    assert dense == pass_flops(full, 60, "cpu").forward + 2 * 60 * 16 * CYCLES
