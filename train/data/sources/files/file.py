"""What is read as a file: one on a disk, or a member of an archive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal


@dataclass(frozen=True)
class Member:
    """A file within an archive, opened at most once."""

    archive: str
    name: str
    stream: Callable[[], IO[bytes]]

    def __str__(self) -> str:
        return f"{self.archive}:{self.name}"

    def open(self, mode: Literal["rb"]) -> IO[bytes]:
        """Return its bytes as a stream."""
        return self.stream()


File = Path | Member
