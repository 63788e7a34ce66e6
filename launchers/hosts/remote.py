"""A command on another node: started through a remote shell, what it tells, how it ends."""

from __future__ import annotations

import os
import selectors
import shlex
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

from shardwright.train.console import reports
from shardwright.train.console.reports import Far, Said

SHELL_FAILED = 255
"""Exit code of ssh itself, and of what was killed on the other side."""
_KEPT_LINES = 20
_SECONDS_BETWEEN_LOOKS = 0.2


class Printed(NamedTuple):
    """A line that is no report: what a library, the shell or a traceback says."""

    text: str


class Ended(NamedTuple):
    """It is over."""

    code: int


Told = Far | Said | Printed | Ended


class Remote:
    """A command that runs on a host, until it ends or is told to."""

    def __init__(self, host: str, argv: Sequence[str]) -> None:
        self.host = host
        self.is_heard_of = False
        """Whether it has told anything, so that the node was reached."""
        self.last_lines: deque[str] = deque(maxlen=_KEPT_LINES)
        """Of what it has printed besides."""
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C is passed on, once
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.pipes = (self.process.stdout, self.process.stderr)
        self._begun = dict.fromkeys(self.pipes, b"")
        for pipe in self.pipes:
            os.set_blocking(pipe.fileno(), False)

    def read(self, pipe: IO[bytes]) -> tuple[list[Told], bool]:
        """Return what has come out of one of its pipes, and whether that was its end."""
        found = b""
        with suppress(BlockingIOError):
            found = os.read(pipe.fileno(), 65536)
            if not found:
                rest, self._begun[pipe] = self._begun[pipe], b""
                return ([self._told(rest)] if rest.strip() else []), True
        *lines, self._begun[pipe] = (self._begun[pipe] + found).split(b"\n")
        return [self._told(line) for line in lines if line.strip()], False

    def _told(self, line: bytes) -> Told:
        text = line.decode(errors="replace").rstrip("\r")
        report = reports.read(text)
        if report is None:
            self.last_lines.append(text)
            return Printed(text)
        self.is_heard_of = True
        return report

    def stop(self, by: str) -> None:
        """Have it stop, and say who asks; a second time changes nothing."""
        assert self.process.stdin is not None
        with suppress(OSError, ValueError):
            self.process.stdin.write(f"{reports.STOP}{by}\n".encode())
            self.process.stdin.flush()
        with suppress(OSError):
            self.process.stdin.close()

    def close(self) -> None:
        """End it, if it has not, by the end of its standard input: the shell here is killed."""
        assert self.process.stdin is not None
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, *self.pipes):
            with suppress(OSError):
                pipe.close()


def heard(remotes: Sequence[Remote], until: float | None = None) -> Iterator[tuple[Remote, Told]]:
    """Yield what commands tell, each at last that it has ended, until all have, or a time.

    ``until`` is one of the monotonic clock.
    """
    running = list(remotes)
    with selectors.DefaultSelector() as selector:
        for remote in running:
            for pipe in remote.pipes:
                selector.register(pipe, selectors.EVENT_READ, (remote, pipe))
        while running and (until is None or time.monotonic() < until):
            # Looked at before: what an ended one has printed is all there.
            over = [remote for remote in running if remote.process.poll() is not None]
            for key, _ in selector.select(0 if over else _SECONDS_BETWEEN_LOOKS):
                remote, pipe = key.data
                told, is_end = remote.read(pipe)
                yield from ((remote, each) for each in told)
                if is_end:
                    selector.unregister(pipe)
            for remote in over:
                for pipe in remote.pipes:
                    if pipe in selector.get_map():
                        yield from ((remote, each) for each in _rest(remote, pipe))
                        selector.unregister(pipe)
                running.remove(remote)
                yield remote, Ended(remote.process.returncode)


def _rest(remote: Remote, pipe: IO[bytes]) -> Iterator[Told]:
    """Yield what is still in a pipe, which somebody else may hold open."""
    while True:
        before = remote.read(pipe)
        yield from before[0]
        if before[1] or not before[0]:
            return


def script(words: Sequence[str], directory: Path, variables: Mapping[str, str]) -> str:
    """Return a POSIX shell's script that runs a command in a directory. Pure."""
    given = [f"{name}={value}" for name, value in variables.items()]
    command = shlex.join(["env", *given, *words])
    return f"cd {shlex.quote(str(directory))} || exit 1; exec {command}"
