"""Shards: units of a corpus that are read independently of one another, and lie in its order."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from shardwright.train.data.sources.files.file import Remote
from shardwright.train.data.sources.files.ranges import Range

LEAST_BYTES = 2**24
MOST_BYTES = 2**28
SHARDS = 1024
"""Into about as many a corpus is divided, where that is between the two sizes above."""


class Span(NamedTuple):
    """What a shard has of a file: all of it, or a range."""

    part: int
    """Of the source: whose path it is."""
    path: str
    size_bytes: int
    within: Range | None = None


class Shard(NamedTuple):
    """Some files, or a range of one."""

    spans: tuple[Span, ...]

    @property
    def size_bytes(self) -> int:
        return sum(span.size_bytes for span in self.spans)

    def described(self) -> list[Any]:
        """Return, in plain values, what it reads."""
        return [
            [span.part, span.path, span.size_bytes, list(span.within or ())] for span in self.spans
        ]

    def __str__(self) -> str:
        first = self.spans[0]
        if first.within is not None:
            what = "row groups" if Path(first.path).suffix == ".parquet" else "bytes"
            return f"{first.path}, {what} {first.within.begin:,} to {first.within.end:,}"
        more = f" and {len(self.spans) - 1:,} more" if len(self.spans) > 1 else ""
        return f"{first.path}{more}"


def size_wanted(total_bytes: int) -> int:
    """Return how large the shards of a corpus are to be. Pure.

    It depends on the corpus alone, so that whoever prepares it next finds the same shards.
    """
    return min(max(total_bytes // SHARDS, LEAST_BYTES), MOST_BYTES)


def joined(spans: Iterable[Span], most_bytes: int) -> list[Shard]:
    """Return shards of neighbours that are small; a range of a file is one of its own. Pure."""
    found: list[Shard] = []
    small: list[Span] = []
    size = 0
    for span in spans:
        if small and (span.within is not None or size + span.size_bytes > most_bytes):
            found.append(Shard(tuple(small)))
            small, size = [], 0
        if span.within is not None:
            found.append(Shard((span,)))
        else:
            small.append(span)
            size += span.size_bytes
    return [*found, Shard(tuple(small))] if small else found


def size_of(path: Path | Remote) -> int:
    """Return a file's size in bytes; 0 where it cannot be told, and reading says why."""
    if isinstance(path, Remote):
        return path.size_bytes or 0
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
