"""Whether a loop converges: the norm of the state, how much a cycle changes it, and the spectral radius of its map.

A cycle is a map of the state; near a fixed point the state converges if all eigenvalues of the map's Jacobian are
smaller than 1, the largest of which is its spectral radius. It is estimated by power iteration. The iteration takes
products with the transposed Jacobian, whose eigenvalues are the same: they are backward passes, which every kernel
has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.model.network import Network
from bench.model.walk import Walk

GROWN = 2.0  # times the norm after the trained cycles: beyond it a state is none that the coda has learned to read


@dataclass(frozen=True)
class LoopPoint:
    """What a cycle does, as means over the sequences.

    Attributes:
        cycle: 1, 2, ...
        state_norm: of a token's state after it.
        relative_change: ``|h[t] - h[t-1]| / |h[t]|`` of a token's state.
        spectral_radius: of the cycle's map at the state it begins with, estimated. What a recurrence remembers beside
            the state (the slots of ``mesh``) is held, and a cycle that does not read the state has 0.
    """

    cycle: int
    state_norm: float
    relative_change: float
    spectral_radius: float


def loop_points(
    lm: Network, ids: Tensor, n_cycles: int | None = None, iterations: int = 24, seed: int = 0
) -> list[LoopPoint]:
    """One for each cycle of the recurrent part that a model runs on tokens [B, T]; the model is put back as it was.

    Args:
        lm: any model, which is looked at as it is tested.
        ids: the tokens.
        n_cycles: by default twice as many as it was built with.
        iterations: backward passes through each cycle. Where the largest eigenvalues are a complex pair the growth of
            an iteration swings about their size, so that the geometric mean over the second half of them is taken.
        seed: of the vectors that the iteration starts from.
    """
    training, wanted = lm.training, n_cycles or 2 * lm.model_shape.n_cycles
    lm.eval()
    try:
        with torch.no_grad():
            state = lm.embed(ids, n_cycles=wanted)
            lm.start(state)
        found = []
        for number in range(state.schedule.n_cycles):
            radius = _radius(lm, number, state, iterations, seed)
            before = state.hidden
            with torch.no_grad():
                lm.cycle(number, state)
            norm = state.hidden.float().norm(dim=-1)
            change = (state.hidden - before).float().norm(dim=-1) / norm
            found.append(LoopPoint(number + 1, float(norm.mean()), float(change.mean()), radius))
        return found
    finally:
        lm.train(training)


def _radius(lm: Network, number: int, state: Walk, iterations: int, seed: int) -> float:
    """The spectral radius of a cycle's map at a state, which stays as it is."""
    walk = state.branch()
    with torch.enable_grad():
        start = state.hidden.detach().requires_grad_()
        walk.hidden = start
        lm.cycle(number, walk)
    draw = torch.Generator().manual_seed(seed)
    vector = torch.randn(start.shape, generator=draw).to(start)
    growth: list[Tensor] = []
    for _ in range(iterations):
        vector = vector / vector.flatten(1).norm(dim=1).clamp_min(torch.finfo(vector.dtype).tiny).view(-1, 1, 1)
        (vector,) = torch.autograd.grad(walk.hidden, start, vector, retain_graph=True, materialize_grads=True)
        growth.append(vector.flatten(1).norm(dim=1))
    later = torch.stack(growth[iterations // 2 :]).double()
    return float(later.log().mean(0).exp().mean())


def divergence(points: Sequence[LoopPoint], trained: int) -> str | None:
    """What is to be said of a loop that does not hold beyond its trained cycles, in a line; None if it does.

    It does not where the state's norm, after the last cycle, is not finite or ``GROWN`` times that after the trained
    cycles, or where the last cycle changes the state more, relative to it, than the last trained one and the map's
    spectral radius there is above 1.
    """
    last, known = points[-1], points[min(trained, len(points)) - 1]
    grown = not last.state_norm <= GROWN * known.state_norm
    restless = last.relative_change > known.relative_change and last.spectral_radius > 1
    if not grown and not restless:
        return None
    return (
        f"the loop diverges after {last.cycle} cycles, {known.cycle} of them trained: "
        f"norm {known.state_norm:.3g} -> {last.state_norm:.3g}, "
        f"relative change {known.relative_change:.3g} -> {last.relative_change:.3g}, "
        f"spectral radius {last.spectral_radius:.3g}"
    )
