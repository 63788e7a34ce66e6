"""What a piece of code does, by counts that are the same on every machine."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Counted:
    """What was done in a block, by the thread that ran it."""

    by_name: Counter[str] = field(default_factory=Counter)
    """Calls of functions, those in C too, by their names."""
    opened: list[str] = field(default_factory=list)
    """The files that were opened, by all threads."""

    @property
    def calls(self) -> int:
        return self.by_name.total()

    def looks(self) -> int:
        """Return how often a file system was asked what something is, or where it leads."""
        return sum(self.by_name[name] for name in ("stat", "lstat", "readlink", "scandir"))


_open: list[Counted] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _open:
        for counted in _open:
            counted.opened.append(str(arguments[0]))


_is_audited = False


@contextmanager
def counted() -> Iterator[Counted]:
    """Count what the block does."""
    global _is_audited
    if not _is_audited:
        sys.addaudithook(_audit)  # which cannot be taken back
        _is_audited = True
    found = Counted()
    names = found.by_name

    def count(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            names[frame.f_code.co_name] += 1
        elif event == "c_call":
            names[argument.__name__] += 1

    _open.append(found)
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield found
    finally:
        sys.setprofile(before)
        _open.remove(found)
