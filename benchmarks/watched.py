"""A command run under watch: when each of its lines came, and the most memory that it ever had.

Nothing of it is changed for that: its output is read as it comes, its memory in /proc.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shardwright.launchers.ranks.child import descendants

POLL_SECONDS = 0.1
PRIVATE_EVERY = 10
"""Polls between two looks at a worker's own pages, for which the kernel has to walk them."""


@dataclass(frozen=True)
class Line:
    """One line of a command's output."""

    time: float
    """As `time.time` has it."""
    text: str


@dataclass(frozen=True)
class Watched:
    """What is known of a command that has ended, or was ended once it had done enough."""

    began: float
    lines: list[Line]
    peak_memory_bytes: int
    problem: str | None
    """How it failed; None where it did not."""

    def seconds_to(self, moment: float) -> float:
        return moment - self.began


def watch(
    argv: Sequence[str],
    environment: Mapping[str, str],
    *,
    cwd: Path,
    is_rank: Callable[[str], bool],
    is_done: Callable[[list[Line]], bool],
    limit_seconds: float,
) -> Watched:
    """Run a command until ``is_done`` with its lines, then kill it and all that descends from it.

    Ranks are the processes that torchrun numbers or, where there are none, the first whose command
    line ``is_rank``.
    """
    lines: list[Line] = []
    began = time.time()
    process = subprocess.Popen(
        argv,
        env=environment,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
    reader.start()
    memory = Memory(is_rank)
    problem = None
    try:
        while not is_done(lines):
            if process.poll() is not None:
                reader.join(5)  # the rest of its lines
                if not is_done(lines):
                    problem = f"exit code {process.returncode}"
                break
            if time.time() - began > limit_seconds:
                problem = f"not done after {limit_seconds:g} s"
                break
            memory.look(process.pid)
            time.sleep(POLL_SECONDS)
        memory.look(process.pid, closely=True)
    finally:
        end(process)
        reader.join(5)
    if problem is not None:
        problem = "\n".join([problem, *(line.text for line in lines[-20:])])
    return Watched(began, lines, memory.peak_bytes, problem)


def _read(stream: object, lines: list[Line]) -> None:
    for text in stream:  # type: ignore[attr-defined]
        lines.append(Line(time.time(), text.rstrip("\n")))


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process and all that descends from it, its ranks in sessions of their own too."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGSTOP)  # so that it starts nothing meanwhile
    for pid in [*descendants(process.pid), process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


@dataclass
class Memory:
    """The most that the ranks of a command have had, and what their children had besides.

    Of a rank it is VmHWM, which no look can miss; of a process that descends from one the most of
    its own pages, as it shares the others with the rank that it was forked from.
    """

    is_rank: Callable[[str], bool]
    ranks: dict[int, int] = field(default_factory=dict)
    others: dict[int, int] = field(default_factory=dict)
    looks: int = 0

    @property
    def peak_bytes(self) -> int:
        return sum(self.ranks.values()) + sum(self.others.values())

    def look(self, root: int, *, closely: bool = False) -> None:
        tree = {pid: process for pid in [root, *descendants(root)] if (process := seen(pid))}
        found = ranks_of(tree, self.is_rank)
        for pid in found:
            self.ranks[pid] = max(self.ranks.get(pid, 0), _peak_bytes(pid))
        if closely or self.looks % PRIVATE_EVERY == 0:
            for pid in below(tree, found):
                self.others[pid] = max(self.others.get(pid, 0), _private_bytes(pid))
        self.looks += 1


@dataclass(frozen=True)
class Process:
    """What tells a rank from what started it and from its workers."""

    parent: int
    command: str
    is_numbered: bool
    """By torchrun, or below what is."""


def seen(pid: int) -> Process | None:
    """Return what is known of a live process."""
    place = Path(f"/proc/{pid}")
    try:
        parent = re.search(r"PPid:\s+(\d+)", (place / "status").read_text())
        command = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        variables = (place / "environ").read_bytes().split(b"\0")
    except OSError:
        return None
    if parent is None or not command:
        return None
    return Process(int(parent[1]), command, any(each.startswith(b"RANK=") for each in variables))


def ranks_of(tree: Mapping[int, Process], is_rank: Callable[[str], bool]) -> list[int]:
    """Return which processes are ranks. Pure."""

    def first(chosen: Callable[[Process], bool]) -> list[int]:
        return [
            pid
            for pid, process in tree.items()
            if chosen(process) and not (process.parent in tree and chosen(tree[process.parent]))
        ]

    return first(lambda process: process.is_numbered) or first(
        lambda process: is_rank(process.command)
    )


def below(tree: Mapping[int, Process], ranks: Sequence[int]) -> list[int]:
    """Return which processes descend from ranks. Pure."""

    def descends(pid: int) -> bool:
        parent = tree[pid].parent
        return parent in ranks or (parent in tree and descends(parent))

    return [pid for pid in tree if descends(pid)]


def _peak_bytes(pid: int) -> int:
    try:
        match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(match[1]) * 1024 if match else 0


def _private_bytes(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return 1024 * sum(map(int, re.findall(r"Private_\w+:\s+(\d+) kB", text)))
