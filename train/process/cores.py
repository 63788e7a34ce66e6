"""Which CPU cores a rank keeps to, and which its node has for work that all ranks wait for."""

from __future__ import annotations

import os
from collections.abc import Iterable

_before_binding: set[int] | None = None


def cores_of(cores: Iterable[int], local_index: int, ranks: int) -> set[int]:
    """Return one rank's share of a node's cores, neighbours by number. Pure."""
    ordered = sorted(cores)
    begin, end = (len(ordered) * n // ranks for n in (local_index, local_index + 1))
    return set(ordered[begin:end]) or {ordered[local_index % len(ordered)]}


def bind(local_index: int, ranks: int) -> None:
    """Keep this process, and what it starts, to its share of the cores that it may use."""
    global _before_binding
    _before_binding = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores_of(_before_binding, local_index, ranks))


def all_cores() -> set[int]:
    """Return the cores that this process may use, or might before it was bound to its share."""
    return _before_binding or os.sched_getaffinity(0)
