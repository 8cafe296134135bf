"""What a task's sequences are to a model: what stands at a place, who sees whom, and what is judged."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from bench.strict import Strict


class Form(Strict):
    """The form of a task's sequences. The task tells it; by default it is that of text.

    Attributes:
        features: numbers of the vector at each place (a patch of a picture, a frame of speech), which a linear layer
            brings to the model's width; None: a token of a vocabulary, which is looked up.
        patch: the vectors are squares of so many pixels on a side, cut from a picture row by row.
        attention: with ``causal`` a place sees itself and those before it, with ``full`` the whole sequence.
        judged: every place for itself (``tokens``), or the sequence once, by the ``mean`` of its states or by its
            ``last`` state (that of a class token, which is put there).
        padded: sequences may be shorter than the longest. They are followed by vectors that are not a number, which are
            never seen and count for nothing.
    """

    features: int | None = Field(None, ge=1, le=1 << 16)
    patch: int | None = Field(None, ge=1, le=1 << 10)
    attention: Literal["causal", "full"] = "causal"
    judged: Literal["tokens", "mean", "last"] = "tokens"
    padded: bool = False

    @model_validator(mode="after")
    def _of_vectors(self) -> Form:
        for field in ("patch", "padded"):
            if self.features is None and getattr(self, field):
                raise ValueError(f"{field} = {getattr(self, field)!r} needs features: tokens have none")
        return self

    def places(self, length: int) -> int:
        """How many places of a sequence of ``length`` are judged."""
        return length if self.judged == "tokens" else 1


TEXT = Form()
