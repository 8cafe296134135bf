"""Mixture-of-Recursions against its formulas, stated token by token, and its masks against running on fewer tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain import embed, logits, run_block, run_blocks
from settings import FAMILIES, make, tokens
from torch.nn.functional import binary_cross_entropy
from transformers.cache_utils import DynamicCache

from bench.errors import UserError
from bench.evaluate.evaluation import by_cycles, depth_flops, evaluate
from bench.evaluate.rules import get_rule
from bench.exits.execute import execute
from bench.model.costs import pass_flops
from bench.model.counter import counted_flops
from bench.model.language_model import CycleForCausalLM
from bench.model.variant import get_variant
from bench.run.verify import record_difference
from bench.store.store import Store

T, CYCLES, MIDDLE = 6, 3, range(1, 3)


def routed(routing: str, family: str = "gpt2", **options: Any) -> CycleForCausalLM:
    """A model whose routers do not see what all tokens have in common, so that they tell tokens apart."""
    lm = make("mor", {"routing": routing, **options}, family)
    with torch.no_grad():
        state = lm.embed(tokens(3, 9))
        common = lm.walk(lm.schedule.prelude, state).hidden.mean((0, 1))
        for module in lm.recurrence.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight -= torch.outer(module.weight @ common, common) / common.square().sum()
    return lm


@pytest.mark.parametrize(
    ("training", "options"), [(True, {}), (False, {}), (False, {"tested": "top"}), (True, {"z_loss": 0.01})]
)
def test_expert_choice(training: bool, options: dict[str, Any]) -> None:
    """x += g f(x) for the nested top k (in training, or where the top ones are tested too), or for those whose sigmoid
    exceeds 1/2; z-loss: squared logits of all candidates.
    """
    lm, x = routed("expert", **options).train(training), tokens(2, T, seed=3)
    hidden = run_block(lm, 0, embed(lm, x))
    inside = torch.ones(x.shape, dtype=torch.bool)
    lost = torch.zeros(())
    for cycle in range(CYCLES):
        weight = lm.recurrence.routers[cycle].weight.detach()[0]
        logit = hidden @ weight
        score = torch.sigmoid(logit)
        chosen = torch.zeros_like(inside)
        for b in range(2):
            candidates = [t for t in range(T) if inside[b, t]]
            if training or options:
                k = [6, 4, 2][cycle]
                candidates.sort(key=lambda t: -score[b, t].item())
                chosen[b, candidates[:k]] = True
            else:
                chosen[b] = inside[b] & (score[b] > 0.5)
        lost = lost + 0.001 * binary_cross_entropy(score[inside], chosen[inside].float())
        lost = lost + options.get("z_loss", 0.0) * logit[inside].square().mean()
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


@pytest.mark.parametrize(("training", "z_loss"), [(True, 0.0), (False, 0.0), (True, 1e-5), (True, 1.0)])
@pytest.mark.parametrize("n_cycles", [2, 3, 5])
def test_token_choice(n_cycles: int, training: bool, z_loss: float) -> None:
    """x + p_d f^d(x) with d the argmax of the softmax; balance loss 0.1 sum_i P_i f_i, f_i = N x share of tokens;
    z-loss: squared log of the softmax's denominator.
    """
    lm, x = routed("token", z_loss=z_loss).train(training), tokens(2, T)
    start = run_block(lm, 0, embed(lm, x))
    raw = start @ lm.recurrence.router.weight.detach().T
    chances = torch.softmax(raw, -1)
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
        denominator = raw.exp().sum(-1).log().square().mean()
        torch.testing.assert_close(out.auxiliary_loss, 0.1 * balance + z_loss * denominator)
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
    assert pass_flops(lm, 60).forward < 0.75 * pass_flops(full, 60).forward
    dense = pass_flops(make("mor", {"routing": "token"}), 60).forward
    assert dense == pass_flops(full, 60).forward + 2 * 60 * 16 * CYCLES


N, LONG = 5, 30
routings = pytest.mark.parametrize("routing", ["expert", "token"])


def counts(lm: CycleForCausalLM, x: torch.Tensor) -> list[int]:
    """Tokens of a sequence in each cycle, from the flags and depths of a run in a batch."""
    state, found = lm.embed(x), []
    for number in lm.cycles(state):
        flags = state.memory["in"] if "in" in state.memory else state.memory["cycles"] >= number
        found.append(int(flags[0].sum()))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", ["expert", "token", "none"])
@pytest.mark.long
def test_flops_of_a_test_are_those_of_the_tokens_that_are_in(case: str, family: str) -> None:
    """As PyTorch counts them where a sequence is run alone, which gives what it gives in a batch."""
    lm = routed("token" if case == "token" else "expert", family)
    if case == "none":  # no logit is above 0
        for router in lm.recurrence.routers:
            torch.nn.init.zeros_(router.weight)
    x = tokens(N, LONG)
    trace = evaluate(lm, x.numpy(), x.numpy(), rules=[get_rule("fixed"), get_rule("confidence")])
    together = lm(x).logits
    assert trace.ran is not None and trace.ran.shape == trace.flops["fixed"].shape == (N, CYCLES)
    for row in range(N):
        one = x[row : row + 1]
        assert trace.ran[row].tolist() == counts(lm, x[[row, row]])
        alone = lambda n_cycles=None, one=one: lm(one, n_cycles=n_cycles)  # noqa: E731
        torch.testing.assert_close(alone().logits, together[row : row + 1], rtol=1e-4, atol=1e-5)
        for cycles in (1, 2, 3):
            counted = counted_flops(lambda cycles=cycles, alone=alone: alone(cycles))
            assert counted == LONG * trace.flops["fixed"][row, cycles - 1]
    if case == "none":
        assert not trace.ran.any()
    else:
        assert len(np.unique(trace.ran, axis=0)) > 2, "the case tells sequences apart"
    # A rule that reads logits pays for the head at every exit point, whatever the tokens.
    output = np.rint(LONG * (trace.flops["confidence"] - trace.flops["fixed"]))
    assert (output == output[0]).all() and output[0, 2] == 2 * output[0, 1] > 0 == output[0, 0]


@routings
def test_executed_exits_agree_with_the_trace(routing: str) -> None:
    """At the bit: every sequence leaves with its own FLOPs."""
    lm, x, rule = routed(routing), tokens(12, LONG), get_rule("latent_diff")
    goal = tokens(12, LONG, seed=1).numpy()
    trace = evaluate(lm, x.numpy(), goal, rules=[rule, get_rule("fixed")])
    signal = np.sort(trace.signals[rule.key][:, :-1].ravel())
    for threshold in (signal[0] - 1, *signal[[4, 12, 18]], signal[-1] + 1):
        found = execute(lm, x.numpy(), goal, rule.key, float(threshold), batch=5)
        left = trace.leave(rule.key, float(threshold))
        assert found.cycle.tolist() == left.tolist()
        assert found.flops.tolist() == (LONG * trace.flops[rule.name][np.arange(12), left - 1]).tolist()
        score = trace.score(rule.key, float(threshold))
        assert score["flops_per_token"] == pytest.approx(found.flops.mean() / LONG, rel=1e-12)
    curve = trace.curve(rule.key)
    assert curve["flops_per_token"][[0, -1]] == pytest.approx(trace.mean_flops()[[0, -1]], rel=1e-12)
    for key in ("oracle", "oracle.loss"):
        assert np.isfinite(trace.curve(key)["flops_per_token"]).all()


@routings
def test_scores_by_cycles_cost_what_they_ran_on(routing: str) -> None:
    lm, x = routed(routing), tokens(N, LONG).numpy()
    _, found = by_cycles(lm, x, x, 5)
    for entry in found:
        trace = evaluate(lm, x, x, n_cycles=entry["cycles"])
        assert entry["flops_per_token"] == depth_flops(lm, LONG, entry["cycles"], trace.ran)
    assert [entry["flops_per_token"] for entry in found] == sorted(entry["flops_per_token"] for entry in found)


def test_the_top_ones_cost_in_a_test_what_they_cost_in_training() -> None:
    lm, x = routed("expert", tested="top"), tokens(N, LONG)
    trace = evaluate(lm, x.numpy(), x.numpy(), rules=[get_rule("fixed")])
    assert trace.ran is None and lm.variant.looks_ahead
    assert N * LONG * trace.flops["fixed"][-1] == counted_flops(lambda: lm(x)) == N * pass_flops(lm, LONG).forward
    with pytest.raises(UserError, match="tested = 'top' needs routing = 'expert'"):
        get_variant("mor", {"tested": "top", "routing": "token"})


def test_a_result_says_what_its_flops_are_of(tmp_path: Path) -> None:
    from test_prepared import cell

    from bench.run.going import run_cell

    one = cell().model_copy(update={"variant": "mor", "options": {"routing": "token"}})
    record = run_cell(one, Store(tmp_path))
    ran, exits = record.ran, record.exits
    assert ran is not None and ran[0] == 1.0 > ran[1] > 0 and exits is not None
    assert exits.points[-1].flops_per_token == record.costs.forward_flops_per_token == record.cycles[1].flops_per_token
    assert max(exits.rules["fixed"].curve["flops_per_token"]) == pytest.approx(record.costs.forward_flops_per_token)
    older = record.but(ran=None, costs=record.costs.but(forward_flops_per_token=1.0))
    assert record_difference(record, older) == "" == record_difference(record, record)
    assert "metrics" in record_difference(older, record.but(metrics={**record.metrics, "test_loss": 0.0}))


@pytest.mark.parametrize("routing", ["expert", "token"])
def test_low_rank_updates_are_those_of_the_cycle(routing: str) -> None:
    """At one cycle, W + B A of that cycle merged into the shared matrices gives the same; FLOPs are those counted."""
    lm, x = make("mor", {"routing": routing, "lora_rank": 2}), tokens(2, T)
    assert lm.adapter is not None and all(len(a) == CYCLES * len(MIDDLE) for a in lm.adapter.a.values())
    expected, plain = lm(x, n_cycles=1).logits, make("mor", {"routing": routing})
    plain.load_state_dict({name: value for name, value in lm.state_dict().items() if not name.startswith("adapter")})
    assert not torch.allclose(plain(x, n_cycles=1).logits, expected, atol=1e-3)
    names = {"qkv": "attention.qkv", "attention_out": "attention.out", "mlp_up": "mlp.up", "mlp_out": "mlp.out"}
    for row, block in enumerate(MIDDLE):
        for name, path in names.items():
            update = lm.adapter.b[name][row] @ lm.adapter.a[name][row]
            plain.blocks[block].get_submodule(path).weight.data += update.detach()
    torch.testing.assert_close(plain(x, n_cycles=1).logits, expected, rtol=1e-4, atol=1e-4)
    ids, targets = tokens(3, 9).numpy(), tokens(3, 9, seed=1).numpy()
    done = execute(lm, ids[:1], targets[:1], None)
    assert done.flops[0] == counted_flops(lambda: lm(torch.from_numpy(ids[:1])))


@routings
@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_that_the_variant_chooses_do_not_leave_one_by_one(routing: str, batch: int) -> None:
    lm, x = routed(routing), tokens(batch, LONG).numpy()
    with pytest.raises(UserError, match=r"--granularity: 'mor' chooses the tokens of a cycle by itself"):
        execute(lm, x, x, "confidence", 0.99, granularity="token")
