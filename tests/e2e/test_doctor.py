"""`shardwright doctor`, on this machine and among real ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def shardwright(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shardwright", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_ranks_measure_collectives_and_leave_nothing(tmp_path: Path) -> None:
    done = shardwright(
        *("doctor", "--directory", str(tmp_path)),
        *("launcher=torchrun", "launcher.device=cpu", "launcher.nproc_per_node=2"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    here, _, among_ranks = done.stdout.partition("\nranks\n")
    assert "ok    packages" in here
    assert "2 on 1 node(s), cpu" in among_ranks
    assert "GFLOP/s a rank" in among_ranks
    assert "all-reduce      right," in among_ranks
    assert "all-gather      right," in among_ranks
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_start_is_bad_input() -> None:
    done = shardwright("doctor", "launcher.nproc_per_node=0")
    assert done.returncode == 2
    assert "launcher.nproc_per_node" in done.stderr
