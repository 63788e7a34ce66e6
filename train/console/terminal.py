"""What a process shows its user: streams that no reader who leaves, and no letter, can end."""

from __future__ import annotations

import errno
import io
import locale
import logging
import os
import select
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

"""In logs/: what the terminal of a run shows, for who has lost it."""
READER_GONE = 141
"""Exit code of a command whose reader has left, 128 + SIGPIPE as the shell has it."""
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF)
"""A pipe that nobody reads, a terminal that is closed, a descriptor that is none."""


class ReaderGone(BaseException):
    """Nobody reads what a command that only shows something has to show."""


class Terminal(io.TextIOWrapper):
    """A text stream on a descriptor. What cannot be encoded is escaped; no write fails.

    Until `outlive`, a write that no one is left to read raises ReaderGone. Each whole line goes to
    every one of ``copies`` too, as a terminal would show it last, without its newline.
    """

    def __init__(
        self, descriptor: int, encoding: str | None = None, *, outlives: bool = True
    ) -> None:
        self._descriptor = Descriptor(descriptor)
        self._descriptor.outlives = outlives
        self.copies: list[Callable[[str], object]] = []
        self._line = ""
        super().__init__(
            io.BufferedWriter(self._descriptor),
            encoding=encoding or locale.getencoding(),
            errors="backslashreplace",
            line_buffering=True,
        )

    def write(self, text: str) -> int:
        """Write a text, and copy the lines that it ends."""
        written = super().write(text)
        *lines, self._line = (self._line + text).split("\n")
        *_, drawn = self._line.rpartition("\r")
        self._line = drawn or self._line  # a bar is drawn twice a second for days
        for line in lines:
            self.copy(line)
        return written

    def draw(self, text: str) -> None:
        """Write what is drawn again and again, which no copy gets."""
        super().write(text)

    def copy(self, line: str) -> None:
        """Give a line to the copies alone; a bar that is drawn again and again is its last one."""
        for copy in self.copies:
            copy(line.rpartition("\r")[2])

    def outlive(self) -> None:
        """Keep the process running where nobody reads what it shows any more."""
        self._descriptor.outlives = True


class Descriptor(io.FileIO):
    """A descriptor to write to; what cannot be written is taken as written."""

    outlives = True
    """Whether nobody's reading it is borne: the next such write raises ReaderGone otherwise."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)

    def write(self, data) -> int:  # type: ignore[no-untyped-def]
        try:
            while (written := super().write(data)) is None:
                # Somebody with whom it is shared does not wait for it; this process does.
                select.select([], [self.fileno()], [])
            return written
        except OSError as error:
            if not self.outlives:
                self.outlives = True  # what is left is written once more as the process ends
                if error.errno not in _GONE:
                    raise
                raise ReaderGone from None
            return memoryview(data).nbytes


def is_read(descriptor: int) -> bool:
    """Return whether somebody still reads what goes to a pipe or a terminal."""
    poll = select.poll()
    poll.register(descriptor, 0)  # that all have left is told unasked
    return not poll.poll(0)


class Lines:
    """A file that lines are appended to, by several processes; a full disk loses some."""

    def __init__(self, path: Path) -> None:
        self._file: int | None = None
        with suppress(OSError):
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def __call__(self, line: str) -> None:
        if self._file is not None:
            with suppress(OSError):
                os.write(self._file, f"{line}\n".encode(errors="backslashreplace"))

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def guard() -> None:
    """Give this process standard streams that exist and take any text; one that it lacked is empty.

    For what only shows something: it ends, by ReaderGone, when nobody reads its output any more.
    What goes to stderr is not what a command is run for: that is lost without an end.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The next file would get its number, and what is printed.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = _guarded(sys.stdout, 1, outlives=False)
    sys.stderr = _guarded(sys.stderr, 2, outlives=True)


def _guarded(stream, descriptor: int, *, outlives: bool):  # type: ignore[no-untyped-def]
    if isinstance(stream, Terminal):
        return stream
    if stream is None:
        return Terminal(descriptor, outlives=outlives)
    with suppress(OSError, ValueError):
        if stream.fileno() == descriptor:
            stream.flush()
            return Terminal(descriptor, stream.encoding, outlives=outlives)
    return stream  # somebody else's, such as a test's


def columns() -> int | None:
    """Return the columns of the terminal that this process prints to; None where it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def outlive() -> None:
    """Guard this process, and keep its work running where nobody reads its output any more."""
    guard()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Terminal):
            stream.outlive()


@contextmanager
def kept_in(path: Path) -> Iterator[None]:
    """Append what this process shows inside of the block to a file as well."""
    with ExitStack() as stack:
        lines = Lines(path)
        stack.callback(lines.close)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, Terminal):
                stream.copies.append(lines)
                stack.callback(stream.copies.remove, lines)
        yield


def run(command: Callable[[], int]) -> int:
    """Run a command that may only show something; return its exit code, READER_GONE where cut."""
    guard()
    try:
        code = command()
        sys.stdout.flush()
        return code
    except ReaderGone:
        return READER_GONE


def log_copy(logger: logging.Logger) -> Callable[[str], None]:
    """Return what writes a line that is not empty to a log. Pure."""

    def copy(line: str) -> None:
        if line.strip():
            logger.info("%s", line.rstrip())

    return copy
