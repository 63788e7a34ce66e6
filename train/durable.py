"""Files that survive a crash: flushed to the disk, and named only when they are whole."""

from __future__ import annotations

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, final: Path) -> None:
    """Give what is whole and flushed its name, by one rename in one directory."""
    os.rename(temporary, final)
    flush(final.parent)
