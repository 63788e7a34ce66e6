"""A command in a real terminal, or behind a pipe, and all that a person sees of it and when."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import pyte

CTRL_C = b"\x03"
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]")
_LONGEST_LINE = 4096
_WIDEST, _LONGEST = 2000, 3000
"""Columns and rows of the screen that is read: nothing wraps, nothing is scrolled away."""


@dataclass
class Seen:
    """What a command has shown."""

    code: int = 0
    text: str = ""
    silences: list[tuple[float, str]] = field(default_factory=list)
    """Seconds in which nothing came, and the last line before; the longest first."""
    interrupted_at: str | None = None
    """The line at which Ctrl-C was pressed."""

    @property
    def lines(self) -> list[str]:
        """What stands on the screen in the end."""
        return list(_rendered(self.text))


@lru_cache(maxsize=8)
def _rendered(text: str) -> tuple[str, ...]:
    """Return the lines that a text leaves on a screen that holds all of it. Pure."""
    screen = pyte.Screen(_WIDEST, _LONGEST)
    screen.set_mode(pyte.modes.LNM)  # a pipe's newline returns the carriage, too
    pyte.Stream(screen).feed(text)
    # Its `display` would look at all of the columns that it has: seconds.
    rows = [screen.buffer[y] for y in range(max(screen.buffer, default=-1) + 1)]
    return tuple(
        "".join(row[x].data for x in range(max(row, default=-1) + 1)).rstrip() for row in rows
    )


_SIZE = ("COLUMNS", "LINES")
"""Which are believed before the terminal is asked; what one test leaves is no other's size."""


def _started(
    arguments: Sequence[str],
    cwd: Path,
    environment: Mapping[str, str],
    size: tuple[int, int] | None,
) -> tuple[subprocess.Popen[bytes], int]:
    """Start a command in a session of its own; return it and where what it prints is read."""
    reading, writing = pty.openpty() if size else os.pipe()
    if size:
        columns, rows = size
        fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def take_the_terminal() -> None:
        os.setsid()
        if size:
            fcntl.ioctl(writing, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        arguments,
        cwd=cwd,
        env={name: value for name, value in environment.items() if name not in _SIZE},
        stdin=writing if size else subprocess.DEVNULL,
        stdout=writing,
        stderr=writing,
        preexec_fn=take_the_terminal,
    )
    os.close(writing)
    return process, reading


def see(
    arguments: Sequence[str],
    *,
    cwd: Path,
    environment: Mapping[str, str],
    size: tuple[int, int] | None = (80, 24),
    interrupt_at: str | None = None,
    timeout_seconds: float = 280,
) -> Seen:
    """Run a command to its end in a terminal of columns and rows, or behind a pipe where None.

    Ctrl-C is pressed once, as soon as ``interrupt_at``, a pattern, matches what is shown: the
    terminal sends SIGINT to all its foreground processes. A command that takes longer than
    ``timeout_seconds`` is killed.
    """
    process, reading = _started(arguments, cwd, environment, size)
    seen, data = Seen(), b""
    began = last = time.monotonic()
    try:
        while True:
            assert time.monotonic() - began < timeout_seconds, data.decode(errors="replace")
            if not select.select([reading], [], [], 0.1)[0]:
                continue
            try:
                chunk = os.read(reading, 2**16)
            except OSError:  # what a terminal answers once nobody has its other side
                chunk = b""
            now = time.monotonic()
            end = data[-_LONGEST_LINE:].decode(errors="replace")
            before = end.replace("\r", "\n").strip().rpartition("\n")[2]
            seen.silences.append((now - last, before))
            last = now
            if not chunk:
                break
            data += chunk
            if not interrupt_at or seen.interrupted_at:
                continue
            text = _CONTROL.sub("", data.decode(errors="replace"))
            if m := re.search(interrupt_at, text):
                seen.interrupted_at = m[0]
                if size:
                    os.write(reading, CTRL_C)
                else:
                    os.killpg(process.pid, 2)
        seen.code = process.wait(timeout=timeout_seconds)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()
        os.close(reading)
    seen.text = data.decode(errors="replace")
    seen.silences.sort(reverse=True)
    return seen
