"""The heartbeats of a run's ranks as somebody else sees them: on this machine, and in its files."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shardwright.train.process.heartbeat import Announcement, Field, Page, Phase, process
from shardwright.train.run_directory.names import HEARTBEATS, NODE_BEATS, RANK_BEATS, node_beats

GONE = ""
"""The state of a process that is no more."""
STOPPED, TRACED = "T", "t"
"""Those of one that a signal has stopped, and of one that a debugger holds."""


@dataclass(frozen=True)
class Beat:
    """Where a rank was when it last moved, and how long ago that is."""

    rank: int
    host: str
    pid: int
    count: int
    step: int
    phase: int
    still_seconds: float
    longest_step_seconds: float
    longest_save_seconds: float
    compute_seconds: float = 0.0
    """Of a step between the last two log lines, as are the next two; 0 before."""
    wait_seconds: float = 0.0
    data_seconds: float = 0.0
    state: str = GONE
    """Of its process, a letter as /proc has it."""

    @property
    def is_ended(self) -> bool:
        return self.phase == Phase.ENDED

    @property
    def is_gone(self) -> bool:
        """Whether its process is no more, and its work was not done."""
        return self.state == GONE and not self.is_ended


class LiveRank:
    """A rank of this machine, into whose heartbeat this process looks."""

    def __init__(self, announced: Announcement) -> None:
        """Raise OSError where there is no such process any more, or it is not of this user."""
        self.announced = announced
        descriptor = self.open(announced.page)
        try:
            if not os.readlink(f"/proc/self/fd/{descriptor}").startswith("/memfd:heartbeat"):
                raise ProcessLookupError(f"process {announced.pid} is no rank any more")
            self.page = Page(descriptor)
        finally:
            os.close(descriptor)

    def open(self, file: int) -> int:
        """Return a descriptor of its own for one of the rank's open files."""
        return os.open(f"/proc/{self.announced.pid}/fd/{file}", os.O_RDWR | os.O_CLOEXEC)

    def state(self) -> str:
        """Return the state of its process, GONE where another one has its number."""
        state, began = process(self.announced.pid)
        return state if began == self.announced.started_at_ticks else GONE

    def beat(self) -> Beat:
        fields, announced = self.page.fields, self.announced
        moved_at_ns = fields[Field.MOVED_AT_NS]
        return Beat(
            rank=announced.rank,
            host=announced.host,
            pid=announced.pid,
            count=fields[Field.COUNT],
            step=fields[Field.STEP],
            phase=fields[Field.PHASE],
            still_seconds=max(0, time.monotonic_ns() - moved_at_ns) / 1e9,
            longest_step_seconds=fields[Field.LONGEST_STEP_NS] / 1e9,
            longest_save_seconds=fields[Field.LONGEST_SAVE_NS] / 1e9,
            compute_seconds=fields[Field.COMPUTE_MICROSECONDS] / 1e6,
            wait_seconds=fields[Field.WAIT_MICROSECONDS] / 1e6,
            data_seconds=fields[Field.DATA_MICROSECONDS] / 1e6,
            state=self.state(),
        )


def of_lost(announced: Announcement) -> Beat:
    """Return what is known of a rank that has ended before anybody had seen its heartbeat."""
    return Beat(
        rank=announced.rank,
        host=announced.host,
        pid=announced.pid,
        count=0,
        step=0,
        phase=Phase.STARTING,
        still_seconds=max(0.0, time.time() - announced.time),
        longest_step_seconds=0.0,
        longest_save_seconds=0.0,
    )


def announced(run_dir: Path, ranks: Iterable[int] | None = None) -> list[Announcement]:
    """Return where the heartbeats of ranks are found, of all where none are named."""
    folder = run_dir / HEARTBEATS
    if ranks is None:
        paths = sorted(folder.glob(RANK_BEATS))
    else:
        paths = [folder / RANK_BEATS.replace("*", str(rank)) for rank in ranks]
    found = []
    for path in paths:
        with suppress(OSError, ValueError, TypeError):
            found.append(Announcement(**json.loads(path.read_text())))
    return found


def alive_here(run_dir: Path, host: str, ranks: Iterable[int] | None = None) -> list[LiveRank]:
    """Return the ranks of a run that live on this machine, as far as they may be looked into."""
    found = []
    for each in announced(run_dir, ranks):
        if each.host == host and process(each.pid)[1] == each.started_at_ticks:
            with suppress(OSError):
                found.append(LiveRank(each))
    return found


# --- in the run's directory ---------------------------------------------------------------------


@dataclass(frozen=True)
class NodeBeats:
    """The heartbeats of a node's ranks at a time, as its watcher writes them down."""

    host: str
    time: float
    """Seconds since 1970."""
    beats: tuple[Beat, ...]


def write_node(run_dir: Path, host: str, beats: Iterable[Beat]) -> None:
    """Write down where a node's ranks are, in place: nothing of it has to survive a crash."""
    tree = {"host": host, "time": time.time(), "beats": [asdict(beat) for beat in beats]}
    data = (json.dumps(tree) + "\n").encode()
    path = run_dir / HEARTBEATS / node_beats(host)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.pwrite(descriptor, data, 0)
        os.ftruncate(descriptor, len(data))
    finally:
        os.close(descriptor)


def nodes(run_dir: Path) -> list[NodeBeats]:
    """Return what each node's watcher has written down last, the newest start's alone."""
    found = []
    for path in sorted((run_dir / HEARTBEATS).glob(NODE_BEATS)):
        for _ in range(3):  # it may be written this very moment
            try:
                found.append(_node(json.loads(path.read_text())))
                break
            except (OSError, ValueError, KeyError, TypeError):
                time.sleep(0.01)
    return found


def _node(tree: Mapping[str, Any]) -> NodeBeats:
    beats = tuple(Beat(**beat) for beat in tree["beats"])
    return NodeBeats(str(tree["host"]), float(tree["time"]), beats)
