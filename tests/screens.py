"""A terminal of some size in this process, and what stands on it."""

from __future__ import annotations

import os
import select
import termios
from collections.abc import Iterator
from contextlib import contextmanager

import pyte

from shardwright.train.console.terminal import Terminal


class Screen:
    """The person's side of a terminal, and the stream that a program draws on."""

    def __init__(self, columns: int, rows: int) -> None:
        self._reading, self._writing = os.openpty()
        self.resize(columns, rows)
        self._screen = pyte.HistoryScreen(columns, rows, history=1000)
        self._stream = pyte.ByteStream(self._screen)
        self.console = Terminal(self._writing, encoding="utf-8")

    def resize(self, columns: int, rows: int) -> None:
        """Give the window another size; pyte's own stays: it wraps nothing again."""
        termios.tcsetwinsize(self._writing, (rows, columns))

    def raw(self) -> bytes:
        """Return what has come since the last look, as it came."""
        data = b""
        while select.select([self._reading], [], [], 0.05)[0]:
            data += os.read(self._reading, 2**16)
        self._stream.feed(data)
        return data

    @property
    def lines(self) -> list[str]:
        """What stands on the screen, empty lines at its end left out."""
        self.raw()
        return "\n".join(line.rstrip() for line in self._screen.display).rstrip("\n").split("\n")

    @property
    def history(self) -> list[str]:
        """What has been scrolled away."""
        self.raw()
        width = self._screen.columns
        return [
            "".join(line[x].data for x in range(width)).rstrip()
            for line in self._screen.history.top
        ]

    def close(self) -> None:
        os.close(self._reading)
        os.close(self._writing)


@contextmanager
def screen(columns: int = 80, rows: int = 24) -> Iterator[Screen]:
    found = Screen(columns, rows)
    try:
        yield found
    finally:
        found.close()
