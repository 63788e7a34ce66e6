"""Whether a process keeps the memory that it has freed, for what it allocates next."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from shardwright.train import __main__ as entry
from shardwright.train.process import logs, memory
from shardwright.train.process.memory import keep_what_is_freed
from shardwright.train.process.rank import Rank
from tests.unit.optimizers import config

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


class Called(Exception):
    """It was."""


def test_a_rank_on_a_cpu_keeps_what_it_frees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def called(environment: object) -> bool:
        raise Called

    monkeypatch.setattr(logs, "open_rank_log", lambda *_, **__: io.StringIO())
    monkeypatch.setattr(memory, "keep_what_is_freed", called)
    settings = config()
    launcher = settings.launcher.model_copy(update={"device": "cpu"})
    settings = settings.model_copy(update={"launcher": launcher})
    with pytest.raises(Called):
        entry._run(tmp_path, settings, Rank(0, 0, 1))
