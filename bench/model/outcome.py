"""What a pass gives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Outcome:
    """What a pass gives.

    Attributes:
        logits: [B, T, V], or those of the last positions that were asked for; [B, 1, V] of what is judged once.
        exit_depth: [B], steps run for each sequence.
        exit_signals: [B, cycles], mean zero attention of each cycle, if it was asked for.
        zero_attention: one [B, H, T] for each step that has zero tokens, in order, if it was asked for.
        exit_logits: one [B, T, V] for every exit point, the last being ``logits``, if they were asked for.
        halting: the chance [B, T] of having halted by every exit point but the last, if anything halts.
        auxiliary_loss: scalar, what the variant's own parts add to the training loss; None if they add nothing.
        shortcut: of a second pass, if it was asked for: its logits [B, T, V], and the mean square of how far its
            states, as the LM head reads them, are from those of the first, through which no gradient flows.
    """

    logits: Tensor
    exit_depth: Tensor
    exit_signals: Tensor | None = None
    zero_attention: tuple[Tensor, ...] | None = None
    exit_logits: tuple[Tensor, ...] | None = None
    halting: tuple[Tensor, ...] | None = None
    auxiliary_loss: Tensor | None = None
    shortcut: tuple[Tensor, Tensor] | None = None
