"""Who uses an entry of the cache: processes that have it open, and runs that are to open it again.

Beside each entry lies a file of the runs that have opened it. A process that uses the entry holds
a shared lock on that file until it ends, however it ends, and its time is that of the last use.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

SUFFIX = ".used"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF}
"""What a file system says that knows no such locks."""
log = logging.getLogger(__name__)
_held: dict[Path, int] = {}
"""This process's descriptors, by the path of the file."""


class User(NamedTuple):
    """A run that has opened an entry."""

    run_dir: Path
    host: str


def file_of(parent: Path, name: str) -> Path:
    """Return the file that tells who uses an entry, which may not be there yet."""
    return parent / f"{name}{SUFFIX}"


def hold(parent: Path, name: str, run_dir: Path | None = None) -> None:
    """Keep an entry from being removed until this process ends, and note that it is used now.

    To be called before it is looked whether the entry is whole. ``run_dir`` is noted as one that
    opens it again. Where nothing can be written, as in somebody else's cache, nothing is noted.
    """
    path = file_of(parent, name)
    with suppress(FileNotFoundError):
        if path in _held and not _is(path, _held[path]):
            os.close(_held.pop(path))  # it was removed with its entry, which is built again
    try:
        if path not in _held:
            parent.mkdir(parents=True, exist_ok=True)
            _held[path] = _opened(path)
        descriptor = _held[path]
        os.utime(descriptor)
        if run_dir is not None:
            _note(path, descriptor, User(run_dir.absolute(), socket.gethostname()))
    except OSError as error:
        log.debug("%s: cannot be noted as used (%s)", path, error.strerror)


def release() -> None:
    """Hold no entry any more."""
    while _held:
        os.close(_held.popitem()[1])


def users(parent: Path, name: str) -> Iterator[User]:
    """Yield the runs that have opened an entry, each once."""
    try:
        lines = file_of(parent, name).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in dict.fromkeys(lines):
        with suppress(ValueError, KeyError, TypeError):  # half a line of a full disk
            tree = json.loads(line)
            yield User(Path(tree["run_dir"]), str(tree["host"]))


def last_use(parent: Path, name: str) -> float | None:
    """Return when an entry was last opened, in seconds since 1970; None where none has noted it."""
    try:
        return file_of(parent, name).stat().st_mtime
    except OSError:
        return None


@contextmanager
def alone(parent: Path, name: str, *, create: bool = False) -> Iterator[bool]:
    """Give whether nobody has an entry open, and let nobody open it inside of the block.

    Where its file is not there nobody has ever opened it, and somebody may begin to unless
    ``create`` is given. Where the file system has no locks nobody is taken to have it open: what
    runs have noted has to do.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    try:
        descriptor = os.open(file_of(parent, name), flags, 0o666)
    except FileNotFoundError:
        yield True
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_alone = True
        except OSError as error:
            if error.errno not in (*NO_LOCKS, errno.EWOULDBLOCK):
                raise
            is_alone = error.errno in NO_LOCKS
        yield is_alone
    finally:
        os.close(descriptor)


def _opened(path: Path) -> int:
    """Open and lock the file, the one that has the name once it is locked."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EROFS):
                raise
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # somebody else's cache
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if _is(path, descriptor):
                return descriptor
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in NO_LOCKS:
                return descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is(path: Path, descriptor: int) -> bool:
    return os.path.samestat(path.stat(), os.fstat(descriptor))


def _note(path: Path, descriptor: int, user: User) -> None:
    if user not in users(path.parent, path.name.removesuffix(SUFFIX)):
        line = json.dumps({"run_dir": str(user.run_dir), "host": user.host})
        os.write(descriptor, f"{line}\n".encode())
