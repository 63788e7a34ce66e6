"""DeepSpeed's disk operator, compiled beside the tests that come before those that need it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from shardwright.train.strategy.zero import nvme

_PROGRAM = """
from deepspeed.ops.op_builder import AsyncIOBuilder
from shardwright.train.strategy.zero.operators import ready_to_build
ready_to_build("pin_memory", "async_io")
AsyncIOBuilder().load(verbose=False)
"""
_COMPILER = pytest.StashKey[subprocess.Popen[bytes]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the compiler, at the lowest priority: nearly five minutes of a core, the first time."""
    wanted = any("async_io" in getattr(item, "fixturenames", ()) for item in session.items)
    if not wanted or session.config.option.collectonly or not nvme.can_be_built():
        return
    # Left alone at the end: killed, it would leave a lock that the next one waits for.
    session.config.stash[_COMPILER] = subprocess.Popen(
        ["nice", "-n19", sys.executable, "-c", _PROGRAM],
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        cwd=session.config.rootpath,
        stdout=subprocess.DEVNULL,
    )


@pytest.fixture(scope="session")
def async_io(pytestconfig: pytest.Config) -> None:
    """Wait for DeepSpeed's operator, lest ranks time out while they wait for it."""
    compiler = pytestconfig.stash.get(_COMPILER, None)
    if compiler is None:
        pytest.skip("no C++ compiler, or no libaio")
    assert compiler.wait() == 0
