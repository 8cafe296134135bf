"""Leaving early where sequences are scored, by whoever calls the model: each leaves by its pooled signal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from bench.evaluate.rules import get_rule
from bench.exits.execute import leaving
from bench.exits.generation import EarlyExit
from bench.exits.tokens import upload
from bench.model.configuration import CycleOutput
from bench.model.language_model import CycleModel


@dataclass(frozen=True)
class WholeExit(EarlyExit):
    """How a model leaves early when it scores: without a cache a sequence leaves as the trace says, by the signal of
    all of its tokens; with one, in generation, as ``EarlyExit`` does.
    """

    _rows: Iterator[int] = field(default_factory=count)  # of the sequences so far: a random rule draws for each

    @torch.no_grad()
    def forward(
        self,
        lm: CycleModel,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        use_cache: bool,
        logits_to_keep: int,
        n_cycles: int | None,
    ) -> CycleOutput:
        """One pass over tokens [B, T]; see ``EarlyExit.forward``."""
        if cache is not None or use_cache:
            return super().forward(
                lm, input_ids, attention_mask, position_ids, cache, use_cache, logits_to_keep, n_cycles
            )
        state = lm.embed(input_ids, attention_mask, position_ids, n_cycles=n_cycles)
        rows = upload(np.array([next(self._rows) for _ in input_ids]), input_ids.device)
        order, parts, cycles = list[int](), list[Tensor](), list[int]()
        for gone in leaving(lm, state, rows, get_rule(self.rule), self.threshold):
            order += gone.at.tolist()
            parts.append(gone.logits[:, -logits_to_keep:])
            cycles += [gone.number] * len(gone.at)
        back = upload(np.argsort(order), input_ids.device)
        depth = np.array([state.schedule.depths[number - 1] for number in cycles])
        return CycleOutput(logits=torch.cat(parts)[back], exit_depth=upload(depth, input_ids.device)[back], cache=None)
