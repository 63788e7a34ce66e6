"""Which CPU cores a rank keeps to, and which its node has for work that all ranks wait for."""

from __future__ import annotations

import os
from collections.abc import Iterable

_before_binding: set[int] | None = None


def usable_cores() -> set[int]:
    """Return the cores that this process may use; all of them where the kernel keeps no list."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def keep_to(cores: Iterable[int]) -> None:
    """Keep this process, and what it starts, to these cores, where the kernel can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def cores_of(cores: Iterable[int], local_index: int, ranks: int) -> set[int]:
    """Return one rank's share of a node's cores, neighbours by number. Pure."""
    ordered = sorted(cores)
    begin, end = (len(ordered) * n // ranks for n in (local_index, local_index + 1))
    return set(ordered[begin:end]) or {ordered[local_index % len(ordered)]}


def bind(local_index: int, ranks: int) -> None:
    """Keep this process, and what it starts, to its share of the cores that it may use."""
    global _before_binding
    _before_binding = usable_cores()
    keep_to(cores_of(_before_binding, local_index, ranks))


def all_cores() -> set[int]:
    """Return the cores that this process may use, or might before it was bound to its share."""
    return _before_binding or usable_cores()
