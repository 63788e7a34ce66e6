"""The shared worker processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.distributed.pool import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """Return a function from a world size to its ranks, started once for all tests."""
    pools: dict[int, Ranks] = {}
    yield lambda world_size: pools.setdefault(world_size, Ranks(world_size))
    for pool in pools.values():
        pool.stop()
