"""What becomes here of a name that another program knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Becomes = Literal["field", "command", "derived", "left out"]


@dataclass(frozen=True)
class Row:
    """A name of another program's, and its answer here."""

    becomes: Becomes
    text: str
    """What to write, for a field or a command; what it follows from; why it is left out."""

    @property
    def advice(self) -> str:
        """What to do about it, to follow the name."""
        match self.becomes:
            case "field" | "command":
                return f"use {self.text}"
            case "derived":
                return f"leave it out: {self.text}"
            case "left out":
                return f"leave it out, it is not included: {self.text}"


def rows(
    *,
    fields: Mapping[str, str],
    commands: Mapping[str, str],
    derived: Mapping[str, str],
    left_out: Mapping[str, str],
) -> dict[str, Row]:
    """Return the rows of a program, sorted by name; a name is in one of the four."""
    kinds: tuple[tuple[Becomes, Mapping[str, str]], ...] = (
        ("field", fields),
        ("command", commands),
        ("derived", derived),
        ("left out", left_out),
    )
    found: dict[str, Row] = {}
    for becomes, texts in kinds:
        for name, text in texts.items():
            assert name not in found, f"{name} has two answers"
            found[name] = Row(becomes, text)
    return dict(sorted(found.items()))
