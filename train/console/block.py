"""Lines at the bottom of a terminal that are drawn again in place, below what is printed."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import TextIO

from shardwright.train.console import cells, progress
from shardwright.train.console.terminal import Terminal

_CLEAR_LINE, _CLEAR_BELOW = "\x1b[K", "\x1b[J"


def window(console: TextIO) -> tuple[int, int]:
    """Return the columns and rows of a terminal as they are now."""
    try:
        size = os.get_terminal_size(console.fileno())
    except (OSError, ValueError):  # closed in between
        return 80, 24
    return max(2, size.columns), max(2, size.lines)


class Block:
    """Draws on a terminal. What is printed while it is drawn goes through `write`.

    rich's Live (15.0) moves up by the lines that it has drawn. A terminal that has become narrower
    has wrapped them since, so that pieces of them would stay above; here they are counted as they
    lie now.
    """

    def __init__(self, console: TextIO) -> None:
        self._console = console
        self._lines: list[str] = []
        self._lock = threading.RLock()

    def show(self, lines: Sequence[str]) -> None:
        """Draw these instead of the last ones, each cut to the width; never more than fit."""
        with self._lock:
            self._draw("", lines)

    def write(self, text: str) -> None:
        """Print a text that stays, above the block."""
        with self._lock:
            columns, _ = window(self._console)
            wrapped = "\n".join(progress.wrapped(line, columns) for line in text.split("\n"))
            said = "".join(f"{line}{_CLEAR_LINE}\n" for line in wrapped.split("\n"))
            self._draw(said, self._lines)
            if isinstance(self._console, Terminal):
                for line in text.split("\n"):
                    self._console.copy(line)

    def close(self, *, keeps: bool = True) -> None:
        """Leave the lines as they stand and the cursor below them, or take them away."""
        with self._lock:
            if not keeps:
                self._draw("", ())
            elif self._lines:
                self._put("\n")
            self._lines = []

    def _draw(self, above: str, lines: Sequence[str]) -> None:
        columns, rows = window(self._console)
        # A character in the last column leaves some terminals in doubt where the cursor is.
        fitting = [cells.cut(cells.plain(line), columns - 1) for line in lines[: rows - 1]]
        body = "\n".join(f"{line}{_CLEAR_LINE}" for line in fitting)
        self._put(f"{self._to_the_top(columns, rows)}{above}{body}{_CLEAR_BELOW}")
        self._lines = fitting

    def _to_the_top(self, columns: int, rows: int) -> str:
        """Return what brings the cursor to where the block begins."""
        heights = (max(1, -(-cells.width(line) // columns)) for line in self._lines)
        up = min(sum(heights), rows) - 1
        return "\r" + (f"\x1b[{up}A" if up > 0 else "")

    def _put(self, text: str) -> None:
        if isinstance(self._console, Terminal):
            self._console.draw(text)
        else:
            self._console.write(text)
        self._console.flush()
