"""Run a command as a child: signals go on to it, and nothing that it started outlives it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
GRACE_SECONDS = 5.0
"""From SIGTERM to SIGKILL for what a child left behind."""

# Linux's prctl(2).
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Ended:
    """How a child ended."""

    code: int
    """Its exit code, or minus the signal that killed it."""
    stopped_by: int | None
    """The signal that this process was sent meanwhile, if any."""


def run(
    argv: Sequence[str], environment: Mapping[str, str], *, stderr_file: Path | None = None
) -> Ended:
    """Run a command to its end, under this process's environment and the one given.

    SIGTERM, SIGINT and SIGHUP are sent on; a second SIGINT kills. When the child has ended, all
    that descends from it is ended too; when this process is killed, the child gets SIGTERM.
    """
    before = set(descendants(os.getpid()))
    stopped_by: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        del frame
        impatient = number == signal.SIGINT and number in stopped_by
        stopped_by.append(number)
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(signal.SIGKILL if impatient else number)

    _become_subreaper()
    # Blocked until the child is there to send them to.
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    handlers = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        with stderr_file.open("ab") if stderr_file else contextlib.nullcontext() as stderr:
            child = subprocess.Popen(
                argv,
                env={**os.environ, **environment},
                stderr=stderr,
                # A Ctrl-C at the terminal reaches the child once, through this process.
                start_new_session=True,
                preexec_fn=_child_setup(os.getpid()),
            )
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        code = child.wait()
    finally:
        end(lambda: set(descendants(os.getpid())) - before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    return Ended(code, stopped_by[0] if stopped_by else None)


def replace(argv: Sequence[str], environment: Mapping[str, str]) -> None:
    """Let a command take the place of this process; does not return."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(argv[0], list(argv), {**os.environ, **environment})


def descendants(pid: int) -> Iterator[int]:
    """Yield the processes that descend from ``pid``, as far as /proc tells."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in parentheses, may hold anything; state and parent follow it.
            parent = int(stat.read_bytes().rpartition(b")")[2].split()[1])
        except (OSError, IndexError):
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    pending = children.get(pid, [])
    while pending:
        found = pending.pop()
        yield found
        pending.extend(children.get(found, []))


def end(processes: Callable[[], set[int]], grace_seconds: float = GRACE_SECONDS) -> None:
    """Send SIGTERM, then SIGKILL to whatever is left of some processes, and reap them."""
    for number, seconds in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, grace_seconds)):
        for pid in processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + seconds
        while left := processes():
            for pid in left:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        else:
            return


def _become_subreaper() -> None:
    """Have orphans of the child handed to this process instead of to init (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _child_setup(parent: int) -> Callable[[], None]:
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def set_up() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
            if os.getppid() != parent:  # it died before the line above
                os._exit(1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)

    return set_up
