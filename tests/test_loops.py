"""Loop diagnostics against a loop whose map is known, and against all eigenvalues of a small one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from records import MANIFEST, RESULTS
from settings import DEFAULT_ID, DEFAULTS, make, shape, tokens

from bench.config import EvalConfig
from bench.data.batches import arrays
from bench.data.task import task_data
from bench.errors import UserError
from bench.evaluate.loops import loop_points
from bench.evaluate.record import ITERATIONS, Examined, examine
from bench.model.language_model import CycleForCausalLM, build_model
from bench.model.variant import get_variant
from bench.store.digests import sealed
from bench.store.loops import divergence
from bench.store.records import LoopPoint
from reports.loops import MEASURED, diverging, state_by_cycle


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


@pytest.mark.parametrize(("name", "family"), [("htc", "llama"), ("ztt", "gpt2")])
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
    def point(cycle: int, *measured: float | None) -> LoopPoint:
        return LoopPoint(cycle=cycle, **dict(zip(MEASURED, measured, strict=True)))

    calm = [point(1, 1.0, 0.5, 0.9), point(2, 1.1, 0.2, 0.8), point(4, 1.2, 0.1, 0.8)]
    assert divergence(calm, 2) is None
    sums = [point(1, 1.0, 1.0, 1.0), point(2, 2.0, 0.5, 1.0), point(4, 4.1, 0.25, 1.0)]  # grows in proportion
    assert divergence(sums, 2) is None
    grown = [*calm[:2], point(4, 3.5, 0.1, 0.8)]
    assert "norm 1.1 -> 3.5" in (divergence(grown, 2) or "")
    assert divergence([*calm[:2], point(4, 1.2, 0.3, 1.1)], 2) is not None
    assert divergence([*calm[:2], point(4, None, None, None)], 2) is not None
    assert divergence(calm[:1], 2) is None


DATA = task_data("p_hop", {"hops": 1, "length": 12, "n_train": 8, "n_valid": 4, "n_test": 8})


def small(name: str, options: dict[str, Any], n_cycles: int = 2) -> CycleForCausalLM:
    variant = get_variant(name, options)
    lm = build_model(variant, shape(variant, "llama", n_cycles=n_cycles), DATA.vocab_size, DATA.length)
    lm.reset_parameters(0)
    return lm


def examined(lm: CycleForCausalLM, **evaluation: Any) -> Examined:
    return examine(lm, DATA, EvalConfig(**evaluation))


def test_what_a_cell_tells_of_its_loop() -> None:
    lm = small("htc", {})
    found = examined(lm, loop_sequences=3)
    assert [point.cycle for point in found.loops] == [1, 2, 3, 4] == [point.cycles for point in found.cycles]
    assert found.loops == loop_points(lm, torch.from_numpy(arrays(DATA.test, 3)[0]), 4, ITERATIONS)
    assert len(examined(lm, max_cycles=3).loops) == 3
    assert examined(lm, loop_sequences=0).loops == []
    assert examined(small("vanilla", {}, 1)).loops == []
    assert examined(small("sequence", {})).loops == []  # its cycles are no loop over one state
    assert len(examined(small("loopformer", {})).loops) == 2  # more cycles would go the same way


def test_numbers_that_are_none_are_refused() -> None:
    lm, ids = small("htc", {}), torch.zeros(1, 4, dtype=torch.long)
    for name in ("n_cycles", "iterations"):
        with pytest.raises(UserError, match=f"^{name}: 0 .allowed: a whole number from 1 on"):
            loop_points(lm, ids, **{name: 0})


def test_a_loop_that_runs_out_of_numbers_loses_no_result() -> None:
    """Beyond the cycles it was trained with, what is not finite is told, and not stored: JSON has no such number."""
    lm = small("recurrent", {"start": "prelude"})
    with torch.no_grad():
        lm.recurrence.mix.weight.copy_(torch.eye(16).repeat(1, 2) * 1e6)
    found = examined(lm, max_cycles=10)
    assert 2 <= len(found.cycles) < 10 == len(found.loops)
    assert found.loops[1].state_norm is not None and found.loops[-1].state_norm is None
    assert "norm" in (divergence(found.loops, 2) or "")
    sealed({"loops": [point.dump() for point in found.loops], "cycles": [point.dump() for point in found.cycles]})


def test_the_report_names_loops_that_diverge() -> None:
    [p_hop, kjv] = diverging(MANIFEST, RESULTS)
    assert p_hop.startswith("p_hop, ztt, 1 of 1 seeds: the loop diverges after 4 cycles, 2 of them trained: norm 25 ->")
    assert p_hop.endswith("(seed 1).") and kjv.startswith("kjv, ztt, 1 of 1 seeds")
    older = {id: r.but(loops=[]) if r.status == "done" else r for id, r in RESULTS.items()}  # as stored before
    assert diverging(MANIFEST, older) == [] and state_by_cycle(MANIFEST, older, MANIFEST.tasks[0]) is None


def test_the_trained_cycles_are_marked() -> None:
    figure = state_by_cycle(MANIFEST, RESULTS, MANIFEST.tasks[0])
    assert figure is not None
    norms = figure.axes[0]
    rings = [line for line in norms.lines if line.get_markersize() == 8]
    assert [list(ring.get_xdata()) for ring in rings] == [[2], [2]]
    curves = {line.get_label(): line for line in norms.lines if not str(line.get_label()).startswith("_")}
    assert curves["htc"].get_ydata() == pytest.approx([1.005] * 4) and list(curves["ztt"].get_xdata()) == [1, 2, 3, 4]
