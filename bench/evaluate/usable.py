"""Which exit rules a model can be left by, known before it is trained."""

from __future__ import annotations

import torch

from bench.config import ModelConfig
from bench.evaluate.rules import SignalWatch, all_rules
from bench.evaluate.trace import ORACLES
from bench.model.forms import blank
from bench.model.network import Network
from bench.model.variant import Variant


@torch.no_grad()
def usable_rules(variant: Variant, model: ModelConfig) -> list[str]:
    """The keys of the rules that models of a variant and a shape have; none with a single exit point.

    A model of the same kind, as narrow as can be, is looked at after its first cycle: what a model shows to rules does
    not depend on its width.
    """
    narrow = model.model_copy(update={"d_model": 2 * model.n_heads, "d_ff": 2})
    if variant.schedule(narrow).n_cycles < 2:
        return []
    lm = Network(variant, narrow, 2, 2).eval()
    state, watch = lm.embed(blank(model.form, 1, 2)[0], with_mass=True), SignalWatch(all_rules())
    _, signals = watch.look(lm, state, next(lm.cycles(state)))
    return [*sorted(signals), *ORACLES]
