"""How a loop behaves: the norm of the state, how much a cycle changes it, and the spectral radius of a cycle's map.

A cycle is a map of the state; near a fixed point the state converges if all eigenvalues of the map's Jacobian are
smaller than 1, the largest of which is its spectral radius. It is estimated by power iteration. The iteration takes
products with the transposed Jacobian, whose eigenvalues are the same: they are backward passes, which every kernel
has.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bench.model.inputs import check_whole
from bench.model.network import Network
from bench.model.walk import Walk
from bench.store.records import LoopPoint


def loop_points(
    lm: Network, ids: Tensor, n_cycles: int | None = None, iterations: int = 24, seed: int = 0
) -> list[LoopPoint]:
    """One for each cycle of the recurrent part that a model runs on tokens [B, T], or vectors [B, T, F]; the model is
    put back as it was.

    What a recurrence remembers beside the state (the slots of ``mesh``) is held while the spectral radius is estimated,
    and a cycle that does not read the state has 0.

    Args:
        lm: any model, which is looked at as it is tested.
        ids: the tokens.
        n_cycles: by default twice as many as it was built with.
        iterations: backward passes through each cycle. Where the largest eigenvalues are a complex pair the growth of
            an iteration swings about their size, so that the geometric mean over the second half of them is taken.
        seed: of the vectors that the iteration starts from.

    Raises:
        InputError: for a number of cycles or iterations that is none.
    """
    check_whole("n_cycles", n_cycles, 1)
    check_whole("iterations", iterations, 1)
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
            seen = slice(None) if state.real is None else state.real != 0
            measured = {
                "state_norm": norm[seen].mean(),
                "relative_change": change[seen].mean(),
                "spectral_radius": radius,
            }
            finite = {name: float(value) if math.isfinite(value) else None for name, value in measured.items()}
            found.append(LoopPoint(cycle=number + 1, **finite))
        return found
    finally:
        lm.train(training)


def _radius(lm: Network, number: int, state: Walk, iterations: int, seed: int) -> float:
    """The spectral radius of a cycle's map at a state, which stays as it is: mean over the sequences."""
    walk = state.branch()
    with torch.enable_grad():
        start = state.hidden.detach().requires_grad_()
        walk.hidden = start
        lm.cycle(number, walk)
    draw = torch.Generator().manual_seed(seed)
    vector = torch.randn(start.shape, generator=draw).to(start)
    growth: list[Tensor] = []
    for _ in range(iterations):
        if state.real is not None:  # the states of padding are nobody's
            vector = vector * state.real.unsqueeze(-1)
        vector = vector / vector.flatten(1).norm(dim=1).clamp_min(torch.finfo(vector.dtype).tiny).view(-1, 1, 1)
        (vector,) = torch.autograd.grad(walk.hidden, start, vector, retain_graph=True, materialize_grads=True)
        growth.append(vector.flatten(1).norm(dim=1))
    later = torch.stack(growth[iterations // 2 :]).double()
    return float(later.log().mean(0).exp().mean())
