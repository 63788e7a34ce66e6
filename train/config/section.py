"""What all sections of the config have in common, and the types of their numbers."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from shardwright.train.errors import UserError

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# YAML has lists, frozen sections need tuples.
Strings = Annotated[tuple[str, ...], Field(strict=False)]
Floats = Annotated[tuple[PositiveFloat, ...], Field(strict=False)]


class Section(BaseModel):
    """A frozen part of the config that refuses unknown keys and wrong types."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, serialize_by_alias=True, defer_build=True
    )


def shown(value: Any) -> str:
    """Return a value as it would be typed, cut to what fits a message."""
    text = str(value) if isinstance(value, str) else json.dumps(value, default=str)
    text = text if text and text.isprintable() else repr(text)
    return text if len(text) <= 60 else f"{text[:57]}..."


def unresolved(key: str, value: str = "a number", *, left: str = "auto") -> UserError:
    """Return the error for a config.yaml that was written by hand and leaves a value open."""
    return UserError(
        f"{key}={left} is replaced by `shardwright train` before it writes config.yaml, but this "
        f"config did not go through it; write {value} for {key}"
    )
