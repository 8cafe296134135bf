"""The shape of a variant beside a reference: what a study's plan and ``cyclebench profile`` have in common.

Nothing here needs transformers, so that ``profile`` starts without it.
"""

from __future__ import annotations

from bench.config import ModelConfig
from bench.errors import UserError
from bench.model.match import Match, measure, solve
from bench.model.variant import Variant

OF_CYCLES = {"n_cycles": 1, "halting": "none", "kv": "own"}  # what means nothing without cycles, as it is then


def relevant(variant: Variant, model: ModelConfig) -> ModelConfig:
    """Without fields that mean nothing to the variant: they must not make two equal cells look different."""
    return model if variant.cycled else model.model_copy(update=OF_CYCLES)


def matched(
    match: Match,
    label: str,
    variant: Variant,
    model: ModelConfig,
    reference: Variant,
    reference_model: ModelConfig,
    vocab_size: int,
    length: int,
    reference_vocab: int | None = None,
) -> tuple[ModelConfig, str]:
    """The shape nearest to ``model`` that costs what the reference costs, and what was changed.

    Args:
        match: what is held equal.
        label: of the variant, for messages.
        variant: whose shape is found.
        model: its shape as given.
        reference: the variant that it is matched to.
        reference_model: the shape of that one.
        vocab_size: of the data.
        length: tokens of a sequence.
        reference_vocab: of the reference, None: the data's too.

    Raises:
        UserError: one line, if no shape comes near enough.
    """
    target = measure(match, reference, relevant(reference, reference_model), reference_vocab or vocab_size, length)
    try:
        return solve(match, variant, model, target, vocab_size, length)
    except UserError as error:
        raise UserError(f"variants.{label}.{error}") from None
