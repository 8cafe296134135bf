"""Rivals of 2025-26 against their published equations, which are stated here on their own, token by token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from plain import embed, logits, run_block
from settings import make, tokens
from torch.nn.functional import layer_norm

from bench.config import Objective
from bench.errors import UserError
from bench.study.load import load_study
from bench.study.schema import Study

T, CYCLES, MIDDLE = 5, 3, (1, 2)  # four blocks: prelude 0, cycled 1 and 2, coda 3


def test_sandwich_norms_are_before_and_after_each_branch() -> None:
    lm, x = make("bc", {}, norm="sandwich"), tokens(2, T)
    hidden = embed(lm, x)
    for block in [0, 1, 2, 3] * CYCLES:
        after = lm.blocks[block].after

        def gives(branch: str, update: torch.Tensor, after: torch.nn.ModuleDict = after) -> torch.Tensor:
            return layer_norm(update, update.shape[-1:], after[branch].weight, after[branch].bias).detach()

        hidden = run_block(lm, block, hidden, gives=gives)
    torch.testing.assert_close(lm(x).logits, logits(lm, hidden))


@pytest.mark.parametrize("n_cycles", [CYCLES, 5])
@pytest.mark.parametrize("scale", ["scalar", "channel"])
def test_each_cycle_has_norms_scales_and_biases_of_its_own(scale: str, n_cycles: int) -> None:
    lm, x = make("per_cycle", {"cycle_scale": scale, "cycle_bias": True}), tokens(2, T)
    own = {name: parameter.detach() for name, parameter in lm.adapter.named_parameters()}
    assert all(len(table) == CYCLES * len(MIDDLE) for table in own.values())
    hidden = run_block(lm, 0, embed(lm, x))
    for cycle in range(n_cycles):
        for place, block in enumerate(MIDDLE):
            row = min(cycle, CYCLES - 1) * len(MIDDLE) + place

            def reads(branch: str, z: torch.Tensor, row: int = row) -> torch.Tensor:
                return (1 + own[f"gain.{branch}"][row]) * z + own[f"shift.{branch}"][row]

            def gives(branch: str, update: torch.Tensor, row: int = row) -> torch.Tensor:
                return own[f"scale.{branch}"][row] * update

            hidden = run_block(lm, block, hidden + own["bias"][row], reads=reads, gives=gives)
    torch.testing.assert_close(lm(x, n_cycles=n_cycles).logits, logits(lm, run_block(lm, 3, hidden)))


def test_what_is_per_cycle_starts_as_head_tail_cycling() -> None:
    lm = make("per_cycle", {"cycle_bias": True}, perturb=False)
    assert torch.equal(lm(tokens()).logits, make("htc", {}, perturb=False)(tokens()).logits)


@pytest.mark.parametrize("n_cycles", [1, CYCLES])
@pytest.mark.parametrize("start", ["noise", "prelude"])
def test_parcae(start: str, n_cycles: int) -> None:
    """h <- exp(-D exp(A)) h + D (B e) with D = softplus(b), and C h before the coda (arXiv 2604.12946)."""
    lm, x = make("recurrent", {"injection": "parcae", "start": start}), tokens(2, T)
    own = {name: parameter.detach() for name, parameter in lm.recurrence.named_parameters()}
    e = layer_norm(run_block(lm, 0, embed(lm, x)), (16,), own["norm.weight"], own["norm.bias"])
    h = torch.zeros_like(e) if start == "noise" else e
    for _ in range(n_cycles):
        given = h.clone()
        for b in range(2):
            for t in range(T):
                for channel in range(16):
                    step = math.log(1 + math.exp(own["step"][channel]))
                    decay = math.exp(-step * math.exp(own["log_rate"][channel]))
                    given[b, t, channel] = decay * h[b, t, channel] + step * (own["into"][channel] @ e[b, t])
        h = run_block(lm, 2, run_block(lm, 1, given))
    torch.testing.assert_close(lm(x, n_cycles=n_cycles).logits, logits(lm, run_block(lm, 3, h @ own["out"].T)))


def test_parcae_starts_with_the_decay_of_its_authors_and_the_prelude_itself() -> None:
    part = make("recurrent", {"injection": "parcae"}, perturb=False).recurrence
    step = torch.nn.functional.softplus(part.step)
    torch.testing.assert_close(torch.exp(-step * part.log_rate.exp()), torch.full((16,), 0.2**0.5))
    assert torch.equal(part.into, torch.eye(16)) and not torch.equal(part.out, torch.eye(16))


def test_noise_at_test_is_that_of_a_position_and_of_the_embeddings_scale() -> None:
    lm, x = make("recurrent", {"start": "noise at test too"}, d_model=64, perturb=False), tokens(3, 12)
    state = lm.embed(x)
    lm.start(state)
    assert state.hidden.std().item() == pytest.approx(lm.tokens.weight.std().item(), rel=0.1)
    assert torch.equal(state.hidden[0], state.hidden[2])
    later = lm.embed(x[:1, :4], position_ids=torch.arange(6, 10)[None])
    lm.start(later)
    assert torch.equal(later.hidden[0], state.hidden[0, 6:10])
    zero = make("recurrent", {}, d_model=64, perturb=False)
    assert not torch.equal(zero(x).logits, lm(x).logits)


@pytest.mark.parametrize("backward", [None, 2])
@pytest.mark.parametrize(
    ("name", "options"),
    [("recurrent", {"injection": "parcae", "start": "prelude"}), ("anchor", {}), ("ztt", {}), ("universal", {})],
    ids=["parcae", "anchor", "ztt", "universal"],
)
def test_each_sequence_runs_its_own_number_of_cycles(name: str, options: dict[str, Any], backward: int | None) -> None:
    """As each of them alone; and its gradient is that of the last cycles, where it is cut."""
    if backward is not None and name in ("ztt", "universal"):
        pytest.skip("refused: nothing would train the prelude, or nothing is before the cycles")
    lm, x, counts = make(name, options).train(), tokens(4, T), torch.tensor([1, 3, 5, 2])
    whole = lm(x, n_cycles=5, sequence_cycles=counts, backward_cycles=backward)
    each = [lm(x[row, None], n_cycles=int(n), backward_cycles=backward) for row, n in enumerate(counts)]
    out, alone = whole.logits, [one.logits[0] for one in each]
    torch.testing.assert_close(out, torch.stack(alone))
    assert torch.equal(whole.exit_depth, torch.cat([one.exit_depth for one in each]))
    losses = [one.auxiliary_loss for one in each if one.auxiliary_loss is not None]
    assert (whole.auxiliary_loss is not None) == bool(losses) == (name == "universal")
    if whole.auxiliary_loss is not None:
        torch.testing.assert_close(whole.auxiliary_loss, torch.stack(losses).mean())
    weight = lm.blocks[1].mlp.up.weight
    found, expected = (torch.autograd.grad(part.square().sum(), weight)[0] for part in (out, torch.stack(alone)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_ouro_is_basic_cycling_with_norms_and_a_gate_unless_the_row_says_otherwise() -> None:
    """Also after it has been written down and read again, as a manifest is."""
    raw = {"name": "s", "question": "?", "tasks": ["p_hop"], "seeds": 1, "model": {"n_blocks": 2, "n_cycles": 2}}
    rows = ["bc", "ouro", {"name": "ouro", "label": "two cycles", "model": {"n_cycles": 2}, "train": {"lr": 0.1}}]
    study = Study.model_validate({**raw, "variants": rows})
    for found in (study, Study.model_validate(study.model_dump(mode="json"))):
        _, ouro, two = found.variants
        shape, training = found.cell_model(ouro, found.tasks[0]), found.cell_train(two, found.tasks[0])
        assert (ouro.name, ouro.label, two.label) == ("bc", "ouro", "two cycles")
        assert (shape.n_cycles, shape.norm, shape.halting) == (4, "sandwich", "gate")
        assert found.cell_model(two, found.tasks[0]).n_cycles == 2
        assert (training.halting_loss, training.lr) == ("gate_cdf", 0.1)


def test_ouro_trains_the_loss_expected_under_its_gate_minus_an_entropy() -> None:
    """sum_t p_t L_t - beta H(p) with p_t = lambda_t prod_{j<t} (1 - lambda_j), the last cycle taking what remains."""
    lm, x, cycles = make("bc", {}, norm="sandwich", halting="gate", n_cycles=4).train(), tokens(2, T), 4
    targets = torch.cat([x[:, 1:], torch.full((2, 1), -100)], 1)
    objective = Objective(halting_loss="gate_cdf", halting_weight=0.05)
    lm.train_for(objective)
    expected, count = torch.zeros(()), 2 * (T - 1)
    state, left = lm.embed(x), torch.ones(2, T)
    for number in lm.cycles(state):
        halts = torch.sigmoid(lm.halting.linear(state.hidden)).squeeze(-1) if number < cycles else torch.ones(2, T)
        p = left * halts
        left = left * (1 - halts)
        predicted = lm.lm_head(lm.read_out(state)).log_softmax(-1)
        for b in range(2):
            for t in range(T - 1):
                expected = expected - p[b, t] * predicted[b, t, targets[b, t]] + 0.05 * p[b, t] * p[b, t].log()
    torch.testing.assert_close(lm(x, labels=x).loss, expected / count)


@pytest.mark.parametrize("n_cycles", [1, CYCLES])
def test_fully_looped(n_cycles: int) -> None:
    """x restarts at norm(embedding); x <- x + Attn(norm h, norm x, norm x), with h the normed end of the last cycle."""
    lm, x = make("fully_looped", {}), tokens(2, T)
    start, h = layer_norm(embed(lm, x), (16,)), None
    for _ in range(n_cycles):
        hidden = start
        for block in range(4):
            hidden = run_block(lm, block, hidden, asks=h)
        h = layer_norm(hidden, (16,))
    torch.testing.assert_close(lm(x, n_cycles=n_cycles).logits, logits(lm, hidden))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("train.cycles_schedule={begin: 1}", r"'begin'.*\(allowed: end, share, start\)"),
        ("train.cycles_schedule.share=0", r"train\.cycles_schedule\.share: .*greater than 0"),
        ("train.optimizer=sgd", r"train\.optimizer: .*'adamw' or 'muon'"),
        ("model.kv=second", r"model\.kv: .*'own', 'first' or 'last'"),
        ("model.norm=post", r"model\.norm: .*'pre' or 'sandwich'"),
    ],
)
def test_what_is_not_known_is_told_in_a_line(change: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_study("quick", [change])
