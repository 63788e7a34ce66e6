"""A table as text: what is left out and shortened where the terminal is narrow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shardwright.train.console import cells

NOTHING = "-"
"""A cell that has no value."""
GAP = "  "


@dataclass(frozen=True)
class Column:
    """A name and what stands below it."""

    name: str
    cells: tuple[str, ...]
    is_text: bool = False
    """Text begins at the left, a number ends at the right."""
    least: int | None = None
    """It may be shortened to this many characters; None where it may not."""
    keeps_end: bool = False
    """Of a path that is shortened the end is kept, which tells it from others."""
    rank: int | None = None
    """Where the terminal is narrow, the column of the lowest rank goes first; None never goes."""

    @property
    def width(self) -> int:
        return max(map(cells.width, [self.name, *self.cells]))

    @property
    def least_width(self) -> int:
        return self.width if self.least is None else min(self.width, self.least)

    @property
    def is_empty(self) -> bool:
        return set(self.cells) <= {NOTHING}


def table(columns: Iterable[Column], width: int | None = None) -> list[str]:
    """Return the lines of a table, its head first, at most ``width`` characters wide. Pure.

    Only what has neither a rank nor a least width can make it wider.
    """
    kept = list(columns) if width is None else _fitted(list(columns), width)
    widths = [column.width for column in kept]
    return [
        GAP.join(
            cells.padded(cell, wide, to_the_left=column.is_text)
            for cell, wide, column in zip(line, widths, kept, strict=True)
        ).rstrip()
        for line in zip(*([column.name, *column.cells] for column in kept), strict=True)
    ]


def _fitted(columns: Sequence[Column], width: int) -> list[Column]:
    """Return the columns that fit, shortened where they have to be. Pure.

    Those that hold nothing go before any is shortened, and others once that is not enough.
    """
    kept = list(columns)

    def excess(widths: Iterable[int]) -> int:
        return sum(widths) + len(GAP) * (len(kept) - 1) - width

    dispensable = sorted((c for c in kept if c.rank is not None), key=lambda c: c.rank or 0)
    for column in dispensable:
        if column.is_empty and excess(c.width for c in kept) > 0:
            kept.remove(column)
    for column in dispensable:
        if column in kept and excess(c.least_width for c in kept) > 0:
            kept.remove(column)
    room = -excess(c.least_width for c in kept)
    fitted = []
    for column in kept:
        given = min(column.width, column.least_width + max(0, room))
        room -= given - column.least_width
        fitted.append(_shortened(column, given) if given < column.width else column)
    return fitted


def _shortened(column: Column, width: int) -> Column:
    short = (cells.cut(cell, width, keeps_end=column.keeps_end) for cell in column.cells)
    return replace(column, name=cells.cut(column.name, width), cells=tuple(short))


def seen_from(here: Path, path: Path) -> str:
    """Return a path as it is written in a directory: relative where it lies below it. Pure."""
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
