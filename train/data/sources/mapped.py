"""Mapped files that are read once: their pages are given back, as they count as memory in use."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

FORGOTTEN_BYTES = 2**25
"""Of what is read, after which the pages behind it are given back."""

Item = TypeVar("Item")


def mapped(path: Path) -> mmap.mmap:
    """Return the bytes of a file; raise ValueError where it is empty, which cannot be mapped."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def pages_of(array: NDArray[Any]) -> mmap.mmap | None:
    """Return what an array of numpy's is mapped from, a part or a view of one too."""
    pages = getattr(array, "_mmap", None)
    return pages if isinstance(pages, mmap.mmap) else None


def forgetting(
    items: Iterable[Item], pages: mmap.mmap | None, size_of: Callable[[Item], int]
) -> Iterator[Item]:
    """Yield what is read of a file, and give back its pages again and again.

    What still looks at them afterwards finds the same: they are read anew.
    """
    read_bytes = 0
    for item in items:
        yield item
        read_bytes += size_of(item)
        if pages is not None and read_bytes >= FORGOTTEN_BYTES:
            pages.madvise(mmap.MADV_DONTNEED)
            read_bytes = 0
