"""What a piece of code does, by counts that are the same on every machine."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Counted:
    """What was done in a block, by the thread that ran it."""

    by_name: Counter[str]
    """Calls of functions, those in C too, by their names."""
    opened: list[str]
    """The files that were opened, by all threads."""

    @property
    def calls(self) -> int:
        return self.by_name.total()

    def looks(self) -> int:
        """Return how often a file system was asked what something is, or where it leads."""
        return sum(self.by_name[name] for name in ("stat", "lstat", "readlink", "scandir"))


_lists: list[list[str]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        for found in _lists:
            found.append(str(arguments[0]))


_is_audited = False


@contextmanager
def opened() -> Iterator[list[str]]:
    """Note the files that the block opens, those of all threads."""
    global _is_audited
    if not _is_audited:
        sys.addaudithook(_audit)  # which cannot be taken back
        _is_audited = True
    found: list[str] = []
    _lists.append(found)
    try:
        yield found
    finally:
        _lists[:] = [other for other in _lists if other is not found]


@contextmanager
def counted() -> Iterator[Counted]:
    """Count what the block does."""
    names: Counter[str] = Counter()

    def count(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            names[frame.f_code.co_name] += 1
        elif event == "c_call":
            names[argument.__name__] += 1

    with opened() as files:
        before = sys.getprofile()
        sys.setprofile(count)
        try:
            yield Counted(names, files)
        finally:
            sys.setprofile(before)
