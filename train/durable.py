"""Files that survive a crash: flushed to the disk, and named only when they are whole."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
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


def write_text(path: Path, text: str) -> None:
    """Write a small file, in UTF-8, whole or not at all: who reads it sees the old or the new.

    Both the text and the name are on the disk when this returns. Its permissions are those that any
    new file gets, whatever an older one had. Several processes may write the same file at once: the
    last one's stays. Raises OSError, which names ``path`` and not the temporary file beside it.
    """
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def temporary_of(final: Path) -> Path:
    """Return where `atomic_directory` writes what becomes ``final``."""
    return final.with_name(f".{final.name}.tmp")


def begin_directory(final: Path) -> Path:
    """Make the empty sibling in which ``final`` is written until `publish_directory`."""
    temporary = temporary_of(final)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def publish_directory(final: Path) -> None:
    """Flush what `begin_directory` has begun and give it its name; an older one is set aside."""
    temporary = temporary_of(final)
    for path in (temporary, *temporary.rglob("*")):
        flush(path)
    older = final.with_name(f".{final.name}.old")
    shutil.rmtree(older, ignore_errors=True)
    if final.exists():
        os.rename(final, older)
    publish(temporary, final)
    shutil.rmtree(older, ignore_errors=True)


@contextmanager
def atomic_directory(final: Path) -> Iterator[Path]:
    """Give a temporary sibling to write into; it becomes ``final`` when the block ends well.

    An older ``final`` stays until then, and is set aside just before. The sibling is removed when
    the block raises; what a kill leaves of it, the next one replaces.
    """
    temporary = begin_directory(final)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    publish_directory(final)
