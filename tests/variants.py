"""Which variants of a test on ranks the default suite takes: the others are `wide`.

A test that starts ranks runs under up to twenty engines, world sizes and dtypes. Each change is
tried under two or three of them, other ones for each test, so that together they have all; CI runs
the others too.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable

import pytest

BEHIND = frozenset(("wide", "slow", "matrix", "gpu", "slurm", "faults", "scale", "bench"))
"""Markers of what the default suite leaves out."""
FEW = 8
"""Of so many variants two are taken, of more three."""
_OF_GPUS = "tests/gpu/"
"""Where tests of a GPU are: those for a CPU rehearse them, and have their like elsewhere."""


def mark(items: Iterable[pytest.Item]) -> None:
    """Mark what the default suite leaves out of the variants of tests that start ranks."""
    variants: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        names = {marker.name for marker in item.iter_markers()}
        if item.nodeid.startswith(_OF_GPUS) and not names & BEHIND:
            item.add_marker(pytest.mark.wide)
            continue
        if "distributed" in names and not names & BEHIND and hasattr(item, "callspec"):
            variants[item.nodeid.partition("[")[0]].append(item)
    for name, found in variants.items():
        taken = by_default(name, len(found))
        for index, item in enumerate(found):
            if index not in taken:
                item.add_marker(pytest.mark.wide)


def by_default(name: str, count: int) -> set[int]:
    """Return which of a test's variants, by their places, the default suite takes. Pure.

    They are evenly apart, from one that follows from the test's name.
    """
    taken = min(count, 2 if count <= FEW else 3)
    begin = zlib.crc32(name.encode())
    return {(begin + count * number // taken) % count for number in range(taken)}
