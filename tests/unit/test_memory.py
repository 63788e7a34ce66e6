"""Whether a process keeps the memory that it has freed, for what it allocates next."""

from __future__ import annotations

import subprocess
import sys

import pytest

from shardwright.train.process.memory import keep_what_is_freed

_FAULTS = """
import resource, sys
from shardwright.train.process.memory import keep_what_is_freed

if sys.argv[1] == "keep":
    assert keep_what_is_freed({})

def use():
    blocks = [bytes([1]) * size for size in (100 << 20, 7 << 20, 40 << 20)]
    return sum(len(block) for block in blocks)

use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize(("how", "is_kept"), [("keep", True), ("leave", False)])
def test_what_is_freed_is_used_again(how: str, is_kept: bool) -> None:
    command = [sys.executable, "-c", _FAULTS, how]
    faults = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    pages = 3 * (147 << 20) // 4096
    assert (faults < pages // 1000) == is_kept


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_user_has_set_stays(name: str) -> None:
    assert not keep_what_is_freed({name: "131072"})
