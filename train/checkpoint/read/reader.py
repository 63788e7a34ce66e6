"""A format of checkpoints: how it is told, where it may lie, and how it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shardwright.train.checkpoint.format.lazy import PortableState, Unreadable


@dataclass(frozen=True)
class Reader:
    """A format that checkpoints are in."""

    looked_for: str
    """By what it is told, in words for who has none of it."""
    find: Callable[[Path], Path | None]
    """Return what is to be read of a file or a directory; None where it is of another format.

    Reads no more than names. Raises Unreadable where several could be meant.
    """
    read: Callable[[Path], PortableState]
    """Return what that holds, no tensor read yet. Raises Unreadable."""
    read_section: Callable[[Path, str], PortableState] | None = None
    """Likewise, of that one of several mappings which is named; None where it has no such."""
    is_an_engines: bool = False
    """Whether an engine writes it, into a folder of its own in a checkpoint."""

    def state(self, found: Path, section: str | None) -> PortableState:
        """Return what `find` has found, of a section where one is named. Raises Unreadable."""
        if section is None:
            return self.read(found)
        if self.read_section is None:
            raise Unreadable(f"{found} has no sections; leave --section={section} out")
        return self.read_section(found, section)
