"""How rotary positions are stretched."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from bench.strict import Strict

Ratio = Annotated[float, Field(ge=1e-6, le=1e6)]


class RopeScaling(Strict):
    """How rotary positions are stretched beyond the length a model was trained at; the names are transformers'.

    linear: every frequency over ``factor``; llama3: only low frequencies (Llama 3.1); yarn: Peng et al. 2023, arXiv
    2309.00071. Fields that a type does not know are refused by transformers' own check when the table is made.

    Attributes:
        rope_type: how.
        factor: by which positions are stretched.
        original_max_position_embeddings: the length, in tokens, that the model was trained at.
        low_freq_factor, high_freq_factor: of llama3, the ends of the frequencies between which it blends.
        attention_factor: of yarn, what attention is multiplied by; None: from the factor.
        beta_fast, beta_slow: of yarn, the ends of its ramp between scaled and unscaled frequencies, in rotations.
        mscale, mscale_all_dim: of yarn, from which the attention factor may be computed.
        truncate: of yarn, whether the ends of the ramp are rounded to whole dimensions.
    """

    rope_type: Literal["linear", "llama3", "yarn"]
    factor: float = Field(ge=1.0, le=1e6)
    original_max_position_embeddings: int | None = Field(None, ge=1, le=1 << 40)
    low_freq_factor: Ratio | None = None
    high_freq_factor: Ratio | None = None
    attention_factor: Ratio | None = None
    beta_fast: Ratio | None = None
    beta_slow: Ratio | None = None
    mscale: float | None = Field(None, ge=0.0, le=1e6)
    mscale_all_dim: float | None = Field(None, ge=0.0, le=1e6)
    truncate: bool | None = None

    @model_validator(mode="after")
    def _complete(self) -> RopeScaling:
        needed = {
            "linear": (),
            "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
            "yarn": ("original_max_position_embeddings",),
        }
        for field in needed[self.rope_type]:
            if getattr(self, field) is None:
                raise ValueError(f"rope_type {self.rope_type!r} needs {field}")
        return self
