"""Sharing maps, injected input, added context, memory and low-rank updates against their published equations, which are
stated here on their own: plain loops over tokens, heads, slots and cycles.
"""

from __future__ import annotations

import pytest
import torch
from plain import embed, logits, run_block, run_blocks
from settings import make, shape, tokens

from bench.config import TrainConfig
from bench.errors import UserError
from bench.model.variant import get_variant
from bench.train.depths import draw_cycles

T, CYCLES, MIDDLE = 5, 3, range(1, 3)  # four blocks: prelude 0, cycled 1 and 2, coda 3


def expect(lm: torch.nn.Module, x: torch.Tensor, hidden: torch.Tensor, n_cycles: int = CYCLES) -> None:
    """The model's logits are those of the coda and head on the state after the cycles."""
    torch.testing.assert_close(lm(x, n_cycles=n_cycles).logits, logits(lm, run_block(lm, 3, hidden)))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sequence", [i // 3 for i in range(12)]),
        ("middle_sequence", [0, *(1 + (i - 1) // 3 for i in range(1, 7)), 3]),
        ("bc", [i % 4 for i in range(12)]),
        ("htc", [0, *(1 + (i - 1) % 2 for i in range(1, 7)), 3]),
        ("albert", [0] * 12),
        ("universal", [i % 4 for i in range(12)]),
        ("relaxed", [i % 4 for i in range(12)]),
    ],
)
def test_sharing_maps(name: str, expected: list[int]) -> None:
    variant = get_variant(name)
    assert [step.block for step in variant.schedule(shape(variant, "gpt2")).steps] == expected


def test_plain_blocks_are_the_models() -> None:
    lm, x = make("htc", {}), tokens(2, T)
    hidden = run_block(lm, 0, embed(lm, x))
    for _ in range(CYCLES):
        hidden = run_blocks(lm, MIDDLE, hidden)
    expect(lm, x, hidden)


@pytest.mark.parametrize(
    ("name", "options"),
    [("residual", {}), ("anchor", {}), ("anchor", {"to": "embedding"})],
    ids=["residual", "anchor", "anchor*"],
)
def test_added_context(name: str, options: dict[str, str]) -> None:
    """h[t+1] = f(h[t]) + h_sup with h_sup = h[t], h[0] or the embeddings (arXiv 2510.07739, equation 1)."""
    lm, x = make(name, options), tokens(2, T)
    embedded = embed(lm, x)
    first = state = run_block(lm, 0, embedded)
    for _ in range(CYCLES):
        extra = state if name == "residual" else embedded if options else first
        state = run_blocks(lm, MIDDLE, state) + extra
    expect(lm, x, state)


@pytest.mark.parametrize("start", ["noise", "prelude"])
@pytest.mark.parametrize("injection", ["add", "linear", "gate"])
def test_injection(injection: str, start: str) -> None:
    lm, x = make("recurrent", {"injection": injection, "start": start}), tokens(2, T)
    prelude = run_block(lm, 0, embed(lm, x))
    state = prelude if start == "prelude" else torch.zeros_like(prelude)
    mix = lm.recurrence.mix
    for _ in range(CYCLES):
        given = state.clone()
        for b in range(2):
            for t in range(T):
                s, e = state[b, t], prelude[b, t]
                if injection == "add":
                    given[b, t] = s + e
                else:
                    width = len(s)
                    a = mix.weight.detach()[:, :width] @ s + mix.weight.detach()[:, width:] @ e
                    z = torch.sigmoid(a + mix.bias.detach()) if injection == "gate" else None
                    given[b, t] = a if z is None else z * s + (1 - z) * e
        state = run_blocks(lm, MIDDLE, given)
    expect(lm, x, state)


def test_the_state_starts_from_noise_of_the_embeddings_scale_in_training_only() -> None:
    lm, x = make("recurrent", {}, d_model=64, perturb=False), tokens(64, 12)
    state = lm.train().embed(x)
    lm.walk(lm.schedule.prelude, state)
    lm.recurrence.begin(state)
    assert state.hidden.std().item() == pytest.approx(lm.tokens.weight.std().item(), rel=0.05)
    torch.manual_seed(0)
    first = lm(x).logits
    assert not torch.equal(first, lm(x).logits)
    torch.manual_seed(0)
    assert torch.equal(first, lm(x).logits)


@pytest.mark.parametrize("n_cycles", [1, 3, 5])
@pytest.mark.parametrize("scratch", [0, 2])
def test_mesh(scratch: int, n_cycles: int) -> None:
    """Equations 2 to 5 of arXiv 2510.07739 with a transitional write and read for the prelude."""
    lm, x = make("mesh", {"scratch": scratch}), tokens(2, T)
    embedded, slots = embed(lm, x), CYCLES + 1 + scratch
    memory = [embedded.clone()] + [torch.zeros_like(embedded) for _ in range(slots - 1)]

    def cycle(router: torch.nn.Linear, h: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        weight, bias = router.weight.detach(), router.bias.detach()
        write = (h @ weight[:slots].T + bias[:slots]).softmax(-1)
        read = (h @ weight[slots:].T + bias[slots:]).softmax(-1)
        for s in range(slots):
            memory[s] = memory[s] + output * write[..., s : s + 1]
        return sum((memory[s] * read[..., s : s + 1] for s in range(slots)), torch.zeros_like(h))

    routers = list(lm.recurrence.routers)
    assert len(routers) == CYCLES + 1
    h = cycle(routers[0], embedded, run_block(lm, 0, embedded))
    for number in range(n_cycles):
        h = cycle(routers[min(number + 1, CYCLES)], h, run_blocks(lm, MIDDLE, h))
    expect(lm, x, h, n_cycles)


def test_low_rank_updates_are_merged_weights_of_each_step() -> None:
    """W + B A merged into the block's matrices, step by step, gives the same logits (arXiv 2410.20672)."""
    lm, x = make("relaxed", {"rank": 2}), tokens(2, T)
    plain = {"qkv": "attention.qkv", "attention_out": "attention.out", "mlp_up": "mlp.up", "mlp_out": "mlp.out"}
    hidden, adapter = embed(lm, x), lm.adapter
    for number, step in enumerate(lm.schedule.steps):
        block = lm.blocks[step.block]
        before = {path: block.get_submodule(path).weight.detach().clone() for path in plain.values()}
        for name, path in plain.items():
            update = adapter.b[name][number] @ adapter.a[name][number]
            block.get_submodule(path).weight.data += update.detach()
        hidden = run_block(lm, step.block, hidden)
        for path, weight in before.items():
            block.get_submodule(path).weight.data = weight
    torch.testing.assert_close(lm(x).logits, logits(lm, hidden), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_low_rank_updates_start_at_zero_and_cost_what_their_rank_says(family: str) -> None:
    lm, same = make("relaxed", {"rank": 2}, family, perturb=False), make("bc", {}, family, perturb=False)
    x = tokens(2, T)
    assert torch.equal(lm(x).logits, same(x).logits)
    by_hand = 0
    for name, module in lm.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("blocks."):
            by_hand += CYCLES * 2 * (module.in_features + module.out_features)
    assert sum(p.numel() for p in lm.adapter.parameters()) == by_hand


def test_routed_pool_is_the_softmax_mix_of_its_entries() -> None:
    lm = make("ztt", {"lookup": "routed", "pool_size": 3, "zero_tokens": 2, "value": "learned"})
    pool, size = lm.prefix, lm.model_shape.head_dim
    assert pool.key.shape == (3, 4, 2, size)
    for row, step in enumerate(lm.schedule.recurrent):
        score = torch.stack([pool.query[row] @ pool.address[entry] / size**0.5 for entry in range(3)])
        share = score.exp() / score.exp().sum()
        key, value = pool(step, torch.zeros(1, 1, 16))
        torch.testing.assert_close(key, sum(share[entry] * pool.key[entry] for entry in range(3)))
        torch.testing.assert_close(value, sum(share[entry] * pool.value[entry] for entry in range(3)))


def test_zero_tokens_everywhere_are_in_every_step() -> None:
    lm, x = make("ztt", {"where": "all"}), tokens(2, T)
    assert len(lm(x, output_zero_attention=True).zero_attention) == lm.schedule.depth
    assert len(make("ztt", {})(x, output_zero_attention=True).zero_attention) == len(lm.schedule.recurrent)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lookup": "routed"}, "pool_size = None must be given with lookup = 'routed'"),
        ({"pool_size": 4}, "pool_size = 4 must be given with lookup = 'routed', and only with it"),
        ({"lookup": "routed", "pool_size": 1}, "greater than or equal to 2"),
    ],
)
def test_a_pool_size_without_its_lookup_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        get_variant("ztt", options)


def test_random_cycles_follow_the_shape_where_exits_are_fewer() -> None:
    """A sequence map has one exit point, however often its blocks run."""
    lm = make("sequence", {})
    assert lm.schedule.n_cycles == 1 and lm.model_shape.n_cycles == CYCLES
    drawn = draw_cycles(TrainConfig(steps=5, random_cycles=True), lm.model_shape.n_cycles, 0)
    assert all(lm(tokens(1, T), n_cycles=n).exit_depth.item() == 4 * n for n in drawn if n)


@pytest.mark.parametrize(
    ("name", "options", "reached"),
    [
        ("recurrent", {}, True),
        ("anchor", {}, True),
        ("anchor", {"to": "embedding"}, False),
        ("residual", {}, False),
        ("mesh", {}, False),
    ],
)
def test_only_reinjection_carries_a_gradient_past_a_cut(name: str, options: dict[str, str], reached: bool) -> None:
    """What ``reinjects`` says is what backward finds: whether the prelude is trained when gradients are cut."""
    lm, x = make(name, options).train(), tokens(2, T)
    lm(x, labels=x, backward_cycles=1).loss.backward()
    grad = lm.blocks[0].mlp.up.weight.grad
    assert (grad is not None and bool(grad.any())) == reached == lm.recurrence.reinjects
