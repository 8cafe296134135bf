"""What ``cyclebench profile`` puts side by side: variants with their options and shapes, matched where asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import Field, field_validator, model_validator

from bench.config import ModelConfig, Strict, parse
from bench.model.variant import Variant, get_variant
from bench.study.designs import expand
from bench.study.entries import VariantEntry, check_distinct, check_reference
from bench.study.overrides import Keys, apply
from bench.study.shapes import matched, relevant


class Profile(Strict):
    """Variants to compare by their costs. reference: the label of the one that the others are matched to."""

    model: ModelConfig = ModelConfig()
    reference: str | None = None
    variants: tuple[VariantEntry, ...] = Field(min_length=1)

    @field_validator("variants")
    @classmethod
    def _designs(cls, value: tuple[VariantEntry, ...]) -> tuple[VariantEntry, ...]:
        return expand(value)

    @model_validator(mode="after")
    def _consistent(self) -> Profile:
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


KEYS = Keys(_below, "model.d_model=256")


def profile_of(variants: Sequence[str], overrides: Sequence[str]) -> Profile:
    """What is to be profiled. Raises UserError, in one line, for whatever is wrong in it."""
    raw: dict[str, Any] = {"variants": list(variants)}
    for override in overrides:
        apply(raw, override, KEYS)
    return parse(Profile, raw, "profile")
