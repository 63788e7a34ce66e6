"""One worker process for each device: deepspeed settles on a kind of accelerator for good."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from shardwright.launchers.machine import facts as machine
from shardwright.train.config import PrecisionConfig
from tests.distributed.pool import Ranks


@pytest.fixture(scope="session")
def rank_on() -> Iterator[Callable[[str], Ranks]]:
    """Return a function from a device to the one rank on it, started once for all tests."""
    pools: dict[str, Ranks] = {}
    yield lambda device: pools.setdefault(device, Ranks(1, may_use_a_gpu=device != "cpu"))
    for pool in pools.values():
        pool.stop()


@pytest.fixture(scope="session")
def skip_where_lacking() -> Callable[[str, PrecisionConfig], None]:
    """Return a function that skips a test where this machine lacks the device or its dtype."""
    here = machine.detect(os.environ)

    def skip(device: str, precision: PrecisionConfig) -> None:
        if problems := machine.lacking(device, 1, precision, here):
            pytest.skip("; ".join(problems))
        if precision.fp8_recipe is not None:
            pytest.importorskip("torchao", reason="precision=fp8 needs the extra torchao")

    return skip
