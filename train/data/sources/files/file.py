"""What is read as a file: one on a disk or on a remote filesystem, or a member of an archive."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Literal
from urllib.parse import unquote, urlsplit


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


@dataclass(frozen=True)
class Remote:
    """An object of a remote filesystem."""

    url: str
    size_bytes: int | None
    """None where its filesystem does not tell."""
    version: str | None
    """What changes with its content, as its filesystem tells it."""
    stream: Callable[[], IO[bytes]] = field(compare=False, repr=False)

    @property
    def name(self) -> str:
        return name_of(self.url)

    def __str__(self) -> str:
        return self.url

    def open(self, mode: Literal["rb"]) -> IO[bytes]:
        """Return its bytes as a stream that seeks."""
        return self.stream()


File = Path | Remote | Member


def is_url(name: str) -> bool:
    """Return whether a name is of a remote filesystem's. Pure."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name) is not None


def is_http(url: str) -> bool:
    """Return whether an address is of a server that only gives files, and lists none. Pure."""
    return url.lower().startswith(("http://", "https://"))


def name_of(path: str) -> str:
    """Return the name of a file by its path or address, without what a server is asked. Pure."""
    if is_http(path):
        path = unquote(urlsplit(path).path)
    return PurePosixPath(path).name
