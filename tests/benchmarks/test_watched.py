"""What is seen of a command from outside: its lines, its ranks, the memory of all of it."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks.watched import Process, below, ranks_of, seen, watch

MIB = 2**20


def process(parent: int, command: str = "", *, is_numbered: bool = False) -> Process:
    return Process(parent, command, is_numbered)


def test_ranks_are_what_torchrun_numbers_and_workers_are_below_them() -> None:
    tree = {
        1: process(0, "shardwright train"),
        2: process(1, "torchrun rank.py"),
        3: process(2, "rank.py", is_numbered=True),
        4: process(2, "rank.py", is_numbered=True),
        5: process(3, "rank.py", is_numbered=True),
        6: process(5, "rank.py", is_numbered=True),
    }
    ranks = ranks_of(tree, lambda command: "rank.py" in command)
    assert ranks == [3, 4]
    assert below(tree, ranks) == [5, 6]


def test_a_rank_that_nobody_numbers_is_known_by_its_command() -> None:
    tree = {1: process(0, "shardwright train"), 2: process(1, "rank.py"), 3: process(2, "rank.py")}
    ranks = ranks_of(tree, lambda command: "rank.py" in command)
    assert (ranks, below(tree, ranks)) == ([2], [3])


def test_what_is_gone_is_not_seen() -> None:
    assert seen(2**22 + 1) is None
    found = seen(os.getpid())
    assert found is not None
    assert found.parent == os.getppid()


PARENT = """
import os, sys, time
held = bytearray(int(sys.argv[1]))
for i in range(0, len(held), 4096): held[i] = 1
if os.fork() == 0:
    mine = bytearray(int(sys.argv[1]))
    for i in range(0, len(mine), 4096): mine[i] = 1
    print("ready", flush=True)
    time.sleep(600)
print("parent", flush=True)
time.sleep(600)
"""


def test_a_command_is_ended_once_it_is_done_and_its_workers_memory_counts_once(
    tmp_path: Path,
) -> None:
    size = 200 * MIB
    watched = watch(
        [sys.executable, "-c", PARENT, str(size)],
        os.environ,
        cwd=tmp_path,
        is_rank=lambda command: "time.sleep" in command,
        is_done=lambda lines: {line.text for line in lines} >= {"ready", "parent"},
        limit_seconds=60,
    )
    assert watched.problem is None
    assert sorted(line.text for line in watched.lines) == ["parent", "ready"]
    # The child's copy of the parent's pages is no memory of its own.
    assert 2 * size <= watched.peak_memory_bytes < 2.5 * size
    assert 0 < watched.seconds_to(watched.lines[0].time) < time.time() - watched.began


@pytest.mark.parametrize(
    ("code", "limit_seconds", "problem"),
    [
        ("print('no space'); raise SystemExit(3)", 60, "exit code 3\nno space"),
        ("import time; time.sleep(600)", 1, "not done after 1 s"),
    ],
    ids=["fails", "hangs"],
)
def test_a_command_that_is_never_done_says_why(
    code: str, limit_seconds: float, problem: str, tmp_path: Path
) -> None:
    watched = watch(
        [sys.executable, "-c", code],
        os.environ,
        cwd=tmp_path,
        is_rank=lambda _: True,
        is_done=lambda _: False,
        limit_seconds=limit_seconds,
    )
    assert watched.problem == problem
