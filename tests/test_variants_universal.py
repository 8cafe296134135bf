"""The Universal Transformer against its equations and Graves' adaptive computation time, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from plain import embed, logits, run_blocks
from settings import make, tokens

from bench.model.language_model import CycleForCausalLM
from bench.model.walk import Walk

T, CYCLES, BLOCKS = 5, 3, range(4)


def coordinates(cycle: int, width: int, scale: float) -> torch.Tensor:
    """Equations 6 and 7 of arXiv 1807.03819, positions from 0 and time from 1: [T, D]."""
    table = torch.zeros(T, width)
    for i in range(T):
        for j in range(0, width, 2):
            rate = 10000 ** (j / width)
            table[i, j] = math.sin(i / rate) + math.sin(cycle / rate)
            table[i, j + 1] = math.cos(i / rate) + math.cos(cycle / rate)
    return scale * table


def by_hand(
    lm: CycleForCausalLM, x: torch.Tensor, n_cycles: int, epsilon: float
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Mean-field state [B, T, D] (Graves 2016, equations 5 to 13), halting CDF after each cycle, N + R by token."""
    state = embed(lm, x)
    width = state.shape[-1]
    w, bias = lm.recurrence.halt.weight.detach()[0], lm.recurrence.halt.bias.detach()
    done = torch.zeros(x.shape, dtype=torch.bool)
    spent, output, ponder = torch.zeros(x.shape), torch.zeros_like(state), torch.zeros(x.shape)
    cdf = []
    for n in range(1, n_cycles + 1):
        given = torch.where(done[..., None], state, state + coordinates(n, width, (2 / (5 * width)) ** 0.5))
        new = run_blocks_of_all(lm, given, done)
        for b in range(len(x)):
            for t in range(T):
                if done[b, t]:
                    continue
                state[b, t] = new[b, t]
                p = torch.sigmoid(w @ state[b, t] + bias).item()
                if spent[b, t] + p >= 1 - epsilon or n == n_cycles:
                    remainder = 1 - spent[b, t]
                    output[b, t] += remainder * state[b, t]
                    ponder[b, t] = n + remainder
                    done[b, t] = spent[b, t] + p >= 1 - epsilon
                else:
                    output[b, t] += p * state[b, t]
                spent[b, t] = 1.0 if done[b, t] else spent[b, t] + p
        cdf.append(spent.clone())
    return output, cdf, ponder


def run_blocks_of_all(lm: CycleForCausalLM, hidden: torch.Tensor, done: torch.Tensor) -> torch.Tensor:
    """All tokens serve keys and values in every block; those that are done keep their state block by block."""
    for index in BLOCKS:
        hidden = torch.where(done[..., None], hidden, run_blocks(lm, range(index, index + 1), hidden))
    return hidden


def slow(bias: float = -0.5) -> CycleForCausalLM:
    """A model some of whose tokens halt early, others late, others never."""
    lm = make("universal", {"epsilon": 0.1})
    lm.recurrence.halt.bias.data.fill_(bias)
    lm.recurrence.halt.weight.data.mul_(3)
    return lm


@pytest.mark.parametrize("n_cycles", [1, 3, 5])
def test_output_halting_and_cost(n_cycles: int) -> None:
    lm, x = slow().train(), tokens(3, T)
    expected, cdf, ponder = by_hand(lm, x, n_cycles, 0.1)
    state: Walk = lm.embed(x, n_cycles=n_cycles)
    for number in lm.cycles(state):
        torch.testing.assert_close(state.memory["halting"], cdf[number - 1])
    torch.testing.assert_close(lm.recurrence.output(state), expected, rtol=1e-4, atol=1e-5)
    out = lm(x, n_cycles=n_cycles)
    torch.testing.assert_close(out.logits, logits(lm, expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.auxiliary_loss, 0.01 * ponder.mean())
    assert lm.eval()(x).auxiliary_loss is None


def test_the_case_has_tokens_that_halt_at_every_time() -> None:
    _, cdf, _ = by_hand(slow(), tokens(3, T), CYCLES, 0.1)
    halted = torch.stack(cdf) == 1
    assert (halted[0].any(), halted[1].any() and not halted[1].all(), halted[2].all()) == (True, True, False)


def test_weights_are_a_distribution() -> None:
    """On equal states the mean-field state is that state, whenever each token halts."""
    lm, x = slow(), tokens(3, T)
    lm.adapter = None
    same = torch.randn(1, 1, 16).expand(3, T, 16)
    state = lm.embed(x)
    lm.recurrence.begin(state)
    for cycle in range(CYCLES):
        state.hidden = same + 0
        lm.recurrence.leave(cycle, state)
    torch.testing.assert_close(lm.recurrence.output(state), same + 0)


def test_cost_pushes_towards_halting_early() -> None:
    """The ponder cost's gradient raises the halting bias: more probability early, a smaller remainder."""
    lm = slow(bias=-1.5).train()
    lm(tokens(3, T)).auxiliary_loss.backward()
    assert lm.recurrence.halt.bias.grad.item() < 0


def test_without_embedding_and_halting_it_is_basic_cycling() -> None:
    lm, plain, x = make("universal", {"embedding": "none", "halting": False}), make("bc", {}), tokens(2, T)
    assert torch.equal(lm(x).logits, plain(x).logits)


def test_learned_embedding_is_added_before_every_cycle() -> None:
    lm, x = make("universal", {"embedding": "learned", "halting": False}), tokens(2, T)
    hidden = embed(lm, x)
    for cycle in range(CYCLES):
        hidden = run_blocks(lm, BLOCKS, hidden + lm.recurrence.embedding.cycle[cycle].detach())
    torch.testing.assert_close(lm(x).logits, logits(lm, hidden), rtol=1e-4, atol=1e-5)
