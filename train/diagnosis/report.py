"""What ranks of this machine show when they are asked: stacks, collectives, their process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardwright.train.diagnosis.beats import GONE, STOPPED, Beat, LiveRank
from shardwright.train.process.heartbeat import ANSWER_SECONDS as HEARTBEAT_SECONDS
from shardwright.train.process.heartbeat import STACKS, Field

ANSWER_SECONDS = 5.0
"""How long a rank may take to show itself."""
SETTLED_SECONDS = 0.1
"""Stacks are whole when nothing has been added to them for so long."""
PY_SPY_SECONDS = 20.0


@dataclass(frozen=True)
class Report:
    """What one rank has shown."""

    beat: Beat
    stacks: str = ""
    """As faulthandler, or py-spy, writes them; nothing where the process could not answer."""
    of_children: Mapping[str, str] = field(default_factory=dict)
    """Those of the processes below it, such as its data loader's, by their numbers."""
    collectives: Mapping[str, Any] | None = None
    """As `process.collectives.reduced` has them; None where its interpreter did not answer."""


def collect(ranks: Sequence[LiveRank], seconds: float = ANSWER_SECONDS) -> list[Report]:
    """Ask ranks of this machine for all that they can show, and return it."""
    asked = [rank for rank in ranks if _can_answer(rank)]
    for rank in asked:
        fields = rank.page.fields
        fields[Field.ASKED] = fields[Field.ANSWERED] + 1
    stacks = {rank.announced.pid: text for rank in asked if (text := _stacks(rank, seconds))}
    until = time.monotonic() + seconds
    while not all(_has_answered(rank) for rank in asked) and time.monotonic() < until:
        time.sleep(0.05)
    found = []
    for rank in ranks:
        pid = rank.announced.pid
        text = stacks.get(pid) or ("" if rank.state() == GONE else _by_py_spy(pid))
        is_answered = rank in asked and _has_answered(rank)
        found.append(
            Report(
                rank.beat(),
                text,
                dict(_stacks_of_children(rank, seconds)) if rank in asked else {},
                _collectives(rank) if is_answered else None,
            )
        )
    return found


def _can_answer(rank: LiveRank) -> bool:
    return rank.state() not in (GONE, STOPPED) and _catches_stacks(rank.announced.pid)


def _has_answered(rank: LiveRank) -> bool:
    fields = rank.page.fields
    return fields[Field.ASKED] == fields[Field.ANSWERED] or rank.state() == GONE


def _catches_stacks(pid: int) -> bool:
    """Return whether a process writes its stacks at the signal, which would kill any other."""
    assert STACKS is not None
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    masks = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return any(int(mask, 16) >> (STACKS - 1) & 1 for mask in masks)


def _stacks(rank: LiveRank, seconds: float, pid: int | None = None) -> str:
    """Return the stacks of a rank, or of a process below it, which writes into the same file."""
    assert STACKS is not None
    try:
        descriptor = rank.open(rank.announced.stacks)
    except OSError:
        return ""
    try:
        os.ftruncate(descriptor, 0)
        with suppress(ProcessLookupError, PermissionError):
            os.kill(rank.announced.pid if pid is None else pid, STACKS)
        return _settled(descriptor, seconds).decode(errors="replace")
    finally:
        os.close(descriptor)


def _settled(descriptor: int, seconds: float) -> bytes:
    until, size, grew_at = time.monotonic() + seconds, 0, time.monotonic()
    while (now := time.monotonic()) < until:
        if (found := os.fstat(descriptor).st_size) != size:
            size, grew_at = found, now
        elif size and now - grew_at > SETTLED_SECONDS:
            break
        time.sleep(0.02)
    return os.pread(descriptor, size, 0)


def _stacks_of_children(rank: LiveRank, seconds: float) -> Iterator[tuple[str, str]]:
    for pid in children(rank.announced.pid):
        if _catches_stacks(pid) and (text := _stacks(rank, seconds, pid)):
            yield str(pid), text


def children(pid: int) -> list[int]:
    """Return the processes directly below one."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(child) for child in path.read_text().split()]
    return found


def _collectives(rank: LiveRank) -> Mapping[str, Any] | None:
    try:
        descriptor = rank.open(rank.announced.collectives)
    except OSError:
        return None
    try:
        data = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        found: Mapping[str, Any] = json.loads(data)
        return found
    except (OSError, ValueError):
        return None
    finally:
        os.close(descriptor)


def _by_py_spy(pid: int) -> str:
    """Return the stacks of a process that cannot answer, where py-spy is there and may look."""
    program = shutil.which("py-spy")
    if program is None:
        return ""
    with suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(
            [program, "dump", "--nonblocking", "--pid", str(pid)],
            capture_output=True,
            text=True,
            timeout=PY_SPY_SECONDS,
            check=False,
        )
        return found.stdout
    return ""


def end(ranks: Sequence[LiveRank], seconds: float) -> None:
    """Have ranks end by themselves with the code of a run to be resumed; kill what does not."""
    ends_at_ns = time.monotonic_ns() + int(2e9 * HEARTBEAT_SECONDS)
    for rank in ranks:
        rank.page.fields[Field.ENDS] = ends_at_ns
    until = time.monotonic() + seconds
    while any(rank.state() not in (GONE, STOPPED) for rank in ranks) and time.monotonic() < until:
        time.sleep(0.05)
    for rank in ranks:
        if rank.state() != GONE:
            with suppress(ProcessLookupError):
                os.kill(rank.announced.pid, signal.SIGKILL)
