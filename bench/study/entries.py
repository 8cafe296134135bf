"""The rows of a study's ``tasks`` and ``variants``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from bench.config import Sharing, Strict
from bench.model.named import spelled_out


class Entry(Strict):
    """One row of ``tasks`` or ``variants``; a bare name stands for itself.

    Attributes:
        name: of a variant or a task (``cyclebench list``).
        options: of that variant or task.
        label: how reports call it, its name by default.
        model, train: fields that differ from the study's.
        changes, grid: values to try for dotted keys (``options.gating: [none, scalar]``), one entry for each
            (``bench.study.designs``).
    """

    name: str
    label: str = ""
    options: dict[str, Any] = Field(default_factory=dict)
    model: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)
    changes: dict[str, list[Any]] = Field(default_factory=dict)
    grid: dict[str, list[Any]] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        value = {"name": value} if isinstance(value, str) else value
        if isinstance(value, dict) and not value.get("label"):
            return {**value, "label": value.get("name", "")}
        return value


class TaskEntry(Entry):
    """A task with its options."""


class VariantEntry(Entry):
    """A variant with its options.

    Attributes:
        match: what is held equal to the study's reference variant.
        init: what its models start from, the study's by default.
        sharing: how the blocks of what it starts from are shared among fewer (``bench.pretrained.sharing``).
        budget: ``flops`` trains as long as the reference in training FLOPs instead of in steps.
    """

    match: Literal["params", "flops", "depth"] | None = None
    init: str | None = None
    sharing: Sharing | None = None
    budget: Literal["flops"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        value = {"name": value} if isinstance(value, str) else value
        return spelled_out(value) if isinstance(value, dict) else value


def one_line(text: str) -> str:
    """A text that YAML may have folded, in one line. Raises ValueError for one that is empty or cannot be printed."""
    line = " ".join(text.split())
    if not line or not line.isprintable():
        raise ValueError("must be text that can be printed, and not empty")
    return line


def check_distinct(field: str, entries: Sequence[Entry]) -> None:
    """Raises ValueError if two entries of a list have the same label, or one has a label that is no line of text."""
    labels = [entry.label for entry in entries]
    for label in labels:
        if not label.isprintable() or label != label.strip():
            raise ValueError(f"{field}: label {label!r} must be a line that can be printed, without spaces around it")
    for label, count in Counter(labels).items():
        if count > 1:
            raise ValueError(f"{field}: label {label!r} stands twice; give each entry a label of its own")


def check_reference(reference: str | None, entries: Sequence[VariantEntry]) -> None:
    """Raises ValueError for a reference that is none of the entries, and for none where one is needed."""
    labels = [entry.label for entry in entries]
    if reference is not None and reference not in labels:
        raise ValueError(f"reference = {reference!r} must be one of the variants' labels: {', '.join(labels)}")
    if reference is None and any(entry.match or entry.budget for entry in entries):
        raise ValueError("match needs the study's reference: the label of the variant to match")
