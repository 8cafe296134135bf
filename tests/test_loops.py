"""Loop diagnostics against a loop whose map is known, and against all eigenvalues of a small one."""

from __future__ import annotations

import pytest
import torch
from settings import DEFAULT_ID, DEFAULTS, make, tokens

from bench.evaluate.loops import LoopPoint, divergence, loop_points


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)


def test_a_loop_of_decays_has_the_largest_of_them_as_its_radius() -> None:
    """Blocks that add nothing leave ``h <- a h + b``, with its fixed point and its norms known."""
    lm = make("recurrent", {"injection": "parcae", "start": "prelude"}).double()
    with torch.no_grad():
        for block in lm.blocks:
            for layer in (block.attention.out, block.mlp.out):
                layer.weight.zero_()
                layer.bias.zero_()
        lm.recurrence.log_rate.copy_(torch.linspace(-2, 1, 16))
    part = lm.recurrence
    decay = torch.exp(-torch.nn.functional.softplus(part.step) * part.log_rate.exp()).detach()
    state = lm.embed(tokens())
    lm.start(state)
    h, b = state.hidden.detach(), state.memory["injected"].detach()
    for point in loop_points(lm, tokens(), 5, iterations=150):
        after = decay * h + b
        assert point.spectral_radius == pytest.approx(decay.max().item(), rel=5e-3)
        assert point.state_norm == pytest.approx(after.norm(dim=-1).mean().item(), rel=1e-5)
        change = (after - h).norm(dim=-1) / after.norm(dim=-1)
        assert point.relative_change == pytest.approx(change.mean().item(), rel=1e-5)
        h = after


@pytest.mark.parametrize(("name", "family"), [("bc", "gpt2"), ("htc", "llama"), ("ztt", "gpt2")])
def test_the_radius_is_that_of_all_eigenvalues(name: str, family: str) -> None:
    lm, x = make(name, {}, family).double(), tokens(1, 3)
    points = loop_points(lm, x, 2, iterations=120)
    state = lm.embed(x)
    lm.start(state)
    for number, point in enumerate(points):

        def cycle(hidden: torch.Tensor, number: int = number) -> torch.Tensor:
            walk = state.branch()
            walk.hidden = hidden
            lm.cycle(number, walk)
            return walk.hidden

        jacobian = torch.autograd.functional.jacobian(cycle, state.hidden.detach()).reshape(48, 48)
        assert point.spectral_radius == pytest.approx(torch.linalg.eigvals(jacobian).abs().max().item(), rel=0.05)
        lm.cycle(number, state)


@pytest.mark.parametrize(("name", "options"), DEFAULTS, ids=DEFAULT_ID)
def test_every_variant_has_them_and_stays_as_it_is(name: str, options: dict[str, object]) -> None:
    lm, x = make(name, options).train(), tokens()
    before = {key: value.clone() for key, value in lm.state_dict().items()}
    points = loop_points(lm, x, iterations=2)
    assert [point.cycle for point in points] == list(range(1, lm.schedule_at(2 * lm.model_shape.n_cycles).n_cycles + 1))
    assert all(torch.tensor([p.state_norm, p.relative_change, p.spectral_radius]).isfinite().all() for p in points)
    assert lm.training and all(parameter.grad is None for parameter in lm.parameters())
    assert all(torch.equal(before[key], value) for key, value in lm.state_dict().items())
    assert points == loop_points(lm, x, iterations=2)


def test_divergence_is_told_where_it_is() -> None:
    calm = [LoopPoint(1, 1.0, 0.5, 0.9), LoopPoint(2, 1.1, 0.2, 0.8), LoopPoint(4, 1.2, 0.1, 0.8)]
    assert divergence(calm, 2) is None
    grown = [*calm[:2], LoopPoint(4, 2.5, 0.1, 0.8)]
    assert "norm 1.1 -> 2.5" in (divergence(grown, 2) or "")
    assert divergence([*calm[:2], LoopPoint(4, 1.2, 0.3, 1.1)], 2) is not None
    assert divergence([*calm[:2], LoopPoint(4, float("nan"), 0.1, 0.8)], 2) is not None
    assert divergence(calm[:1], 2) is None
