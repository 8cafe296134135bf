"""``cyclebench profile``: what variants cost side by side, matched where asked for. Nothing here needs transformers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from pydantic import Field, field_validator, model_validator

from bench.config import ModelConfig, Strict, parse
from bench.errors import UserError, contained, shown
from bench.model.costs import Costs, costs
from bench.model.match import Match
from bench.model.schedule import Schedule
from bench.model.variant import Variant, get_variant
from bench.study.designs import expand
from bench.study.entries import VariantEntry, check_distinct, check_reference
from bench.study.overrides import Keys, apply_override
from bench.study.shapes import matched, relevant

MOST = 1 << 24  # tokens of a sequence, and of a vocabulary: sizes of tensors are then still numbers of 64 bits


@dataclass(frozen=True)
class Profiled:
    """A variant and what it costs. match, chosen: what is held equal to the reference, and what was changed for it."""

    label: str
    model: ModelConfig
    schedule: Schedule
    costs: Costs
    match: Match | None
    chosen: str


class Comparison(Strict):
    """Variants to be profiled. reference: the label of the one that the others are matched to."""

    model: ModelConfig = ModelConfig()
    reference: str | None = None
    variants: tuple[VariantEntry, ...] = Field(min_length=1)

    @field_validator("variants")
    @classmethod
    def _designs(cls, value: tuple[VariantEntry, ...]) -> tuple[VariantEntry, ...]:
        return expand(value)

    @model_validator(mode="after")
    def _consistent(self) -> Comparison:
        check_distinct("variants", self.variants)
        check_reference(self.reference, self.variants)
        return self

    def shape(self, entry: VariantEntry, vocab_size: int, length: int) -> tuple[Variant, ModelConfig, str]:
        """An entry's variant, its shape, and what the matching chose ('' without matching)."""
        variant, given = self._given(entry)
        model = relevant(variant, given)
        if entry.match is None:
            return variant, model, ""
        reference = self._given(next(other for other in self.variants if other.label == self.reference))
        return variant, *matched(entry.match, entry.label, variant, model, *reference, vocab_size, length)

    def _given(self, entry: VariantEntry) -> tuple[Variant, ModelConfig]:
        fields = {**self.model.model_dump(), **entry.model}
        return get_variant(entry.name, entry.options), parse(ModelConfig, fields, f"variants.{entry.label}.model")


def _below(parents: Sequence[str]) -> Iterable[str] | None:
    match list(parents):
        case []:
            return ("model", "reference")
        case ["model"] | ["variants", _, "model"]:
            return ModelConfig.model_fields
        case ["variants", _]:
            return ("label", "options", "model", "match", "changes", "grid")
        case _:
            return None


_KEYS = Keys(_below, "model.d_model=256")


def comparison(variants: Sequence[str], overrides: Sequence[str]) -> Comparison:
    """What is to be profiled. Raises UserError, in one line, for whatever is wrong in it."""
    raw: dict[str, Any] = {"variants": list(variants)}
    for override in overrides:
        apply_override(raw, override, _KEYS)
    return parse(Comparison, raw, "profile")


def profile(
    variants: Sequence[str], set: Sequence[str] = (), length: int = 256, vocab_size: int = 256
) -> list[Profiled]:
    """Parameters, FLOPs and memory of variants, without training anything.

    Args:
        variants: their names.
        set: overrides, ``["model.d_model=256", "reference=htc", "variants.ztt.match=flops"]``.
        length: tokens of a sequence.
        vocab_size: of the vocabulary.

    Raises:
        UserError: one line that says what is wrong.
    """
    if isinstance(variants, str):
        raise UserError(f"variants: {variants!r} (allowed: a list of names, [{variants!r}])")
    for field, value in (("length", length), ("vocab_size", vocab_size)):
        if isinstance(value, bool) or not isinstance(value, Integral) or not 2 <= value <= MOST:
            raise UserError(f"{field}: {shown(value)} must be from 2 to {MOST:,}, a whole number")
    asked = comparison(variants, set)
    found = []
    for entry in asked.variants:
        with contained(entry.label):
            variant, model, chosen = asked.shape(entry, vocab_size, length)
            cost = costs(variant, model, vocab_size, length)
        found.append(Profiled(entry.label, model, variant.schedule(model), cost, entry.match, chosen))
    return found
