"""Configuration objects that refuse what they do not know, and how they are read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from bench.errors import from_validation


class Strict(BaseModel):
    """A frozen configuration object that refuses unknown keys, infinities, and truth values where it wants numbers.

    The text ``none`` is None where a field may be that and no other text: as messages write it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = _kinds(cls, str(info.field_name))
        if value == "none" and type(None) in kinds and not kinds & {str, Any, "none"}:
            return None
        off = " or none" if type(None) in kinds else ""
        for inner in _scalars(value) if Any in kinds or kinds & {int, float} else ():
            if isinstance(inner, bool) and not kinds & {bool, Any}:
                raise ValueError(f"must be a number{off}, no truth value")
            if isinstance(inner, float) and not math.isfinite(inner):
                raise ValueError(f"must be a finite number{off}")
        return value


@lru_cache(maxsize=4096)
def _kinds(model: type[BaseModel], field: str) -> frozenset[Any]:
    """The types and the literal values that a field may hold, at any depth of its lists and mappings."""
    return frozenset(_leaves(model.model_fields[field].annotation))


def _leaves(annotation: Any) -> Iterator[Any]:
    inner = get_args(annotation)
    if not inner or get_origin(annotation) is Literal:
        yield from inner or (annotation,)
    else:
        for part in inner[:1] if get_origin(annotation) is Annotated else inner:
            yield from _leaves(part)


def _scalars(value: Any) -> Iterator[Any]:
    """What a value of lists and mappings is made of."""
    waiting, seen = [value], set[int]()
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, dict | list | tuple):
            waiting += () if id(inner) in seen else inner.values() if isinstance(inner, dict) else inner
            seen.add(id(inner))
        else:
            yield inner


Config = TypeVar("Config", bound=BaseModel)


def parse(kind: type[Config], values: Any, where: str) -> Config:
    """Validate ``values`` as ``kind``.

    Raises UserError: one line naming the field, the value and what is allowed, if they do not fit.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise from_validation(where, error, kind.model_fields) from None
