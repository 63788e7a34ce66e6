"""The Python stacks of a rank, as faulthandler writes them: where it stands. Pure."""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+|\?\?\?) in (?P<name>.*)$')
_MEETING = ("meeting.py", "wait_for")
"""Where a rank waits for others without a collective: file and function."""

_TIMED = ("waits.py", "counted")
"""What a wait of torch's is wrapped in, which is nobody's place."""


@dataclass(frozen=True)
class Frame:
    """One call, the file as it was found."""

    file: str
    line: str
    name: str

    def __str__(self) -> str:
        return f"{_short(self.file)}:{self.line} in {self.name}"


def main_thread(text: str) -> list[Frame]:
    """Return the frames of the first thread of a process, the innermost first.

    faulthandler begins with the thread that was started last (CPython 3.11, traceback.c).
    """
    frames: list[Frame] = []
    for line in text.splitlines():
        if line.endswith("(most recent call first):"):
            frames = []
        elif found := _FRAME.match(line):
            frames.append(Frame(found["file"], found["line"], found["name"]))
    return [frame for frame in frames if (Path(frame.file).name, frame.name) != _TIMED]


def place(frames: Sequence[Frame]) -> str | None:
    """Return where code stands: the innermost frame that is of no library, and what it calls."""
    if not frames:
        return None
    own = next((frame for frame in frames if not _is_of_a_library(frame.file)), frames[0])
    if own is frames[0]:
        return f"at {own}"
    return f"at {own}, which has called {frames[0]}"


def waits_for_others(frames: Sequence[Frame]) -> bool:
    """Return whether a rank waits in the group's store for what another one has to say."""
    return any((Path(frame.file).name, frame.name) == _MEETING for frame in frames)


def _short(file: str) -> str:
    for root in _LIBRARIES:
        if file.startswith(root):
            return file.removeprefix(root).lstrip("/")
    parts = Path(file).parts
    for package in ("train", "launchers"):
        if package in parts:
            return "/".join(parts[len(parts) - 1 - parts[::-1].index(package) :])
    return "/".join(parts[-2:])


_LIBRARIES = tuple(
    dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib"))
)


def _is_of_a_library(file: str) -> bool:
    # Installed, the package is a library to its interpreter.
    return "/shardwright/" not in file and (file.startswith(_LIBRARIES) or file.startswith("<"))
