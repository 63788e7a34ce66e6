"""Where this rank is, in memory that its node's watcher reads: step, phase, and when it came there.

To note it takes less than a microsecond: no file, no lock and no other rank has a part in it.
"""

from __future__ import annotations

import enum
import faulthandler
import fcntl
import json
import mmap
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardwright.train.durable import write_text
from shardwright.train.errors import RESUMABLE
from shardwright.train.process.rank import Rank
from shardwright.train.run_directory.names import HEARTBEATS, rank_beat

STACKS = signal.SIGRTMIN + 9 if hasattr(os, "memfd_create") else None
"""Has a rank write down its stacks, in C: the interpreter's lock is not needed for it."""
ANSWER_SECONDS = 0.5
"""Between two looks of a rank at whether it is asked for its collectives."""
_BYTES = 4096


class Phase(enum.IntEnum):
    """What a rank is at; `said` is the same in words."""

    STARTING = 0
    DATA = 1
    AGREEMENT = 2
    COMPUTE = 3
    OPTIMIZER = 4
    EVALUATION = 5
    SAVE = 6
    COMPILE = 7
    ENDING = 8
    ENDED = 9

    @property
    def said(self) -> str:
        return _SAID[self]


_SAID = {
    Phase.STARTING: "starting",
    Phase.DATA: "waiting for data",
    Phase.AGREEMENT: "agreeing on the step",
    Phase.COMPUTE: "in the forward or backward pass",
    Phase.OPTIMIZER: "in the optimizer",
    Phase.EVALUATION: "evaluating",
    Phase.SAVE: "writing a checkpoint",
    Phase.COMPILE: "compiling",
    Phase.ENDING: "ending",
    Phase.ENDED: "ended",
}


_APART = frozenset({Phase.SAVE, Phase.EVALUATION, Phase.COMPILE})
"""What is no part of a step, and may lie within one."""


class Field(enum.IntEnum):
    """The numbers of a page, each of eight bytes, which a processor stores as one."""

    COUNT = 0
    """How often the rank has moved."""
    STEP = 1
    PHASE = 2
    MOVED_AT_NS = 3
    """On the monotonic clock of its machine."""
    LONGEST_STEP_NS = 4
    """Of this start, without the first one, evaluations, saves and compilations; 0 before."""
    LONGEST_SAVE_NS = 5
    ASKED = 6
    """How often the watcher has asked for this rank's collectives."""
    ANSWERED = 7
    ENDS = 8
    """When the rank is to end by the watcher's verdict, on the monotonic clock; 0: it is not."""
    COMPUTE_MICROSECONDS = 9
    """Of a step between the last two log lines, as are the next two."""
    WAIT_MICROSECONDS = 10
    DATA_MICROSECONDS = 11


class Page:
    """The memory of one rank's heartbeat, of which that rank and its watcher have a view each."""

    def __init__(self, descriptor: int) -> None:
        self.fields = memoryview(mmap.mmap(descriptor, _BYTES)).cast("Q")


@dataclass(frozen=True)
class Announcement:
    """Where a rank's heartbeat is found: memory of a process, by its open files."""

    rank: int
    world_size: int
    host: str
    pid: int
    started_at_ticks: int
    """When the process began, as its kernel counts: another process of this number began later."""
    time: float
    """Seconds since 1970."""
    page: int
    stacks: int
    collectives: int


class _Heart:
    """This rank's own heartbeat."""

    def __init__(self) -> None:
        self.page_file = os.memfd_create("heartbeat")
        os.ftruncate(self.page_file, _BYTES)
        self.page = Page(self.page_file)
        self.stacks_file = os.memfd_create("stacks")
        # Whoever reads it empties it for the next time, and each process below has it, too.
        fcntl.fcntl(self.stacks_file, fcntl.F_SETFL, os.O_APPEND)
        self.collectives_file = os.memfd_create("collectives")
        self.step_began_ns = 0
        self.is_plain_step = False
        """Whether the step that is under way tells how long steps take."""

    def close(self) -> None:
        """Close its files; the page stays until nobody has a view of it."""
        for descriptor in (self.page_file, self.stacks_file, self.collectives_file):
            os.close(descriptor)


_heart: _Heart | None = None
_fields: Any = None
"""Those of its page, None where this process has no heartbeat."""


# --- where it is ----------------------------------------------------------------------------------


def now(phase: int) -> None:
    """Note that this rank has come to a `Phase`."""
    fields = _fields
    if fields is not None:
        fields[2] = phase
        fields[3] = time.monotonic_ns()
        fields[0] += 1


def moved() -> None:
    """Note that this rank has moved within a phase."""
    fields = _fields
    if fields is not None:
        fields[3] = time.monotonic_ns()
        fields[0] += 1


def at(phase: Phase) -> _At:
    """Be at a phase inside of the block, and at the one before behind it."""
    return _At(phase)


class _At:
    """A block; not of contextlib's, which costs several times as much in each step."""

    __slots__ = ("_before", "_began_ns", "_fields", "_phase")

    def __init__(self, phase: Phase) -> None:
        self._phase = phase

    def __enter__(self) -> None:
        self._fields = _fields
        if self._fields is not None:
            self._before, self._began_ns = self._fields[2], time.monotonic_ns()
            now(self._phase)

    def __exit__(self, *raised: object) -> None:
        fields = self._fields
        if fields is None:
            return
        if self._phase in _APART and _heart is not None:
            _heart.is_plain_step = False
        if self._phase is Phase.SAVE:
            took_ns = time.monotonic_ns() - self._began_ns
            fields[Field.LONGEST_SAVE_NS] = max(fields[Field.LONGEST_SAVE_NS], took_ns)
        now(self._before)


def step_begins(step: int) -> None:
    """Note that a step begins, and how long the one before has taken."""
    if _heart is None:
        return
    fields, began_ns = _fields, time.monotonic_ns()
    if _heart.is_plain_step:
        took_ns = began_ns - _heart.step_began_ns
        if took_ns > fields[Field.LONGEST_STEP_NS]:
            fields[Field.LONGEST_STEP_NS] = took_ns
    # The first step of a start takes longer than others.
    _heart.is_plain_step = _heart.step_began_ns != 0
    _heart.step_began_ns = began_ns
    fields[Field.STEP] = step
    now(Phase.AGREEMENT)


def note_times(compute: int, wait: int, data: int) -> None:
    """Note how many microseconds of a step this rank computes, and waits for others and data."""
    if _fields is not None:
        _fields[Field.COMPUTE_MICROSECONDS] = compute
        _fields[Field.WAIT_MICROSECONDS] = wait
        _fields[Field.DATA_MICROSECONDS] = data


def while_compiling() -> None:
    """Have each compilation of torch's noted, from now on and in any thread."""
    from torch._dynamo.callback import callback_handler

    began: list[Phase] = []

    def begin(arguments: object) -> None:
        del arguments
        if _heart is not None:
            began.append(Phase(_fields[Field.PHASE]))
            _heart.is_plain_step = False
            now(Phase.COMPILE)

    def end(arguments: object) -> None:
        del arguments
        if began:
            now(began.pop())

    callback_handler.register_start_callback(begin)
    callback_handler.register_end_callback(end)


# --- its life -------------------------------------------------------------------------------------


@contextmanager
def beating(run_dir: Path, rank: Rank, collectives: Callable[[], bytes]) -> Iterator[None]:
    """Have this process's heartbeat found and its stacks shown when asked for, inside of the block.

    ``collectives`` returns what there is to know of those of this rank. Where the kernel is not
    Linux there is no heartbeat.
    """
    global _heart, _fields
    if STACKS is None:
        yield
        return
    _heart = _Heart()
    _fields = _heart.page.fields
    now(Phase.STARTING)
    faulthandler.register(STACKS, file=_heart.stacks_file, all_threads=True)
    over = threading.Event()
    arguments = (_heart, over, collectives)
    thread = threading.Thread(target=_answer, args=arguments, name="diagnosis", daemon=True)
    thread.start()
    try:
        with suppress(OSError):  # a full disk: the run goes on unseen
            _announce(run_dir, rank, _heart)
        yield
    finally:
        now(Phase.ENDED)
        over.set()
        thread.join()
        faulthandler.unregister(STACKS)
        _heart.close()
        _heart = _fields = None


def _announce(run_dir: Path, rank: Rank, heart: _Heart) -> None:
    folder = run_dir / HEARTBEATS
    folder.mkdir(exist_ok=True)
    _, started_at_ticks = process(os.getpid())
    mine = Announcement(
        rank=rank.index,
        world_size=rank.world_size,
        host=socket.gethostname(),
        pid=os.getpid(),
        started_at_ticks=started_at_ticks,
        time=time.time(),
        page=heart.page_file,
        stacks=heart.stacks_file,
        collectives=heart.collectives_file,
    )
    write_text(folder / rank_beat(rank.index), json.dumps(vars(mine)))


def _answer(heart: _Heart, over: threading.Event, collectives: Callable[[], bytes]) -> None:
    fields = heart.page.fields
    while not over.wait(ANSWER_SECONDS):
        if ends_at_ns := fields[Field.ENDS]:
            # All at once: a peer that is gone is an error to those that are left.
            time.sleep(max(0, ends_at_ns - time.monotonic_ns()) / 1e9)
            os._exit(RESUMABLE)
        if (asked := fields[Field.ASKED]) != fields[Field.ANSWERED]:
            found = collectives()
            os.ftruncate(heart.collectives_file, 0)
            os.pwrite(heart.collectives_file, found, 0)
            fields[Field.ANSWERED] = asked


# --- as others see it -----------------------------------------------------------------------------


def process(pid: int) -> tuple[str, int]:
    """Return a process's state as /proc has it, and when it began; ("", 0) where there is none.

    One that has ended and that nobody has waited for counts as gone.
    """
    try:
        rest = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        state = rest[0].decode()
        return ("", 0) if state in "ZX" else (state, int(rest[19]))
    except (OSError, IndexError, ValueError):
        return "", 0
